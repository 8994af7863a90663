"""What a peak of memory is made of: parts that are read one by one, never fitted.

A CPU process, at the moment at which most tensors were alive:

    peak of rss ┬─ runtime      anonymous memory before the model was loaded: Python, imports
                ├─ libraries    resident pages of mapped libraries
                ├─ weights      resident bytes of the weights
                ├─ checkpoint   pages of mapped model files that no weight uses any more
                ├─ compiler     what building the graphs took, their constants left out
                ├─ cache        at its largest
                ├─ activations  other tensors
                ├─ slack        freed, and kept by the allocator
                ├─ workspace    resident at the peak and not at that moment: buffers of operators
                └─ the rest is `unattributed`: whatever nothing here claims

A GPU, by the allocator's own counters:

    peak of cuda_reserved  ┬─ weights, cache, activations
                           ├─ workspace   what cuBLAS has taken
                           └─ slack       reserved, and not asked for
    peak of process_vram   ── the same and `runtime`: CUDA's context and loaded kernels

Weights that a placement has sent to the host's memory or to disk are no part of a GPU's peak, nor those on
disk of resident memory, except while a step visits them: that is workspace, or unattributed.

A part that cannot be read is unavailable and so ends up in the rest; no part is ever adjusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.measure.memory import residency
from compresskit.measure.memory.weights import Piece, here, pieces, resident_weights
from compresskit.record import Measured, Phase, Reading, Unavailable
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.device import Device
    from compresskit.measure.memory.residency import Resident

NO_SMAPS = "needs /proc/self/smaps (Linux)"


def measured(value: float, source: str) -> Measured:
    """Bytes from `source`."""
    return Measured(value=float(value), unit=Unit.BYTE, source=source)


class Instant(NamedTuple):
    """The process at one moment."""

    resident: Resident | None
    freed: int | None
    """Bytes that were freed and are still resident."""

    @classmethod
    def now(cls) -> Instant:
        """Look."""
        resident = residency.resident()
        return cls(resident, None if resident is None else residency.freed_in_allocator(resident))


def runtime() -> Reading:
    """What the process holds by itself; to be read before anything of the model is there."""
    now = Instant.now()
    if now.resident is None:
        return Unavailable(reason=NO_SMAPS)
    return measured(
        now.resident.anonymous - (now.freed or 0), "smaps: anonymous memory before the load"
    )


class Accounts:
    """Keeps what does not change from phase to phase, and explains the peaks of each."""

    def __init__(self, device: Device, runtime: Reading) -> None:
        """`runtime` is what the function of that name said before the model was loaded."""
        self.cuda = device.kind == "cuda"
        self._ordinals = device.ordinals
        self.runtime = runtime

    def phase(
        self,
        peaks: Mapping[str, Reading],
        model: Any,
        step: Any = None,
        others: Sequence[tuple[Any, Any]] = (),
        *,
        tensors: Mapping[str, Reading] | None = None,
        at: Instant | None = None,
        high: Reading | None = None,
        slack: Reading | None = None,
    ) -> Phase:
        """Explain `peaks` by the weights of `model`, `step` and `others`, and by `tensors`.

        CPU: `at` is the moment that the parts speak of, by default now; `high` the peak of the very
        run in which that moment was, where it is not the run of `peaks`. GPU: `slack` is what
        `gpu_slack` said in the run of `peaks`, by default now.
        """
        parts = dict(tensors or {})
        if self.cuda:
            counter = _gpu_counter(peaks)
            parts["weights"] = measured(
                sum(piece.nbytes for piece in here(pieces(model, step, others))), "storage bytes"
            )
            parts["slack"] = slack or gpu_slack(self._ordinals)
            if counter == "process_vram":
                parts["runtime"] = self.runtime
        else:
            counter = "rss"
            parts |= self._cpu(
                list(here(pieces(model, step, others))),
                step,
                at or Instant.now(),
                high or peaks["rss"],
            )
        ordered = {name: parts[name] for name in ORDER if name in parts}
        return Phase(peaks=dict(peaks), counter=counter, parts=ordered)

    def _cpu(self, held: list[Piece], step: Any, at: Instant, high: Reading) -> dict[str, Reading]:
        weights = resident_weights(held)
        parts: dict[str, Reading] = {"runtime": self.runtime, "weights": weights.reading}
        now = at.resident
        if now is None:
            absent = Unavailable(reason=NO_SMAPS)
            return {**parts, **dict.fromkeys(("libraries", "workspace", "slack"), absent)}
        parts["libraries"] = measured(now.libraries, "smaps: pages of files with code")
        parts["checkpoint"] = measured(
            now.files - weights.of_files, "smaps: pages of other files, less those of the weights"
        )
        parts["workspace"] = (
            measured(high.value - now.total, "VmHWM less what was resident between operations")
            if isinstance(high, Measured)
            else high
        )
        parts["slack"] = (
            Unavailable(reason="the C library has no mallinfo2")
            if at.freed is None
            else measured(at.freed, "mallinfo2: free blocks, less the holes of the heap")
        )
        return parts | _compiler(step, held)


def gpu_slack(ordinals: Sequence[int] = (0,)) -> Reading:
    """What torch's allocator had reserved and nobody had asked for, each at its peak; of all GPUs."""
    # A GPU that holds nothing yet has no statistics.
    marks = [torch.cuda.memory_stats(ordinal) for ordinal in ordinals]
    return measured(
        sum(
            one.get("reserved_bytes.all.peak", 0) - one.get("requested_bytes.all.peak", 0)
            for one in marks
        ),
        "torch.cuda: reserved less requested, at their peaks",
    )


def gpu_workspace(ordinals: Sequence[int] = (0,)) -> Reading:
    """What cuBLAS holds between its calls: seen by taking it away; it is taken again when needed."""
    for ordinal in ordinals:
        torch.cuda.synchronize(ordinal)
    before = sum(map(torch.cuda.memory_allocated, ordinals))
    torch._C._cuda_clearCublasWorkspaces()
    freed = before - sum(map(torch.cuda.memory_allocated, ordinals))
    return measured(freed, "torch.cuda: freed cuBLAS workspaces")


def gpu_runtime(held: Reading, ordinals: Sequence[int] = (0,)) -> Reading:
    """Of what the process `held` on its GPUs, what is not torch's allocator."""
    if isinstance(held, Measured):
        reserved = sum(map(torch.cuda.memory_reserved, ordinals))
        return measured(held.value - reserved, "NVML less torch's reserve")
    return held


ORDER = (
    "runtime",
    "libraries",
    "weights",
    "checkpoint",
    "compiler",
    "cache",
    "activations",
    "workspace",
    "slack",
)
"""Parts in the order in which a reader would ask for them."""


def _gpu_counter(peaks: Mapping[str, Reading]) -> str:
    seen = peaks.get("process_vram")
    return "process_vram" if isinstance(seen, Measured) else "cuda_reserved"


def _compiler(step: Any, held: list[Any]) -> dict[str, Reading]:
    """What compiling has taken, for a step that compiles."""
    if not hasattr(step, "built_bytes"):
        return {}
    if step.built_bytes is None:
        return {"compiler": Unavailable(reason="needs /proc/self/status (Linux)")}
    constants = sum(piece.nbytes for piece in held if piece.frozen)
    return {
        "compiler": measured(
            step.built_bytes - constants, "anonymous memory taken while graphs were built"
        )
    }
