"""`compresskit audit`: does a decode loop say what plain decoding would say?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compresskit.cli import options

if TYPE_CHECKING:
    from compresskit.artefact import Plan
    from compresskit.audit.document import Asked, Audit


def audit(
    model: options.ModelName = "tiny",
    method: options.Methods = None,
    mode: options.ModeName = "eager",
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the drawn answers; 0 leaves the greedy parts alone.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0)] = 0.0,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers drawn. [default: as many as --detect needs]", show_default=False
        ),
    ] = None,
    detect: Annotated[
        float,
        typer.Option(help="Chi-square divergence that must be noticed (9 times in 10)."),
    ] = 0.1,
    depth: Annotated[
        int,
        typer.Option(
            min=3, max=6, help="First tokens taken together; more for drafters that begin blank."
        ),
    ] = 3,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows decoded together, of different lengths.")
    ] = 1,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the greedy part.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for <label>.audit.json, the whole document.", show_default=False
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Also write the verdict into the facts of this stored record of the same stack.",
            show_default=False,
        ),
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Check that a speculative loop is lossless: greedy tokens, stops, and the law of drawn answers.

    Exit code 0: lossless; 1: lossy; 3: inconclusive (too few draws, or hardly a draft).

    [bold]Examples[/bold]

      compresskit audit --method speculative/ngram

      compresskit audit --method speculative/ngram:draft=4 --top-p 0.9 --batch 4 --mode compiled

      compresskit audit -m pypi:smollm2-135m --method speculative/ngram --temperature 0 --dtype bfloat16

      compresskit audit --method speculative/ngram --detect 0.03 --out audits --json
    """
    from rich.console import Console

    from compresskit.audit.document import Asked
    from compresskit.audit.held import into
    from compresskit.cli.progress import console, source_progress
    from compresskit.errors import Exit
    from compresskit.report import lossless
    from compresskit.store import write_text

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked = Asked.decode(
        {
            "sampling": sampling, "batch": batch, "draws": draws, "prompts": prompts,
            "detect": detect, "depth": depth, "seed": seed,
        },
        where="command line",
    )  # fmt: skip
    with source_progress() as progress:
        from compresskit import artefact as artefacts

        spec = options.run_spec(
            options.model_spec(
                model, revision=revision, dtype=dtype, allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            ),
            method, device=device, engine={"mode": mode}, protocol={"threads": threads},
            sampling=sampling, seed=seed,
        )  # fmt: skip
        plan = artefacts.plan(spec, progress)
    found = _audit(plan, asked)
    if record is not None:
        into(record, found, spec)
        console.print(f"wrote the verdict into {record}", markup=False, highlight=False)
    if out is not None:
        path = out / f"{found.file_stem()}.audit.json"
        write_text(path, found.model_dump_json(indent=1) + "\n")
        console.print(f"wrote {path}", markup=False, highlight=False)
    if as_json:
        print(found.model_dump_json())
    else:
        lossless.render(found, Console())
    code = {"lossless": Exit.DONE, "lossy": Exit.FAILED, "inconclusive": Exit.INVALID}
    if found.verdict != "lossless":
        raise typer.Exit(code[found.verdict])


def _audit(plan: Plan, asked: Asked) -> Audit:
    """Open the stack and audit its loop."""
    from compresskit import artefact as artefacts, catalogue
    from compresskit.audit.answer import loop
    from compresskit.audit.conduct import conduct, plainly
    from compresskit.audit.held import auditable
    from compresskit.cli.progress import console

    traits = plan.check()
    rule = auditable(plan.methods, traits, asked.batch)
    with console.status("loading") as status, artefacts.opened(plan) as opened:
        return conduct(
            loop(opened.system),
            plainly(opened.system),
            asked,
            label=catalogue.label(plan.spec.stack, plan.spec.engine.mode),
            model=plan.source.name,
            mode=plan.spec.engine.mode,
            digest=plan.spec.digest(),
            rule=rule,
            progress=lambda part, done, total: status.update(f"{part} {done}/{total}"),
        )
