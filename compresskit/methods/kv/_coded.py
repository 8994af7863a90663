"""A cache layer that holds codes, and attention that reads them as codes.

    update(k, v)   encode ──► codes, scales, offsets (append-only) [+ a tail of floats]
    attend(call)   up to 8 new tokens:  kv_decode over the codes, no full-precision copy
                   longer passes:       dequantise once, torch's attention over that

A method names the attributes that it holds, and says how new rows are encoded (`encode_keys`,
`encode_values`); it may turn the queries before attention and what comes out after it (a rotation
of the keys and values), or read its keys in a way of its own (`read_keys`, with `fused` off).
"""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from compresskit_kernels.kv_decode import (
    MOST_QUERIES,
    Kind,
    Rows,
    empty,
    kv_decode,
    kv_extend,
    quantise,
)

from compresskit.errors import Conflict, RunError
from compresskit.hf import attention
from compresskit.hf.cache import TOKENS, Layer, hand
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.hf.attention import Call

Side = Literal["key", "value"]
FUSED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of queries that read codes; float64 (a reference) takes the dense way and stays exact."""

SCALES = torch.bfloat16
"""Type of a scale per token: the range of float32, so that no row is too large or too small for it.
Codes are fitted to the scale as it is stored, which costs no accuracy."""


EFFECTS = Effects(
    requires=frozenset({Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.ATTENTION_HOOK}),
    removes=frozenset({Trait.DENSE_CACHE, Trait.STATIC_SHAPES, Trait.LOSSLESS}),
)
"""Floats are gone, but every token is there and the last ones can be taken back."""


class Form(NamedTuple):
    """What the tensors of one side mean, beside the tensors; see `kv_decode.cache.Rows`."""

    kind: Kind
    table: torch.Tensor | None = None
    span: int = 1


def named(side: Side, role: str) -> str:
    """The attribute of a layer that holds this tensor of `Rows`: `keys`, `key_scales`, ..."""
    return f"{side}s" if role == "codes" else f"{side}_{role}"


SIDES: tuple[Side, Side] = ("key", "value")
ROLES = ("codes", "scales", "offsets", "tail")
NAMES = {side: tuple(named(side, role) for role in ROLES) for side in SIDES}


class AnsweringLayer(Layer):
    """A layer that hands out new rows alone and answers attention itself over what it stores."""

    def __init__(self, config: Any) -> None:
        """Hold nothing yet.

        Args:
            config: of the model: its attention must be ours, or it would see new rows only.
        """
        super().__init__()
        self.config = config

    @abstractmethod
    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new rows `[B, K, T, D]`; `get_seq_length()` is the position of the first."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new rows; hand out them alone: `attend` reads the others as they are stored.

        Raises:
            RunError: the model's attention is not ours and would take the new rows for all.
        """
        if self.config._attn_implementation != attention.NAME:
            raise RunError(
                f"a cache of codes needs the attention function {attention.NAME!r}, but the model "
                f"attends with {self.config._attn_implementation!r} now. Do not change the "
                "attention of a model after a cache method was applied to it."
            )
        self.lazy_initialization(key_states, value_states)
        self.store(key_states, value_states)
        return hand(self, key_states), value_states


class CodedLayer(AnsweringLayer):
    """Append-only codes of keys and values; a subclass encodes.

    Tensors (of which a subclass names those that it has): `keys` and `values` (codes), `key_scales`,
    `key_offsets`, `key_tail`, and the same of the values; shapes as in `kv_decode.cache.Rows`.
    """

    tensors: ClassVar[tuple[str, ...]] = ("keys", "values", "key_scales", "value_scales")
    holds = MappingProxyType(
        {
            "keys": "codes",
            "values": "codes",
            **{
                f"{side}_{role}": kind
                for side in ("key", "value")
                for role, kind in (
                    ("scales", "scales"),
                    ("offsets", "scales"),
                    ("tail", "residual"),
                )
            },
        }
    )

    fused: ClassVar[bool] = True
    """Whether `decode` may read the codes; off: `read_keys` and `read_values` always."""

    def __init__(self, config: Any, *, keys: Form, values: Form) -> None:
        """Hold nothing yet.

        Args:
            config: of the model.
            keys: what the tensors of the keys mean.
            values: as the keys.
        """
        super().__init__(config)
        self.forms: Mapping[Side, Form] = {"key": keys, "value": values}

    @abstractmethod
    def encode_keys(self, keys: torch.Tensor) -> Rows:
        """Encode new rows `[B, K, T, D]`, rotated by their positions; `get_seq_length()` is the first."""

    @abstractmethod
    def encode_values(self, values: torch.Tensor) -> Rows:
        """Encode new rows `[B, K, T, D]`."""

    def turn(self, query: torch.Tensor) -> torch.Tensor:
        """Bring queries `[B, H, T, D]` to the basis that keys are stored in."""
        return query

    def turn_back(self, out: torch.Tensor) -> torch.Tensor:
        """Bring `[B, T, H, D]` from the basis that values are stored in to the model's."""
        return out

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append the codes of new rows."""
        # Both are encoded before either is appended: encoders may ask for `get_seq_length`.
        self.put(key=self.encode_keys(keys), value=self.encode_values(values))

    def put(self, **sides: Rows) -> None:
        """Append encoded rows."""
        for side, rows in sides.items():
            self.append(
                **{named(side, role): held for role, held in rows.tensors().items()}  # type: ignore[arg-type]
            )

    def hold(self, side: Side, rows: Rows) -> None:
        """Take `rows` for all rows of one side."""
        for role, held in rows.tensors().items():
            setattr(self, named(side, role), held)

    def rows(self, side: Side) -> Rows:
        """All rows of one side as they are stored, without a copy."""
        form = self.forms[side]
        held: list[Any] = [getattr(self, name, None) for name in NAMES[side]]
        codes, scales, offsets, tail = held
        return Rows(form.kind, codes, scales, offsets, form.table, form.span, tail)

    def read_keys(self) -> torch.Tensor:
        """All keys `[B, K, S, D]` in the model's type, in the basis of `turn`ed queries."""
        return self.rows("key").dequantise().to(self.dtype)

    def read_values(self) -> torch.Tensor:
        """All values `[B, K, S, D]` in the model's type, as they are stored."""
        return self.rows("value").dequantise().to(self.dtype)

    def attend(self, call: Call) -> torch.Tensor:
        """Attend over all rows as they are stored, those of this pass included: `[B, T, H, D]`."""
        if self.fused and call.query.dtype in FUSED:
            readable, mask = _slots_seen(call)
            if readable:
                return self.decode(call.query, mask, call.scale).transpose(1, 2)
        query = self.turn(call.query)
        return self.turn_back(self.over_rows(call._replace(query=query)).dense())

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Attend with a few queries `[B, H, Q, D]`, not turned yet, over the codes; the same shape."""
        return kv_decode(query, self.rows("key"), self.rows("value"), mask=mask, scale=scale)

    def over_rows(self, call: Call) -> Call:
        """The call over all rows as they are stored, in full precision."""
        return call.over(self.read_keys(), self.read_values(), call.mask)

    def get_seq_length(self) -> int:
        """Tokens held: codes, and what is not coded yet."""
        tail = getattr(self, "key_tail", None)
        return super().get_seq_length() + (0 if tail is None else tail.shape[TOKENS])


class PerTokenLayer(CodedLayer):
    """A scale per token and head; a token is quantised once, when it arrives, and never again."""

    def __init__(self, config: Any, kind: Literal["int8", "fp8"]) -> None:
        """Hold nothing yet."""
        super().__init__(config, keys=Form(kind), values=Form(kind))
        self.kind: Kind = kind

    def encode_keys(self, keys: torch.Tensor) -> Rows:
        """Fit the codes of each row to its scale as it is stored."""
        return quantise(keys, self.kind, dtype=SCALES)

    def encode_values(self, values: torch.Tensor) -> Rows:
        """As the keys."""
        return self.encode_keys(values)

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As the base class, in one pass over old and new rows."""
        for side, x in zip(SIDES, (keys, values), strict=True):
            self.hold(side, kv_extend(self.held(side, x), x))

    def held(self, side: Side, x: torch.Tensor) -> Rows:
        """The rows of one side, or none in the shape of the new rows x."""
        if getattr(self, named(side, "codes")) is not None:
            return self.rows(side)
        batch, heads, _, width = x.shape
        return empty(self.kind, (batch, heads, 0, width), dtype=SCALES, device=x.device)


def _slots_seen(call: Call) -> tuple[bool, torch.Tensor | None]:
    """Whether `kv_decode` can say what the call sees, and the slots `[B, S]` that it does see."""
    new, mask = call.query.shape[2], call.mask
    if new > MOST_QUERIES or call.rest.get("position_bias") is not None:
        return False, None
    if mask is None:
        return True, None
    if mask.dtype is not torch.bool or mask.shape[1] != 1:
        return False, None
    slots = mask[:, 0, -1]
    if new == 1:
        return True, slots
    if mask.device.type != "cpu":  # comparing would wait for the device, in every layer
        return False, None
    causal = torch.ones(mask.shape[2:], dtype=torch.bool).tril(mask.shape[3] - new)
    return torch.equal(mask[:, 0], slots[:, None] & causal), slots


def check_groups(method: str, width: int, group: int) -> None:
    """Raise Conflict unless rows of `width` numbers split into groups.

    Raises:
        Conflict: they do not.
    """
    if width % group:
        raise Conflict(
            f"{method}: groups of {group} do not divide the model's head dimension of {width}; "
            "choose a group that does."
        )


def head_dim(config: Any) -> int:
    """Numbers in a row of the cache."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
