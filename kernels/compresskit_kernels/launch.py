"""What every Triton implementation shares: when it can run, and with which tile sizes.

Nothing here imports Triton: an operation's `triton.py` does, and is loaded when its first weight is
prepared. Tile sizes come from a table in `tuned/`, one file a GPU by the name that torch gives it
and `default.json` for the rest; nothing is tuned at run time, so that a run is repeatable and its
first call is not a benchmark. `python benchmarks/gpu/run.py tune` makes a table on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compresskit_kernels.dispatch import Implementation, Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

W = TypeVar("W")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs on the CPU, slowly, for tests: only an explicit choice may take it then."""

FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Said in every launch, because Triton 3.10 turns the fusing of a product and a sum off by default."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NEEDS = "a float32, bfloat16 or float16 input on a CUDA device of compute capability 8.0 or later, and Triton"
OLDEST = (8, 0)
"""Compute capability with bfloat16 tensor cores and asynchronous copies."""


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def can_run(x: torch.Tensor) -> bool:
    """Whether our Triton kernels can take an input like `x`."""
    if x.dtype not in FLOATS or not installed():
        return False
    if x.is_cuda:
        return torch.version.hip is None and _capability(x.device) >= OLDEST
    return INTERPRETED and x.device.type == "cpu"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launch on the device of `x`, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def implementation(
    op: str, detail: str, needs: str, fits: Callable[[W], bool]
) -> Implementation[W]:
    """Operation `op`'s Triton implementation: `prepare` of its `triton.py`, imported when used.

    `fits` says whether the layout can take a weight; `needs` says the same in words, or nothing.
    """

    def prepare(weight: W) -> Prepared:
        module = importlib.import_module(f"compresskit_kernels.{op}.triton")
        prepared: Prepared = module.prepare(weight)
        return prepared

    return Implementation(
        name="triton",
        detail=detail,
        needs=f"{needs}, {NEEDS}" if needs else NEEDS,
        supports=lambda x, weight: can_run(x) and fits(weight),
        prepare=prepare,
        automatic=not INTERPRETED,
    )


@dataclass(frozen=True)
class Tile:
    """The share of one program, and how it is run. Powers of two, except `most_rows`, `waves`."""

    most_rows: int
    """Rows of activations up to which this entry applies."""
    rows: int
    """Rows of activations a program."""
    columns: int
    """Outputs a program."""
    depth: int
    """Inputs (or words of codes, for one row) a step."""
    warps: int
    stages: int
    waves: int
    """Programs a multiprocessor should get: the inputs are split until there are as many."""


@functools.cache
def tiles(kind: str, gpu: str) -> tuple[Tile, ...]:
    """The table of one kind of kernel for a GPU of that name, few rows first."""
    folder = resources.files("compresskit_kernels") / "tuned"
    own = folder / f"{gpu.replace(' ', '_')}.json"
    text = (own if own.is_file() else folder / "default.json").read_text("utf-8")
    return tuple(Tile(**entry) for entry in json.loads(text)[kind])


_trial: ContextVar[Mapping[str, Tile]] = ContextVar("trial", default=MappingProxyType({}))


@contextmanager
def trial(kind: str, candidate: Tile) -> Iterator[None]:
    """Let `candidate` stand in for the table of one kind in this block: how a table is made."""
    token = _trial.set({**_trial.get(), kind: candidate})
    try:
        yield
    finally:
        _trial.reset(token)


def tile(kind: str, rows: int, device: torch.device) -> Tile:
    """The entry for this many rows of activations; beyond the table, its last."""
    if (tried := _trial.get().get(kind)) is not None:
        return tried
    table = tiles(kind, _name(device))
    return next((entry for entry in table if rows <= entry.most_rows), table[-1])


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a token number for the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits(programs: int, steps: int, waves: int, device: torch.device) -> int:
    """Into how many parts to cut `steps` of the inner dimension, so that no multiprocessor idles."""
    wanted = -(-waves * multiprocessors(device) // max(1, programs))
    return max(1, min(wanted, steps))
