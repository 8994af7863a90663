"""Products of few rows with 4-bit, int8 and fp8 weights: bound by the bytes of the weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from compresskit_kernels import fp8_matmul, grouped_matmul, int8_matmul
from compresskit_kernels.packing import pack

from benchmarks.gpu import peers, shapes
from benchmarks.gpu.stages import products

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.arms import Entry
    from benchmarks.gpu.stages.settings import Settings

GROUP = 128


def entries(settings: Settings) -> Iterator[Entry]:
    """int4 in groups of 128 with offsets, int8 and e4m3 per row, by shape and rows."""
    sizes = shapes.TINY_WEIGHTS if settings.is_dry else shapes.WEIGHTS
    for size in sizes:
        for rows in shapes.TINY_ROWS if settings.is_dry else shapes.ROWS:
            x = products.inputs(settings, rows, size[1])
            yield _int4(settings, x, size)
            yield _int8(settings, x, size)
            yield _fp8(settings, x, size)


def int4_weight(settings: Settings, seed: int, *, size: tuple[int, int]):  # noqa: ANN201
    """A weight about as large as a trained one, asymmetric."""
    codes = settings.randint(0, 16, *size, seed=seed, dtype=torch.uint8)
    grid = settings.randn(2, size[0], -(-size[1] // GROUP), seed=seed + 1000) / 1000
    return grouped_matmul.GroupedWeight(
        pack(codes, 4), grid[0].abs() + 0.002, size[1], GROUP, offsets=grid[1]
    )


def int8_weight(settings: Settings, seed: int, *, size: tuple[int, int]):  # noqa: ANN201
    """One scale a row."""
    codes = settings.randint(-127, 128, *size, seed=seed, dtype=torch.int8)
    return int8_matmul.Int8Weight(codes, settings.randn(size[0], seed=seed).abs() / 1e4 + 1e-4)


def fp8_weight(settings: Settings, seed: int, *, size: tuple[int, int]):  # noqa: ANN201
    """Normal numbers, one scale a row."""
    codes = (100 * settings.randn(*size, seed=seed)).float().clamp(-448, 448)
    scales = settings.randn(size[0], seed=seed).abs() / 1e4 + 1e-4
    return fp8_matmul.Fp8Weight(codes.to(torch.float8_e4m3fn), scales)


def _int4(settings: Settings, x: torch.Tensor, size: tuple[int, int]) -> Entry:
    make = partial(int4_weight, settings, size=size)
    held = size[0] * size[1] // 2 + size[0] * -(-size[1] // GROUP) * 4
    moved = held + x.element_size() * x.shape[0] * sum(size)
    arms = (
        products.ours(grouped_matmul.OP, x, make, held, settings.impl),
        peers.tinygemm(x, make, moved),
        peers.gemlite(x, make, moved),
        peers.bitsandbytes_nf4(x, make, moved),
        peers.torchao(
            x, make, moved, "Int4WeightOnlyConfig", group_size=GROUP,
            int4_packing_format="tile_packed_to_4d",
        ),
    )  # fmt: skip
    return products.entry(grouped_matmul.OP, x, make, size, arms, bits=4, G=GROUP)


def _int8(settings: Settings, x: torch.Tensor, size: tuple[int, int]) -> Entry:
    make = partial(int8_weight, settings, size=size)
    held = size[0] * size[1] + size[0] * 2
    moved = held + x.element_size() * x.shape[0] * sum(size)
    arms = (
        products.ours(int8_matmul.OP, x, make, held, settings.impl),
        peers.int8pack(x, make, moved),
        peers.torchao(x, make, moved, "Int8WeightOnlyConfig"),
    )
    return products.entry(int8_matmul.OP, x, make, size, arms)


def _fp8(settings: Settings, x: torch.Tensor, size: tuple[int, int]) -> Entry:
    make = partial(fp8_weight, settings, size=size)
    held = size[0] * size[1] + size[0] * 2
    arms = (products.ours(fp8_matmul.OP, x, make, held, settings.impl),)
    return products.entry(fp8_matmul.OP, x, make, size, arms)
