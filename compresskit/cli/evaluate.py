"""`compresskit evaluate`: likelihood and fidelity only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compresskit.cli import options, task_options

if TYPE_CHECKING:
    from compresskit.record import Quality


def evaluate(
    model: options.ModelName = "tiny",
    method: options.Methods = None,
    mode: options.ModeName = "eager",
    text: Annotated[
        str,
        typer.Option(help="Text to score: embedded, a file, or datasets:NAME[:CONFIG[:SPLIT]]."),
    ] = "embedded",
    protocol: Annotated[
        Literal["auto", "window", "split"],
        typer.Option(help="window: whole windows; split: prefill, then steps through the cache."),
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Scored tokens at most (window).")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Window length (window).")] = 512,
    prefill: Annotated[
        int, typer.Option(min=1, help="Tokens before the scored part (split).")
    ] = 256,
    continuation: Annotated[int, typer.Option(min=1, help="Scored steps per window (split).")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="Number of windows (split).")] = 8,
    greedy_prompts: Annotated[
        int, typer.Option(min=0, help="Greedy continuations to compare; 0 skips them.")
    ] = 4,
    task: task_options.Tasks = None,
    task_tokens: task_options.TaskTokens = 512,
    task_samples: task_options.TaskSamples = 20,
    task_depth: task_options.TaskDepths = None,
    task_chat: task_options.TaskChat = False,
    placement: options.Placement = None,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Score a text with the compressed model and compare it with the dense one, token by token.

    [bold]Examples[/bold]

      compresskit evaluate --method quant/int4:group=32

      compresskit evaluate -m pypi:smollm2-135m --method kv/int8 --text book.txt --json

      compresskit evaluate --method kv/knorm:ratio=0.5 --task niah_single --task niah_multikey
    """
    from compresskit import artefact as artefacts, runner
    from compresskit.cli.progress import console, source_progress

    spec = options.run_spec(
        options.model_spec(
            model,
            revision=revision,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ),
        method,
        device=device,
        engine=options.engine(mode, placement),
        protocol={"threads": threads},
        quality={
            "text": text,
            "protocol": protocol,
            "tokens": tokens,
            "window": window,
            "prefill": prefill,
            "continuation": continuation,
            "windows": windows,
            "greedy_prompts": greedy_prompts,
            **task_options.document(task, task_tokens, task_samples, task_depth, chat=task_chat),
        },
        seed=seed,
    )
    options.hush(spec)
    with source_progress() as report:
        plan = artefacts.plan(spec, report)
    with console.status("loading") as status, artefacts.opened(plan) as artefact:
        quality = runner.judge_quality(
            plan, artefact, lambda phase, detail="": status.update(f"{phase} {detail}")
        )
        label = spec.label()
    if as_json:
        print(
            json.dumps(
                {
                    "digest": spec.digest(),
                    "label": label,
                    "quality": quality.model_dump(mode="json"),
                }
            )
        )
    else:
        _show(label, quality)


def _show(label: str, quality: Quality) -> None:
    from rich.console import Console

    from compresskit.units import significant

    console = Console()

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(label)
    if (scored := quality.likelihood) is not None:
        spread = f" ± {scored.nll_stderr:.4f}" if scored.nll_stderr is not None else ""
        line(
            f"  likelihood   {scored.nll_mean:.4f}{spread} nats/token, perplexity {scored.perplexity:.3f}, "
            f"{scored.bits_per_byte:.4f} bits/byte over {scored.scored_tokens} tokens"
        )
        line(f"  protocol     {scored.protocol_id}")
    if (near := quality.fidelity) is not None:
        line(
            f"  fidelity     KL {significant(near.kl.mean)} nats/token "
            f"(p99 {significant(near.kl.percentiles.get('p99', near.kl.mean))}), "
            f"top-1 agreement {100 * near.top1_agreement:.2f} %"
        )
        paired = f" ± {near.delta_nll_stderr:.5f}" if near.delta_nll_stderr is not None else ""
        line(f"  delta NLL    {near.delta_nll:+.5f}{paired} nats/token against the dense baseline")
    if (greedy := quality.greedy) is not None:
        first = [str(i) if i is not None else "none" for i in greedy.first_divergence]
        line(
            f"  greedy       {100 * greedy.exact_match:.0f} % identical; first different token: {', '.join(first)}"
        )
    if quality.tasks is not None:
        from compresskit.report import tasks

        for told in tasks.lines(quality.tasks):
            line(f"  {told}")
    for note in quality.notes:
        line(f"  note         {note}")
