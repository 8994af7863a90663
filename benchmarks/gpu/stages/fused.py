"""Small steps in one launch: rotate, quantise and append; norm and round. Against eager chains."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from compresskit_kernels.activations import Rounded, round_rows
from compresskit_kernels.kv_decode import Rows, empty
from compresskit_kernels.norm_quantise import norm_quantise
from compresskit_kernels.rope_append import rope_append
from torch.nn import functional

from benchmarks.gpu import shapes
from benchmarks.gpu.arms import OURS, Arm, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu.stages.settings import Settings

HEADS, KV_HEADS, WIDTH, SLOTS = 32, 8, 128, 1024
EAGER = "torch eager"
LIMIT = 1e-2


def entries(settings: Settings) -> Iterator[Entry]:
    """Appending of int8 and int4 rows, then the norm."""
    for batch, tokens in ((1, 2),) if settings.is_dry else shapes.APPENDED:
        for kind in ("int8", "int4"):
            yield _append(settings, batch, tokens, kind)
    for rows, width in shapes.TINY_NORMED if settings.is_dry else shapes.NORMED:
        yield _norm(settings, rows, width)


def _append(settings: Settings, batch: int, tokens: int, kind: Any) -> Entry:
    q = settings.randn(batch, HEADS, tokens, WIDTH, seed=1)
    k = settings.randn(batch, KV_HEADS, tokens, WIDTH, seed=2)
    v = settings.randn(batch, KV_HEADS, tokens, WIDTH, seed=3)
    angle = 6 * settings.randn(1, tokens, WIDTH // 2, seed=4, dtype=torch.float32)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    starts = torch.full((batch,), SLOTS // 2, dtype=torch.int32, device=settings.device)
    group = 64 if kind == "int4" else None

    def cache() -> tuple[Rows, Rows]:
        size = (batch, KV_HEADS, SLOTS, WIDTH)
        keys, values = (
            empty(kind, size, group=group, dtype=torch.float16, device=settings.device)
            for _ in range(2)
        )
        return keys, values

    def arm(name: str, impl: str) -> Arm:
        first: list[tuple[Rows, Rows]] = []

        def build(copies: int) -> list[Callable[[], torch.Tensor]]:
            made = [cache() for _ in range(copies)]
            first[:] = made[:1]
            return [
                partial(rope_append, q, k, v, cos, sin, *pair, starts, impl=impl) for pair in made
            ]

        def observe(turned: torch.Tensor) -> torch.Tensor:
            written = [side.dequantise()[:, :, SLOTS // 2 :].flatten() for side in first[0]]
            return torch.cat([turned.float().flatten(), *written])

        return Arm(name, build, moved, LIMIT, observe=observe)

    row = WIDTH + 2 if kind == "int8" else WIDTH // 2 + 8
    moved = 2 * q.nbytes + 2 * k.nbytes + 2 * batch * KV_HEADS * tokens * row
    baseline = arm(EAGER, "reference")

    def expected() -> torch.Tensor:
        return baseline.observe(baseline.build(1)[0]())

    arms = (baseline, arm(f"{OURS} {settings.impl}", settings.impl))
    named: dict[str, int | str] = {"kind": kind, "B": batch, "T": tokens}
    return Entry("rope_append", named, expected, arms, EAGER, resident=True)


def _norm(settings: Settings, rows: int, width: int) -> Entry:
    weight = settings.randn(width, seed=1)

    def x(seed: int) -> torch.Tensor:
        return settings.randn(rows, width, seed=seed + 2)

    def eager(x: torch.Tensor) -> Rounded:
        return round_rows(functional.rms_norm(x, (width,), weight, 1e-6))

    def chain(copies: int) -> list[Callable[[], Rounded]]:
        return [partial(eager, x(i)) for i in range(copies)]

    def fused(copies: int) -> list[Callable[[], Rounded]]:
        return [partial(norm_quantise, x(i), weight, impl=settings.impl) for i in range(copies)]

    def expected() -> torch.Tensor:
        return norm_quantise(x(0), weight, impl="reference").dequantise()

    moved = rows * width * 3 + rows * 4 + width * 2
    arms = (
        Arm(EAGER, chain, moved, LIMIT, observe=Rounded.dequantise),
        Arm(f"{OURS} {settings.impl}", fused, moved, LIMIT, observe=Rounded.dequantise),
    )
    named: dict[str, int | str] = {"M": rows, "K": width}
    return Entry("norm_quantise", named, expected, arms, EAGER, resident=rows < 1024)
