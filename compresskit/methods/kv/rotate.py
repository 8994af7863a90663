"""Keys and values turned by a random rotation, then coded with the best levels for normal numbers.

    x [B, K, T, D] ──► y = x @ turn * sqrt(D) / |x|      numbers that look standard normal
                           │
                  codes = nearest Lloyd-Max level of y, 2 to 4 bits      one bfloat16 factor a row

    attention      q @ turn ──► kv_decode over the codes ──► out @ turn^T

The rotation keeps lengths and inner products, so the cache is never turned back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, final

import torch
from compresskit_kernels.kv_decode import Kind as CodeKind, Rows, quantise
from compresskit_kernels.kv_decode.planes import level_codes, pack, packed_width
from compresskit_kernels.kv_decode.turned import kv_decode_turned, kv_extend_turned, scaled
from pydantic import Field, JsonValue

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import Layer
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._coded import (
    EFFECTS,
    SCALES,
    SIDES,
    CodedLayer,
    Form,
    Side,
    head_dim,
    named,
)
from compresskit.methods.kv._layers import install
from compresskit.methods.kv._lloyd import normal
from compresskit.methods.kv._rotation import Kind, rotation

if TYPE_CHECKING:
    from compresskit.system import System
    from compresskit.traits import Effects

Bits = Literal[2, 3, 4, 8]
Factor = Literal["norm", "length", "product"]
SHARE = 8
"""At most one layer in so many is kept at each end: shallow models would keep everything."""


def form(bits: Bits, device: torch.device) -> Form:
    """How rows of that many bits are stored; 8 bits need no table, evenly spaced levels do."""
    kind = cast("CodeKind", f"int{bits}")
    return Form(kind, None if bits == 8 else torch.tensor(normal(bits), device=device))


def encode(x: torch.Tensor, turn: torch.Tensor, form: Form, factor: Factor) -> Rows:
    """Code rows `x` `[B, K, T, D]` after turning them by `turn` `[D, D]`.

    What multiplies the levels c of a row, y being the row turned and scaled to variance one:

    norm      |x| / sqrt(D)                the paper's: rows come back shorter than they were
    length    |x| / |c|                    rows come back as long as they were
    product   |x| sqrt(D) / (y . c)        the product with x itself comes back, and so, in the mean
                                           over rotations, the product with every query
    """
    turned = x.float() @ turn
    if form.table is None:
        return quantise(turned, form.kind, dtype=SCALES)
    length, unit_variance = scaled(turned)
    by = length / x.shape[-1] ** 0.5
    codes = level_codes(unit_variance, form.table)
    if factor != "norm":
        levels = form.table[codes.long()]
        unit = (
            turned / length if factor == "product" else levels / levels.norm(dim=-1, keepdim=True)
        )
        along = (unit * levels).sum(-1, keepdim=True)
        # Levels have the signs of their numbers: only a row of zeros has no product with them.
        by = torch.where(along > 0, length / along, length)
    return Rows(form.kind, pack(codes, form.kind), by.to(SCALES), table=form.table)


class RotateLayer(CodedLayer):
    """Append-only codes of turned rows: a token is coded once, by itself."""

    holds = MappingProxyType({**CodedLayer.holds, "forms": "tables", "by": "tables"})

    def __init__(
        self,
        config: Any,
        by: torch.Tensor,
        factor: Factor,
        *,
        keys: Form,
        values: Form,
    ) -> None:
        """Hold nothing yet; `by` `[D, D]` is the rotation, which all layers share."""
        super().__init__(config, keys=keys, values=values)
        self.by = by
        self.factor: Factor = factor

    def encode_keys(self, keys: torch.Tensor) -> Rows:
        """As the module says."""
        return self._encode(keys, self.forms["key"])

    def encode_values(self, values: torch.Tensor) -> Rows:
        """As the keys."""
        return self._encode(values, self.forms["value"])

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As the base class, or in one pass over old and new rows where the factor is the norm."""
        tables = [self.forms[side].table for side in SIDES]
        if self.factor == "norm" and all(table is not None for table in tables):
            self._check(keys)
            for side, x in zip(SIDES, (keys, values), strict=True):
                self.hold(side, kv_extend_turned(self._held(side, x), x, self.by))
            return
        form = self.forms["key"]
        if form is not self.forms["value"] or keys.shape != values.shape:
            super().store(keys, values)
            return
        both = self._encode(torch.cat((keys, values)), form)
        for side, codes, scales in zip(
            SIDES, both.codes.chunk(2), both.scales.chunk(2), strict=True
        ):
            self.put(**{side: replace(both, codes=codes, scales=scales)})

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """As the base class, turning inside."""
        keys, values = self.rows("key"), self.rows("value")
        return kv_decode_turned(query, keys, values, self.by, mask=mask, scale=scale)

    def turn(self, query: torch.Tensor) -> torch.Tensor:
        """Turn queries as the keys were."""
        return (query.float() @ self.by).to(query.dtype)

    def turn_back(self, out: torch.Tensor) -> torch.Tensor:
        """Turn the mean of the values back."""
        return (out.float() @ self.by.T).to(out.dtype)

    def _held(self, side: Side, x: torch.Tensor) -> Rows:
        """The rows of one side, or none in the shape of the new rows x."""
        if getattr(self, named(side, "codes")) is not None:
            return self.rows(side)
        form, (batch, heads, _, width) = self.forms[side], x.shape
        codes = x.new_empty((batch, heads, 0, packed_width(width, form.kind)), dtype=torch.uint8)
        scales = x.new_empty((batch, heads, 0, 1), dtype=SCALES)
        return Rows(form.kind, codes, scales, table=form.table)

    def _encode(self, x: torch.Tensor, form: Form) -> Rows:
        self._check(x)
        return encode(x, self.by, form, self.factor)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] != len(self.by):
            raise RunError(
                f"kv/rotate: a head has {x.shape[-1]} numbers where the model's configuration says "
                f"{len(self.by)}; models whose layers differ in that cannot be rotated."
            )


class KeptLayer(Layer):
    """A layer that is kept as it is."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return everything."""
        self.lazy_initialization(key_states, value_states)
        self.append(keys=key_states, values=value_states)
        return self.keys, self.values


@final
class Rotate(AbstractMethod):
    """Rotate keys and values at random and code them in 2 to 4 bits with Lloyd-Max levels.

    Paper: Zandieh et al. 2025, TurboQuant, arXiv 2504.19874 (algorithm 1). The factor `product` is
    the estimator of Gao and Long 2024, RaBitQ, arXiv 2405.12497.
    Differs: the levels are those of the normal distribution at every head dimension, not of a
    coordinate of a random unit vector, which it tends to. No 1-bit sketch of the residual
    (algorithm 2): the factor `product` makes inner products unbiased without one. No channel is
    treated apart. Keys and values have widths of their own; 8 bits are evenly spaced levels.
    Cost: `head_dim * bits / 8 + 2` bytes per row, of which 2 are the factor, and one `D x D` table
    for all layers. Two small products per layer and step turn queries and outputs. Where the kernel
    for codes is not available a step writes a full-precision copy, a stretch at a time.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"key_bits": 4, "value_bits": 3}

    key_bits: Bits = 4
    """Bits of a number of a key: 2, 3, 4 or 8."""
    value_bits: Bits = 4
    """Bits of a number of a value: 2, 3, 4 or 8."""
    rotation: Kind = "orthogonal"
    """orthogonal: any rotation is equally likely. hadamard: random signs and a Hadamard matrix."""
    factor: Factor = "norm"
    """What is stored of a row's size: its norm, or the factor that gives back its length, or its
    product with itself."""
    # Two at each end of 30 layers of SmolLM2-135M at 3 bits: KL 0.260 -> 0.237 nats a token, for
    # half as many bytes again.
    boundary: int = Field(0, ge=0)
    """Layers at each end that stay as they are, but at most an eighth of all."""
    seed: int = Field(0, ge=0)
    """Of the rotation."""

    def effects(self) -> Effects:
        """As of all caches with a scale per token."""
        return EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer between the ends a cache of rotated codes.

        Raises:
            Conflict: the head dimension is not a multiple of 8.
        """
        config = system.model.config
        width, device = head_dim(config), system.device.torch
        if width % 8:
            raise Conflict(
                f"kv/rotate packs a row into whole bytes, and the model's head dimension of {width} "
                "is no multiple of 8. Use another cache method."
            )
        by = rotation(self.rotation, width, self.seed).to(device)
        forms = {bits: form(bits, device) for bits in (self.key_bits, self.value_bits)}
        layers = config.get_text_config().num_hidden_layers
        kept = min(self.boundary, layers // SHARE)

        def make(index: int) -> Layer:
            if kept <= index < layers - kept:
                return RotateLayer(
                    config,
                    by,
                    self.factor,
                    keys=forms[self.key_bits],
                    values=forms[self.value_bits],
                )
            return KeptLayer()

        return install(
            system,
            make,
            cache=f"rotated, keys {self.key_bits} and values {self.value_bits} bits, "
            f"{kept} layers at each end as they are",
            nominal={"bits": (self.key_bits + self.value_bits) / 2},
        )
