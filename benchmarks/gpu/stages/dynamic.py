"""Products of many rows with activations rounded on the way: bound by the arithmetic."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from compresskit_kernels import fp8_dynamic_matmul, int8_dynamic_matmul

from benchmarks.gpu import peers, shapes
from benchmarks.gpu.stages import products
from benchmarks.gpu.stages.weight_only import fp8_weight, int8_weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.arms import Entry
    from benchmarks.gpu.stages.settings import Settings

ROUNDED = 6e-2
"""What rounding the activations may change: 2^-4 of a number in e4m3, less in int8."""


def entries(settings: Settings) -> Iterator[Entry]:
    """W8A8 in int8 and in e4m3, one step a token; rounding and scaling are part of the time."""
    for size in shapes.TINY_WEIGHTS if settings.is_dry else shapes.LARGE:
        for rows in shapes.TINY_ROWS if settings.is_dry else shapes.MANY_ROWS:
            x = products.inputs(settings, rows, size[1])
            held = size[0] * size[1] + size[0] * 2
            moved = held + x.element_size() * x.shape[0] * sum(size)
            make = partial(int8_weight, settings, size=size)
            arms = (
                products.ours(int8_dynamic_matmul.OP, x, make, held, settings.impl),
                peers.int_mm(x, make, moved),
                peers.torchao(x, make, moved, "Int8DynamicActivationInt8WeightConfig"),
            )
            yield products.entry(int8_dynamic_matmul.OP, x, make, size, arms, ROUNDED)
            make = partial(fp8_weight, settings, size=size)
            # Its product is torch's own: what is ours around it is the rounding.
            impl = "reference" if settings.is_dry else "auto"
            arms = (
                products.ours(fp8_dynamic_matmul.OP, x, make, held, impl),
                peers.scaled_mm(x, make, moved),
            )
            yield products.entry(fp8_dynamic_matmul.OP, x, make, size, arms, ROUNDED)
