"""`compresskit drafts`: which drafts would have been accepted, from recorded answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options
from compresskit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.artefact import Plan
    from compresskit.drafts.record import Asked

_RECORD = "Record a trace instead"


def drafts(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TRACE.jsonl]",
            help='Answers, one a line: {"prompt": [ids], "answer": [ids], "category": text}.',
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="FAMILY/NAME:KEY=VALUE,…",
            help="One more drafter to replay; with --record, a method applied to the model.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            help="Write greedy answers of a model to this file.",
            rich_help_panel=_RECORD,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Who answers.", rich_help_panel=_RECORD
        ),
    ] = "tiny",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Prompts, one a line: {"prompt": text, "category": text}.', rich_help_panel=_RECORD
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Without --prompts: what to make them of (embedded, pydoc, copy, edit, a file, "
            "questions:FILE). Repeatable: one category each.  [default: embedded]",
            rich_help_panel=_RECORD,
            show_default=False,
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Prompts of each text.", rich_help_panel=_RECORD)
    ] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each of them.", rich_help_panel=_RECORD)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer at most.", rich_help_panel=_RECORD)
    ] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat template.", rich_help_panel=_RECORD)
    ] = False,
    ignore_stop: Annotated[
        bool,
        typer.Option(
            "--ignore-stop", help="Do not stop at the stop token.", rich_help_panel=_RECORD
        ),
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
    """Replay recorded greedy answers through drafters: exact acceptance without the model.

    Only drafters that read nothing but text can be replayed (speculative/ngram, speculative/suffix).
    Token recycling, for one, learns from the model's logits, which a trace does not hold.

    [bold]Examples[/bold]

      compresskit drafts --record answers.jsonl --new-tokens 128

      compresskit drafts answers.jsonl --method speculative/ngram:draft=8 --method speculative/suffix

      compresskit drafts --record kinds.jsonl -m pypi:smollm2-135m --text embedded --text copy --text edit
    """
    if record is not None:
        if trace is not None:
            raise UsageError("--record writes a trace: give no other trace to replay.")
        from compresskit.drafts import record as recorder

        # Read first: a bad line is told before a model is looked for.
        asked = None if prompts is None else recorder.read(prompts)
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
            protocol={"threads": threads},
            seed=seed,
        )
        from compresskit import artefact as artefacts
        from compresskit.cli.progress import source_progress

        with source_progress() as progress:
            plan = artefacts.plan(spec, progress)
        cuts = {"requests": requests, "prompt_tokens": prompt_tokens}
        answer = _record(
            plan,
            record,
            asked or text or ["embedded"],
            cuts,
            chat=chat,
            new_tokens=new_tokens,
            ignore_stop=ignore_stop,
        )
        print(json.dumps(answer) if as_json else f"{answer['requests']} answers in {record}")
        return
    if trace is None:
        raise UsageError("give a trace to replay, or --record one.")
    if not method:
        raise UsageError("give at least one drafter, such as --method speculative/ngram.")
    found = _replay(trace, method)
    if as_json:
        print(json.dumps(found, allow_nan=False, ensure_ascii=False))
    else:
        from compresskit.drafts import report

        for line in report.lines(found):
            print(line)


def _replay(path: Path, methods: list[str]) -> dict[str, Any]:
    from compresskit import catalogue
    from compresskit.drafts import trace as traces

    # Read first: a bad line is told before torch is loaded.
    entries = traces.load(path)
    specs = [catalogue.parse_method(text) for text in methods]
    from compresskit.drafts import play, report

    # Whatever is wrong with a method is told before another is replayed.
    checked = [play.check(catalogue.place([spec])[0]) for spec in specs]
    played = [
        report.Played(name, spec.label(), method.draft, play.play(method, entries))
        for name, spec, method in zip(methods, specs, checked, strict=True)
    ]
    return report.document(entries, played, source=str(path))


def _record(
    plan: Plan,
    out: Path,
    asked: Sequence[Asked | str],
    cuts: dict[str, int],
    *,
    chat: bool,
    new_tokens: int,
    ignore_stop: bool,
) -> dict[str, Any]:
    from compresskit import artefact as artefacts
    from compresskit.cli.progress import console
    from compresskit.drafts import record as recorder, trace as traces
    from compresskit.errors import Conflict

    with artefacts.opened(plan) as opened, console.status("recording") as status:
        system = opened.system
        if system.synthetic is not None:
            raise Conflict(
                f"{plan.spec.label()} has {system.synthetic}: its answers mean nothing. Record without it."
            )
        found = recorder.encode(
            system.tokenizer, [one for one in asked if not isinstance(one, str)], chat=chat
        )
        for text in (one for one in asked if isinstance(one, str)):
            found += recorder.cut(system.tokenizer, text, **cuts, chat=chat, seed=plan.spec.seed)
        entries = recorder.record(
            system,
            found,
            max_new_tokens=new_tokens,
            model=plan.source.name,
            ignore_stop=ignore_stop,
            tick=lambda done, total: status.update(f"recording {done}/{total}"),
        )
        traces.save(out, entries)
    return {
        "out": str(out),
        "requests": len(found),
        "model": plan.source.name,
        "digest": plan.spec.digest(),
    }
