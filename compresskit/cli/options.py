"""Options that several commands share, with one help text each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from compresskit.spec import MethodSpec, ModelSpec, RunSpec

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A Hub id, a local folder, a .gguf file, pypi:smollm2-135m, pypi:gemma3-270m, or tiny.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag of a Hub model.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="FAMILY/NAME:KEY=VALUE,…",
        help="A method to apply; repeat the option to build one stack.",
    ),
]
DeviceName = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")]
DtypeName = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Computation type; auto keeps the type of the checkpoint."),
]
ModeName = Annotated[
    Literal["eager", "prepacked", "compiled"], typer.Option(help="How a step is executed.")
]
Placement = Annotated[
    str | None,
    typer.Option(
        metavar="HOW[:KEY=VALUE,…]",
        help="Several devices for one model. spread: blocks on all GPUs, then in host memory, then on "
        "disk (device_gb and host_gb bound what lies where). tensor_parallel: a share of every matrix "
        "in each process; start with torchrun. [default: one device]",
        show_default=False,
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads; more than one is noisy on shared machines.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of prompts, sampling and methods.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickle checkpoints, which can run code.")
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Paired = Annotated[
    bool,
    typer.Option(
        "--paired/--single",
        help="Measure rows side by side in shuffled rounds, or one after the other (no verdicts).",
    ),
]
Resident = Annotated[
    int | None,
    typer.Option(
        min=2, help="Rows loaded at once when paired. [default: as many as memory allows]"
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for records.")]


def model_spec(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Build the model part of a spec from flags."""
    from compresskit.spec import ModelSpec

    return ModelSpec.decode(
        {
            "name": name,
            "revision": revision,
            "dtype": dtype,
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
        },
        where="command line",
    )


def engine(mode: str, placement: str | None = None) -> dict[str, Any]:
    """The engine part of a spec, JSON-like, from flags."""
    if placement is None:
        return {"mode": mode}
    from compresskit.spec import PlacementSpec, parse_call

    how, limits = parse_call(placement, option="--placement")
    found = PlacementSpec.decode({"how": how, **limits}, where=f"--placement {placement!r}")
    return {"mode": mode, "placement": found.model_dump(mode="json")}


def hush(spec: RunSpec) -> None:
    """Print nothing more to stdout if other processes run the same and the first of them prints."""
    from compresskit.hf import parallel

    if not parallel.first(spec.engine.placement):
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def stack_of(methods: list[str] | None) -> tuple[MethodSpec, ...]:
    """Decode repeated --method options into one stack."""
    from compresskit import catalogue

    return tuple(catalogue.parse_method(text) for text in methods or ())


def run_spec(model: ModelSpec, methods: list[str] | None, **parts: Any) -> RunSpec:
    """Build a spec from flags; `parts` are JSON-like documents of its other fields."""
    from compresskit.spec import RunSpec

    document = {
        "model": model.model_dump(mode="json"),
        "stack": [method.model_dump(mode="json") for method in stack_of(methods)],
        **parts,
    }
    return RunSpec.decode(document, where="command line")
