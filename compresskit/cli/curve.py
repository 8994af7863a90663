"""`compresskit curve`: decode time and bytes against the length of the context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.artefact import Plan


def curve(
    model: options.ModelName = "tiny",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="STACK",
            help="One more row: a method, or several joined by +. Repeatable; the dense cache is "
            "always a row.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens in the cache, at each of which all rows are timed.")
    ] = "256,512,1024",
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Turns of each row at each length; ten can tell a difference."),
    ] = 10,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Also estimate how many sequences fit, such as 8GB or 80GiB.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for curve.json and curve.svg; lengths that are in it stay."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure lengths again that --out has already.")
    ] = False,
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Time decode steps with caches of growing length: from where on does a cache method pay?

    Caches are filled with random keys and values, so no prefill is needed. Rows take turns at each
    length, and each is compared with the dense cache pair by pair.

    [bold]Examples[/bold]

      compresskit curve --method kv/kivi --method kv/snapkv:ratio=0.75,window=16

      compresskit curve -m pypi:smollm2-135m --method kv/int8 --method kv/sink_window
      --lengths 1024,2048,4096 --memory 8GB --out curve

      compresskit curve --method quant/int4+kv/kivi:bits=2 --json
    """
    import json

    from rich.console import Console

    from compresskit.cli.progress import console, source_progress
    from compresskit.curve.document import document
    from compresskit.report import curve as report

    wanted, room = _lengths(lengths), _memory(memory)
    plans: dict[str, Plan] = {}
    with source_progress() as progress:
        from compresskit import artefact as artefacts, catalogue

        source = options.model_spec(
            model, revision=revision, dtype=dtype, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        for stack in ("", *(method or ())):
            spec = options.run_spec(
                source, [part for part in stack.split("+") if part], device=device,
                protocol={"threads": threads}, seed=seed,
            )  # fmt: skip
            plan = artefacts.plan(spec, progress)
            plan.check()
            plans[catalogue.label(spec.stack)] = plan
    first = plans["dense"]
    facts: dict[str, Any] = {
        "model": first.source.name, "device": first.device.name, "threads": threads,
        "rounds": rounds, "seed": seed,
        "specs": {name: plan.spec.digest() for name, plan in plans.items()},
    }  # fmt: skip
    if out is not None:
        from compresskit.report.plot import canvas

        canvas.check(out / "curve.svg")
    before = {} if out is None or fresh else _known(out / "curve.json", facts, batch)
    done = {int(tokens): rows for tokens, rows in before.get("lengths", {}).items()}
    facts["dtype"] = before.get("dtype")
    missing = [tokens for tokens in wanted if tokens not in done]
    if done:
        console.print(f"kept {len(done)} lengths of {out}", markup=False, highlight=False)

    def keep() -> dict[str, Any]:
        found = document(done, list(plans), facts=facts, batch=batch, memory=room)
        if out is not None:
            _write(found, out)
        return found

    if missing:
        _measure(plans, missing, done, facts, keep, rounds=rounds, batch=batch, seed=seed)
    found = keep()
    if as_json:
        print(json.dumps(found, allow_nan=False, ensure_ascii=False))
        return
    report.render(found, Console())
    if out is not None:
        console.print(f"wrote {out}", markup=False, highlight=False)


def _measure(
    plans: dict[str, Plan],
    missing: list[int],
    done: dict[int, Any],
    facts: dict[str, Any],
    keep: Callable[[], object],
    **how: int,
) -> None:
    """Open every row and measure the missing lengths; each is kept as soon as it is done."""
    from contextlib import ExitStack

    from compresskit import artefact as artefacts
    from compresskit.cli.progress import console
    from compresskit.curve.document import entry
    from compresskit.curve.measure import at_length, capacity
    from compresskit.errors import Conflict, InputError
    from compresskit.hf.load import dtype_name
    from compresskit.measure.memory.weights import weight_bytes

    with ExitStack() as stack, console.status("loading") as status:
        systems = {}
        for name, plan in plans.items():
            status.update(f"loading {name}")
            systems[name] = stack.enter_context(artefacts.opened(plan)).system
            if systems[name].simulated:
                raise Conflict(
                    f"{name} is simulated: it has no speed to draw a curve of. Leave it out."
                )
        dense = systems["dense"]
        for tokens in missing:
            if capacity(tokens, how["rounds"]) > dense.context:
                raise InputError(
                    f"--lengths {tokens}: with the steps of {how['rounds']} rounds that is more than "
                    f"the model's context of {dense.context}. Leave the length out."
                )
        weights = {
            name: sum(weight_bytes(system.model, system.step).values())
            for name, system in systems.items()
        }
        facts["dtype"] = dtype_name(dense.model)
        for index, tokens in enumerate(missing):
            status.update(f"{tokens:,} tokens ({index + 1} of {len(missing)})")
            done[tokens] = entry(at_length(systems, tokens, **how), weights)
            if index + 1 < len(missing):
                keep()


def _lengths(text: str) -> list[int]:
    from compresskit.errors import SpecError

    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise SpecError(f"--lengths {text!r}: list numbers of tokens, such as 512,1024,2048.")
    return found


def _memory(text: str | None) -> int | None:
    from compresskit.errors import SpecError
    from compresskit.units import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise SpecError(f"--memory: {error}.") from None


def _known(path: Path, facts: dict[str, Any], batch: int) -> dict[str, Any]:
    """The curve that an earlier call measured in the same way; empty if it was another one."""
    import json

    from compresskit.errors import InputError

    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = {key: before[key] for key in (*facts, "batch")} == {**facts, "batch": batch}
        return before if same and before["dtype"] and before["lengths"] else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is no curve that can be gone on with. Remove it, or give --fresh."
        ) from None


def _write(found: dict[str, Any], folder: Path) -> None:
    import json

    from compresskit.report.plot import curve as picture
    from compresskit.store import write_text

    write_text(folder / "curve.json", json.dumps(found, allow_nan=False, indent=1) + "\n")
    picture.draw(found, folder / "curve.svg")
