"""Keys quantised per channel, values per token, the newest tokens not at all.

                 codes, append-only                      tail, full precision
    keys    | group tokens | group tokens | ...        | up to `residual` tokens |
              one scale and minimum per channel          flushed together when it is full
    values  | token | token | token | ...              | the newest `residual`   |
              one scale and minimum per `group` channels leave one at a time

A channel of the keys has outliers in every token, so its numbers share a scale along the tokens;
values have no such channels. What is coded once is never coded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, final

import torch
from compresskit_kernels.kv_decode import MOST_QUERIES, Kind, Rows, empty, kv_extend, quantise
from pydantic import Field, JsonValue, model_validator

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import TOKENS
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._coded import EFFECTS, CodedLayer, Form, check_groups, head_dim
from compresskit.methods.kv._layers import install
from compresskit.methods.kv._wrapped import unpadded
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.hf.attention import Call
    from compresskit.system import System
    from compresskit.traits import Effects

GRID = torch.float16
"""Type of scales and minima: a minimum far from zero needs more digits than bfloat16 has; what is
beyond its range is cut off at 65504."""
GROUPS = {4: 64, 2: 32}
"""Bits -> default group: 5 and 3.5 bits or less a number at the models' usual head dimensions."""


class KiviLayer(CodedLayer):
    """Two sides, each a run of codes and a tail behind it."""

    tensors = (
        "keys", "key_scales", "key_offsets", "key_tail",
        "values", "value_scales", "value_offsets", "value_tail",
    )  # fmt: skip
    # Which values are still exact depends on how many tokens came after them.
    is_croppable = False

    key_tail: torch.Tensor
    value_tail: torch.Tensor

    def __init__(
        self,
        config: Any,
        *,
        bits: Literal[2, 4],
        group: int,
        residual: int,
        exact_prefill: bool = True,
    ) -> None:
        """Hold nothing yet.

        Args:
            config: of the model.
            bits: of a code.
            group: tokens that share a scale of the keys, and channels that share one of the values.
            residual: tokens of the tails, a multiple of the group.
            exact_prefill: whether a pass of many tokens sees its own ones before rounding.
        """
        kind = cast("Kind", f"int{bits}")
        super().__init__(config, keys=Form(kind, span=group), values=Form(kind))
        self.kind, self.group, self.residual = kind, group, residual
        self.exact_prefill = exact_prefill

    def encode_keys(self, keys: torch.Tensor) -> Rows:
        """A scale and a minimum per channel of `group` tokens."""
        return quantise(keys, self.kind, span=self.group, dtype=GRID)

    def encode_values(self, values: torch.Tensor) -> Rows:
        """A scale and a minimum per token of `group` channels."""
        return quantise(values, self.kind, group=self.group, dtype=GRID)

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put new rows behind the tails; code what is too much for them."""
        if self.keys is None:
            self._begin(keys)
        self.append(key_tail=keys, value_tail=values)
        full = self.key_tail.shape[TOKENS] // self.residual * self.residual
        if full:
            self.put(key=self.encode_keys(self.key_tail[..., :full, :]))
            # A copy: a view would keep what was coded in memory.
            self.key_tail = self.key_tail[..., full:, :].clone()
        over = self.value_tail.shape[TOKENS] - self.residual
        if over > 0:
            coded = replace(self.rows("value"), tail=None)
            self.hold("value", kv_extend(coded, self.value_tail[..., :over, :], group=self.group))
            self.value_tail = self.value_tail[..., over:, :].clone()

    def _begin(self, x: torch.Tensor) -> None:
        batch, heads, _, width = x.shape
        check_groups("kv/kivi", width, self.group)
        shape = batch, heads, 0, width
        self.hold("key", empty(self.kind, shape, group=1, dtype=GRID, device=x.device))
        self.hold("value", empty(self.kind, shape, group=self.group, dtype=GRID, device=x.device))

    def over_rows(self, call: Call) -> Call:
        """As the base class, but for the rows of this pass if they are to be seen exactly."""
        new = call.query.shape[2]
        if not self.exact_prefill or new <= MOST_QUERIES:
            return super().over_rows(call)
        if new == self.get_seq_length():
            return call
        keys, values = self.read_keys(), self.read_values()
        keys[..., -new:, :], values[..., -new:, :] = call.keys, call.values
        return call.over(keys, values, call.mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest rows, while nothing is coded.

        Raises:
            RunError: values have been coded that would be exact again, or keys.
        """
        if self.keys is not None and (self.keys.shape[TOKENS] or self.values.shape[TOKENS]):
            raise RunError(
                "kv/kivi cannot take tokens back: those that would be the newest again have been "
                "rounded already. Use kv/int8 or kv/fp8 with speculative decoding."
            )
        if tokens_to_remove > 0:
            raise RunError(f"crop takes minus the tokens to remove, not {tokens_to_remove}.")
        if tokens_to_remove and self.keys is not None:
            self.key_tail = self.key_tail[..., :tokens_to_remove, :]
            self.value_tail = self.value_tail[..., :tokens_to_remove, :]


@final
class Kivi(AbstractMethod):
    """Code keys per channel and values per token in 2 or 4 bits; keep the newest tokens as they are.

    Paper: Liu et al. 2024, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache,
    arXiv 2402.02750.
    Differs: the defaults are a residual of 64 and, at 4 bits, groups of 64 (paper: 128 and 32).
    In a pass of up to 8 tokens attention reads the new tokens as they are stored, which for keys is
    as codes in the pass that fills the tail. Sliding-window layers stay as they are.
    Cost: `bits / 8 + 4 / group` bytes a number, and 2 or 4 in the tails: at 4096 tokens and the
    defaults 3.5 times (4 bits) and 5.2 times (2 bits) less than bfloat16. Every step moves the
    tail of the values by one token. A pass of more than 8 tokens behind others writes a
    full-precision copy of one layer's cache at a time.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"bits": 4, "group": 16, "residual": 32}

    bits: Literal[2, 4] = 4
    """Bits of a code."""
    group: int = Field(0, ge=0)
    """Tokens (keys) or channels (values) that share a scale and a minimum; it divides the head
    dimension. 0: 64 at 4 bits, 32 at 2 bits, or the head dimension if that is smaller."""
    residual: int = Field(64, ge=1)
    """Newest tokens in full precision: all of them for values, fewer than this for keys; a multiple
    of the group."""
    prefill: Literal["exact", "stored"] = "exact"
    """What a pass of more than 8 tokens, such as a prompt, sees of its own tokens. exact: what they
    were before rounding, as in the paper; a text scored in one pass then shows no error at all.
    stored: what later tokens will see."""

    @model_validator(mode="after")
    def _flushes_whole_groups(self) -> Self:
        if self.group and self.residual % self.group:
            raise ValueError(
                f"a residual of {self.residual} tokens is no multiple of the group of {self.group}, "
                "in which keys are coded; choose one that is"
            )
        return self

    def effects(self) -> Effects:
        """Every token is there, but those coded cannot become exact again.

        Padding would take part in the groups of the keys, and move their borders.
        """
        removes = EFFECTS.removes | {Trait.ROLLBACK, Trait.PADDED_BATCH}
        return EFFECTS.model_copy(update={"removes": removes})

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a KIVI cache."""
        config = system.model.config
        width = head_dim(config)
        group = self.group or min(GROUPS[self.bits], width)
        check_groups("kv/kivi", width, group)
        if self.residual % group:  # the default group is known only now
            raise Conflict(
                f"kv/kivi: a residual of {self.residual} tokens is no multiple of the group of "
                f"{group}, in which keys are coded; choose one that is."
            )
        changed = install(
            system,
            lambda index: KiviLayer(
                config,
                bits=self.bits,
                group=group,
                residual=self.residual,
                exact_prefill=self.prefill == "exact",
            ),
            cache=(
                f"{self.bits}-bit codes, keys per channel and values per token in groups of {group}, "
                f"the newest {self.residual} tokens in full precision"
            ),
            nominal={"bits": self.bits},
        )
        return unpadded(changed, "kv/kivi")
