"""The stored form of quantised keys or values: codes, their scales, and the newest rows as floats.

    int8              x[s, d] = code * scale                          code -127 to 127
    fp8               x[s, d] = code * scale                          code an e4m3 number
    int4, int3, int2  x[s, d] = code * scale + offset                 code 0 to 2^bits - 1
    with a table      x[s, d] = table[code] * scale (+ offset)        int4, int3 and int2 only

    scale and offset of (s, d) are number (s // span, d // G) of `[B, K, S / span, D / G]`:
    span 1, a group G of a row (int8, fp8, values of KIVI), or span g and G = 1 (its keys).

Sub-byte codes are planes of bits (`planes`), not neighbours: in a plane of b bits a byte j holds
the codes j, j + P, j + 2P ... of a row, P = D * b / 8. So both nibbles of a tile are plain rows to
a kernel, and the two numbers that a rotary embedding mixes lie in one byte.

A scale shared by all tokens is an expanded tensor: it takes part in the formula and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from compresskit_kernels.kv_decode.planes import BITS, level_codes, pack, packed_width, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

Kind = Literal["int8", "int4", "int3", "int2", "fp8"]

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest level of the symmetric kinds."""

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, **dict.fromkeys(BITS, torch.uint8)}
"""Type of the stored codes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Quantised keys or values of B sequences, K heads and S slots, D numbers each."""

    kind: Kind
    codes: torch.Tensor
    """`[B, K, C, D]`, or `[B, K, C, D * bits / 8]` below a byte; type as in `CODES`."""
    scales: torch.Tensor
    """`[B, K, C / span, D / G]`, floating-point and positive."""
    offsets: torch.Tensor | None = None
    """Shape and type of the scales: the value of level 0; kinds below a byte may have it."""
    table: torch.Tensor | None = None
    """Float32 `[2^bits]`, rising: the level of each code; the codes themselves if None."""
    span: int = 1
    """Tokens that share a scale; above 1 every number of a row has one of its own."""
    tail: torch.Tensor | None = None
    """`[B, K, R, D]`, float32 or bfloat16 or float16: the newest rows, not quantised."""

    @classmethod
    def of(cls, kind: Kind, tensors: Iterable[torch.Tensor]) -> Self:
        """Rows of codes, scales and, for kinds that have them, offsets."""
        codes, scales, *offsets = tensors
        return cls(kind, codes, scales, offsets[0] if offsets else None)

    @property
    def width(self) -> int:
        """D."""
        bits = BITS.get(self.kind, 8)
        return self.codes.shape[-1] * 8 // bits

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.scales.shape[-1]

    @property
    def coded(self) -> int:
        """C, the slots held as codes."""
        return self.codes.shape[2]

    @property
    def slots(self) -> int:
        """S, all slots: coded ones, then the tail."""
        return self.coded + (0 if self.tail is None else self.tail.shape[2])

    @property
    def dense(self) -> bool:
        """Whether the numbers of a row lie side by side, and offsets as the scales: kernels want it."""
        return (
            self.codes.stride(-1) == 1
            and (self.groups == 1 or self.scales.stride(-1) == 1)
            and (self.offsets is None or self.offsets.stride() == self.scales.stride())
        )

    @property
    def plain(self) -> bool:
        """Whether every row is evenly spaced codes with scales of its own, and nothing else."""
        return self.span == 1 and self.table is None and self.tail is None

    @property
    def halves(self) -> bool:
        """Whether these are plain rows of a kind that the Triton kernels read: by halves."""
        even = (self.kind == "int4") == (self.offsets is not None)
        return self.plain and even and self.kind in ("int8", "fp8", "int4")

    def levels(self) -> torch.Tensor:
        """The codes' values before scaling, float32 `[B, K, C, D]`."""
        if self.kind not in BITS:
            return self.codes.float()
        codes = unpack(self.codes, self.kind)
        return codes.float() if self.table is None else self.table[codes.long()]

    def dequantise(self) -> torch.Tensor:
        """All slots `[B, K, S, D]`: in float32, or in float64 where the tail is."""
        rows = self._spread(self.levels(), self.scales.float())
        if self.tail is None:
            return rows
        tail = self.tail if self.tail.dtype == torch.float64 else self.tail.float()
        return torch.cat((rows.to(tail.dtype), tail), dim=2)

    def _spread(self, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Levels times scales plus offsets, each number with those of its group."""
        if not levels.numel():
            return levels
        if self.span == 1 and self.groups == 1 and self.offsets is None:
            return levels * scales
        spans, groups = scales.shape[2:]
        whole = levels.reshape(*levels.shape[:2], spans, -1, groups, self.width // groups)
        whole = whole * _each(scales)
        if self.offsets is not None:
            whole = whole + _each(self.offsets)
        return whole.reshape(levels.shape)

    def between(self, start: int, stop: int) -> Rows:
        """Slots start to stop as a view; among the coded ones, multiples of `span`.

        Raises:
            ValueError: the cut would fall inside a span.
        """
        first, last = min(start, self.coded), min(stop, self.coded)
        if first % self.span or last % self.span:
            raise ValueError(f"slots {start} to {stop} cut a span of {self.span} tokens.")
        at = slice(first // self.span, last // self.span)
        tail = self.tail
        if tail is not None:
            tail = tail[:, :, max(start - self.coded, 0) : max(stop - self.coded, 0)]
        return replace(
            self,
            codes=self.codes[:, :, first:last],
            scales=self.scales[:, :, at],
            offsets=None if self.offsets is None else self.offsets[:, :, at],
            tail=tail,
        )

    def write(self, new: Rows, slots: torch.Tensor) -> None:
        """Put rows `new` (T slots) at `slots`, int64 `[B, T]`, of the stored tensors; span 1."""
        batch = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
        for mine, theirs in zip(self.tensors().values(), new.tensors().values(), strict=True):
            raw = torch.uint8 if mine.dtype == torch.float8_e4m3fn else mine.dtype
            mine.view(raw)[batch, :, slots] = theirs.view(raw).transpose(1, 2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role; the table, one for all rows, is not among them."""
        held = {"codes": self.codes, "scales": self.scales}
        if self.offsets is not None:
            held["offsets"] = self.offsets
        return held if self.tail is None else {**held, "tail": self.tail}


def quantise(
    x: torch.Tensor,
    kind: Kind,
    *,
    group: int | None = None,
    span: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Round rows `[B, K, S, D]`, finite, with one scale of type `dtype` every `group` numbers.

    With a span the scale is that of one number of `span` tokens, and `group` is 1 or not given.
    The error is at most half a scale (integers), or 2^-4 of the number (fp8, half its smallest
    step near zero); scales and offsets of 16 bits are rounded first and the codes fitted to them.

    Raises:
        ValueError: D does not divide by the group, or not into the bytes of the kind; S does not
            divide by the span; a kind is not known.
    """
    width = _check(x, kind)
    group = group or (width if span == 1 else 1)
    if width % group:
        raise ValueError(
            f"kv cache: rows of {width} numbers do not split into groups of {group}"
            + (" and halves; int4 needs both." if kind == "int4" else ".")
        )
    if x.shape[2] % span or (span > 1 and group > 1):
        raise ValueError(
            f"kv cache: {x.shape[2]} tokens in spans of {span} with groups of {group}: tokens must "
            "be a multiple of the span, and a span has groups of 1."
        )
    parts = x.float().reshape(*x.shape[:2], x.shape[2] // span, span, width // group, group)
    smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if kind in BITS:
        top = 2 ** BITS[kind] - 1
        low, high = parts.amin((3, 5)), parts.amax((3, 5))
        scales = ((high - low) / top).clamp(smallest, largest).to(dtype)
        offsets = low.clamp(-largest, largest).to(dtype)
        steps = (parts - _each(offsets)) / _each(scales)
        codes = torch.round(steps).clamp(0, top).to(torch.uint8).reshape(x.shape)
        return Rows(kind, pack(codes, kind), scales, offsets, span=span)
    most = LARGEST[kind]
    scales = (parts.abs().amax((3, 5)) / most).clamp(smallest, largest).to(dtype)
    steps = (parts / _each(scales)).clamp(-most, most).reshape(x.shape)
    codes = (torch.round(steps) if kind == "int8" else steps).to(CODES[kind])
    return Rows(kind, codes, scales, span=span)


def quantise_to(
    x: torch.Tensor,
    kind: Kind,
    table: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> Rows:
    """Give each number of rows `[B, K, S, D]` the nearest level of `table`, rising, after scaling.

    `scales` and `offsets` `[B, K, S, D / G]` are stored as they are given.

    Raises:
        ValueError: the kind has whole bytes, the table another number of levels than the kind has
            codes, or the scales do not fit the rows.
    """
    width = _check(x, kind)
    if kind not in BITS or table.shape != (2 ** BITS[kind],):
        raise ValueError(
            f"kv cache: a table of {list(table.shape)} levels does not fit codes of {kind!r}; int2 "
            "has 4, int3 8, int4 16."
        )
    if scales.shape[:3] != x.shape[:3] or width % scales.shape[-1]:
        raise ValueError(
            f"kv cache: scales {list(scales.shape)} do not fit rows {list(x.shape)}: one or more "
            "equal groups a row."
        )
    parts = x.float().reshape(*x.shape[:3], 1, scales.shape[-1], width // scales.shape[-1])
    if offsets is not None:
        parts = parts - _each(offsets)
    codes = level_codes((parts / _each(scales)).reshape(x.shape), table)
    return Rows(kind, pack(codes, kind), scales, offsets, table)


def _check(x: torch.Tensor, kind: Kind) -> int:
    """D, if rows of this kind can have it."""
    if kind not in CODES:
        raise ValueError(f"kv cache: unknown kind {kind!r}. Known: {', '.join(CODES)}.")
    width = x.shape[-1]
    if kind in BITS:
        packed_width(width, kind)
    return width


def _each(scales: torch.Tensor) -> torch.Tensor:
    """`[B, K, S / span, D / G]` in float32, ready for `[B, K, S / span, span, D / G, G]`."""
    return scales.float()[:, :, :, None, :, None]


def row_shapes(
    kind: Kind, width: int, groups: int, dtype: torch.dtype
) -> list[tuple[int, torch.dtype]]:
    """Last dimension and type of each tensor of rows with a scale a group: codes, scales, offsets."""
    if kind in BITS:
        return [(packed_width(width, kind), torch.uint8), (groups, dtype), (groups, dtype)]
    return [(width, CODES[kind]), (groups, dtype)]


def empty(
    kind: Kind,
    shape: tuple[int, int, int, int],
    *,
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rows:
    """Rows of zeros with room for `shape` = (B, K, S, D), to be filled by `rope_append`."""
    batch, heads, slots, width = shape
    _check(torch.empty(0, width), kind)
    group = group or width
    if width % group:
        raise ValueError(f"kv cache: rows of {width} numbers do not split into groups of {group}.")
    made = []
    for last, held in row_shapes(kind, width, width // group, dtype):
        raw = torch.uint8 if held == torch.float8_e4m3fn else held
        size = (batch, heads, slots, last)
        made.append(torch.zeros(size, dtype=raw, device=device).view(held))
    return Rows.of(kind, made)
