"""`compresskit generate`: the text that an artefact writes, and how many steps it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options
from compresskit.errors import InputError, UsageError

if TYPE_CHECKING:
    from compresskit.artefact import Plan


def generate(
    model: options.ModelName = "tiny",
    method: options.Methods = None,
    mode: options.ModeName = "eager",
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a UTF-8 file.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0)] = 0.0,
    ignore_stop: Annotated[
        bool, typer.Option("--ignore-stop", help="Do not stop at the stop token.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")
    ] = False,
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
    """Continue a prompt with the compressed model.

    [bold]Examples[/bold]

      compresskit generate --prompt "Once upon a time"

      compresskit generate -m pypi:smollm2-135m --method speculative/ngram --prompt-file notes.txt --json
    """
    from compresskit import artefact as artefacts

    text = _prompt(prompt, prompt_file)
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
        sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        seed=seed,
    )
    options.hush(spec)
    from compresskit.cli.progress import source_progress

    with source_progress() as report:
        plan = artefacts.plan(spec, report)
    answer = _decode(plan, text, max_new_tokens, chat=chat, ignore_stop=ignore_stop)
    if "synthetic" in answer:
        print(f"note: {answer['synthetic']}: the text means nothing.", file=sys.stderr)
    print(json.dumps(answer, ensure_ascii=False) if as_json else answer["text"])


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt with either --prompt or --prompt-file.")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{prompt_file}: cannot be read ({error.strerror or error})."
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{prompt_file}: not UTF-8 at byte {error.start}. Convert it first."
            ) from None
    if not prompt:
        raise InputError("the prompt is empty: give at least one character.")
    return prompt


def _decode(
    plan: Plan, text: str, max_new_tokens: int, *, chat: bool, ignore_stop: bool
) -> dict[str, Any]:
    from compresskit import artefact as artefacts
    from compresskit.decode import pad
    from compresskit.measure.count import counting
    from compresskit.system import Request

    tokens: list[int] = []
    drafted = accepted = chunks = 0
    with artefacts.opened(plan) as artefact:
        system, counter = counting(artefact.system)
        ids = system.tokenizer.chat(text) if chat else system.tokenizer.encode(text)
        if not ids:
            raise InputError("the prompt has no tokens: give more text.")
        rows, mask = pad([ids], device=system.device.torch)
        request = Request(
            tokens=rows,
            mask=mask,
            max_new_tokens=max_new_tokens,
            sampling=plan.spec.sampling,
            stop=() if ignore_stop else system.tokenizer.eos_ids,
            seed=plan.spec.seed,
        )
        for chunk in system.generate(request):
            tokens += chunk.tokens[0, : int(chunk.lengths[0])].tolist()
            drafted, accepted, chunks = (
                drafted + chunk.drafted,
                accepted + chunk.accepted,
                chunks + 1,
            )
        return {
            "text": system.tokenizer.decode(tokens),
            "tokens": tokens,
            "prompt_tokens": len(ids),
            "new_tokens": len(tokens),
            "steps": chunks,
            "forwards": counter.calls,
            "drafted": drafted,
            "accepted": accepted,
            "kernels": dict(system.kernels),
            "digest": plan.spec.digest(),
            **({"synthetic": system.synthetic} if system.synthetic else {}),
        }
