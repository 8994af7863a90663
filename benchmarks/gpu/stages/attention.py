"""Decoding over a quantised cache against torch's attention over a bfloat16 one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from compresskit_kernels.kv_decode import Kind, Rows, kv_decode, quantise
from torch.nn import functional

from benchmarks.gpu import shapes
from benchmarks.gpu.arms import OURS, Absent, Arm, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu.shapes import Cache
    from benchmarks.gpu.stages.settings import Settings

SDPA = "torch SDPA enable_gqa bf16"
LIMIT = 1.5e-2


class Format(NamedTuple):
    """A stored form: group of each scale (None: the row) and bytes of a row of D numbers."""

    kind: Kind
    group: int | None
    row_bytes: Callable[[int], int]


FORMATS = (
    Format("int8", None, lambda width: width + 2),
    Format("fp8", None, lambda width: width + 2),
    Format("int4", 64, lambda width: width // 2 + max(1, width // 64) * 4),
)
"""Scales, and offsets of int4, are float16."""


def entries(settings: Settings) -> Iterator[Entry]:
    """One entry a cache; its formats are arms."""
    for shape in shapes.TINY_CACHES if settings.is_dry else shapes.CACHES:
        yield _entry(settings, shape)


def _entry(settings: Settings, shape: Cache) -> Entry:
    q = settings.randn(shape.batch, shape.heads, shape.queries, shape.width, seed=1)
    rows = shape.batch * shape.kv_heads * shape.context * 2
    around = 2 * q.nbytes
    new = torch.arange(shape.queries, device=q.device).unsqueeze(1)
    at = torch.arange(shape.context, device=q.device)
    causal = None if shape.queries == 1 else at <= shape.context - shape.queries + new

    def dense(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (shape.batch, shape.kv_heads, shape.context, shape.width)
        return settings.randn(*size, seed=2 * seed + 2), settings.randn(*size, seed=2 * seed + 3)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)

    def sdpa(copies: int) -> list[Callable[[], torch.Tensor]]:
        return [partial(attend, q, *dense(i)) for i in range(copies)]

    def grouped(copies: int) -> list[Callable[[], torch.Tensor]]:
        if shape.queries > 1:
            raise Absent("the heads of a group see the same slots with one query only")
        # One new token sees everything: the heads of a group may pose as its queries.
        as_rows = q.view(shape.batch, shape.kv_heads, -1, shape.width)
        pairs = [dense(i) for i in range(copies)]
        return [partial(functional.scaled_dot_product_attention, as_rows, *pair) for pair in pairs]

    def stored(form: Format, seed: int) -> tuple[Rows, Rows]:
        k, v = dense(seed)
        group = None if form.group is None else min(form.group, shape.width)
        return (
            quantise(k, form.kind, group=group, dtype=torch.float16),
            quantise(v, form.kind, group=group, dtype=torch.float16),
        )

    def ours(form: Format, copies: int) -> list[Callable[[], torch.Tensor]]:
        return [partial(kv_decode, q, *stored(form, i), impl=settings.impl) for i in range(copies)]

    def reference(form: Format) -> torch.Tensor:
        return kv_decode(q, *stored(form, 0), impl="reference")

    bf16 = rows * shape.width * 2 + around
    arms = [
        Arm(SDPA, sdpa, bf16, LIMIT),
        Arm("torch SDPA, heads as queries", grouped, bf16, LIMIT, observe=lambda y: y.view_as(q)),
    ]
    for form in FORMATS:
        moved = rows * form.row_bytes(shape.width) + around
        arms.append(
            Arm(
                f"{OURS} {settings.impl} {form.kind}",
                partial(ours, form),
                moved,
                LIMIT,
                expected=partial(reference, form),
            )
        )

    def expected() -> torch.Tensor:
        k, v = dense(0)
        return attend(q.float(), k.float(), v.float())

    named = {"B": shape.batch, "S": shape.context, "Q": shape.queries, "D": shape.width,
             "H": shape.heads, "heads": shape.kv_heads}  # fmt: skip
    return Entry("kv_decode", named, expected, tuple(arms), SDPA)
