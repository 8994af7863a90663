"""Static caches whose tensors lie where those of the last request lay.

    request 1   new tensors ──► its cache ──► freed with it ──► kept, by shape
    request 2   kept tensors ──► its cache ...

A CUDA graph reads and writes at fixed addresses. With a cache made anew the graph of a decode step would be
recorded once more for every request that lands elsewhere in memory, inside the time that is measured, and
torch gives up on graphs after too many of these. So what a finished request held is handed to the next one of the
same shape; two requests at a time get tensors of their own. Old numbers stay in them: whatever lies behind
a cache's length is masked.

The tensors stay allocated, one set for each shape that was ever used.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from compresskit.hf.cache import FixedLayer, static

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

_NAMES = ("keys", "values", "cumulative_length")


class Kept:
    """Tensors of finished requests, by the place and shape that they fit."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.free: defaultdict[tuple[Any, ...], list[tuple[torch.Tensor, ...]]] = defaultdict(list)

    def cache(self, config: PreTrainedConfig, capacity: int) -> Cache:
        """As `static`, on kept tensors where there are any; windows are made anew."""
        cache = static(config, capacity)
        for place, layer in enumerate(cache.layers):
            if type(layer) is FixedLayer:
                cache.layers[place] = KeptLayer(capacity, self, place)
        return cache


class KeptLayer(FixedLayer):
    """A preallocated layer that takes its tensors from `Kept` and leaves them there."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int, kept: Kept, place: int) -> None:
        """Hold nothing before the first `update`, which tells the shape."""
        super().__init__(max_cache_len=capacity)
        self._kept, self._place = kept, place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate as transformers does, then change over to kept tensors, if some fit."""
        super().lazy_initialization(key_states, value_states)
        shape = (self.keys.shape, self.values.shape, self.keys.dtype, self.keys.device)
        free = self._kept.free[(self._place, *shape)]
        if free:
            self.keys, self.values, self.cumulative_length = free.pop()
            self.cumulative_length.zero_()
        held = tuple(getattr(self, name) for name in _NAMES)
        weakref.finalize(self, free.append, held).atexit = False
