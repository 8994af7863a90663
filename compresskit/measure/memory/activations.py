"""Tensors that come and go while a request runs: how many bytes of them are alive at the worst.

`LiveTensors` sees every operation that torch dispatches. A result whose storage no argument shares
is new; it is gone when the last tensor on its storage is. Weights are never new, cached keys and
values are: activations are the highest mark less the cache.

A compiled graph dispatches nothing that could be seen, so there torch's allocator is asked instead,
by way of the profiler (`allocated_peak`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP = 1 << 20
SHARE = 1.02
"""A new high mark is told when it is this much above the last one that was told."""


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is not typed here
    """Counts bytes of new tensors while it is switched on; may be switched on again and goes on."""

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        """Call `told` at new high marks, the first operation of a phase among them."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.operations = 0
        """Operations dispatched, views left out: they start no work."""
        self._told = told
        self._last = -1.0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def begin(self) -> None:
        """Open a phase: what is alive stays alive, the high mark starts anew."""
        self.peak, self._last = self.live, -1.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and look at what it returned."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        self.operations += 1
        fresh = [one for one in _storages(result) if one._cdata not in self._alive]
        if fresh:
            given = {one._cdata for one in _storages((args, kwargs))}
            for one in fresh:
                if one._cdata not in given:
                    self._add(one)
        if self.live > self.peak:
            self.peak = self.live
        if self.live > max(self._last + STEP, self._last * SHARE) or self._last < 0:
            self._last = self.live
            self._told()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self.live -= size

        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, gone)
            self.live += size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()


def allocated_peak(work: Callable[[], object]) -> int:
    """Most bytes that `work` had allocated from torch on the CPU at any time, all of it counted."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as seen:
        work()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            live += event.nbytes()
            peak = max(peak, live)
    return peak
