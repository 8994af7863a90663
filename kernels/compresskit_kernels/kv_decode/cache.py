"""The stored form of quantised keys or values: codes, and a scale per token and head.

    int8   x[s, d] = code * scales[s, d // G]                            code -127 to 127
    fp8    x[s, d] = code * scales[s, d // G]                            code an e4m3 number
    int4   x[s, d] = code * scales[s, d // G] + offsets[s, d // G]       code 0 to 15

A byte of an int4 row holds code[j] | code[j + D/2] << 4: the halves of a row, not its neighbours.
That way both nibbles of a tile are plain rows to a kernel, two groups of D/2 need one scale each,
and the two numbers that a rotary embedding mixes lie in one byte.

A scale shared by many tokens is an expanded tensor: it takes part in the formula and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["int8", "int4", "fp8"]

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest level of the symmetric kinds."""

CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
"""Type of the stored codes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Quantised keys or values of B sequences, K heads and S slots, D numbers each."""

    kind: Kind
    codes: torch.Tensor
    """`[B, K, S, D]`, or `[B, K, S, D / 2]` for int4; type as in `CODES`."""
    scales: torch.Tensor
    """`[B, K, S, D / G]`, floating-point and positive."""
    offsets: torch.Tensor | None = None
    """Shape and type of the scales: the value of code 0; int4 has it, the others do not."""

    @property
    def width(self) -> int:
        """D."""
        return self.codes.shape[-1] * (2 if self.kind == "int4" else 1)

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.scales.shape[-1]

    @property
    def slots(self) -> int:
        """S, the capacity."""
        return self.codes.shape[2]

    @property
    def dense(self) -> bool:
        """Whether the numbers of a row lie side by side, and offsets as the scales: kernels want it."""
        return (
            self.codes.stride(-1) == 1
            and (self.groups == 1 or self.scales.stride(-1) == 1)
            and (self.offsets is None or self.offsets.stride() == self.scales.stride())
        )

    def levels(self) -> torch.Tensor:
        """The codes' values before scaling, float32 `[B, K, S, D]`."""
        if self.kind != "int4":
            return self.codes.float()
        return torch.cat((self.codes & 15, self.codes >> 4), dim=-1).float()

    def dequantise(self) -> torch.Tensor:
        """All slots in float32, `[B, K, S, D]`."""
        levels = self.levels()
        if self.groups == 1 and self.offsets is None:
            return levels * self.scales.float()
        grouped = levels.reshape(*levels.shape[:-1], self.groups, -1)
        grouped = grouped * self.scales.float().unsqueeze(-1)
        if self.offsets is not None:
            grouped = grouped + self.offsets.float().unsqueeze(-1)
        return grouped.reshape(levels.shape)

    def between(self, start: int, stop: int) -> Rows:
        """Slots start to stop, as a view."""
        offsets = None if self.offsets is None else self.offsets[:, :, start:stop]
        return Rows(self.kind, self.codes[:, :, start:stop], self.scales[:, :, start:stop], offsets)

    def write(self, new: Rows, slots: torch.Tensor) -> None:
        """Put rows `new` (T slots) at `slots`, int64 `[B, T]`, of the stored tensors."""
        batch = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
        for mine, theirs in zip(self.tensors().values(), new.tensors().values(), strict=True):
            raw = torch.uint8 if mine.dtype == torch.float8_e4m3fn else mine.dtype
            mine.view(raw)[batch, :, slots] = theirs.view(raw).transpose(1, 2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by role."""
        held = {"codes": self.codes, "scales": self.scales}
        return held if self.offsets is None else {**held, "offsets": self.offsets}


def quantise(
    x: torch.Tensor, kind: Kind, *, group: int | None = None, dtype: torch.dtype = torch.float32
) -> Rows:
    """Round rows `[B, K, S, D]`, finite, with one scale of type `dtype` every `group` numbers.

    The error is at most half a scale (int8, int4), or 2^-4 of the number (fp8, half its smallest
    step near zero); scales and offsets of 16 bits are rounded first and the codes fitted to them.

    Raises:
        ValueError: D does not divide by the group, or is odd for int4; a kind is not known.
    """
    if kind not in CODES:
        raise ValueError(f"kv cache: unknown kind {kind!r}. Known: {', '.join(CODES)}.")
    width = x.shape[-1]
    group = group or width
    if width % group or (kind == "int4" and width % 2):
        raise ValueError(
            f"kv cache: rows of {width} numbers do not split into groups of {group}"
            + (" and halves; int4 needs both." if kind == "int4" else ".")
        )
    grouped = x.float().reshape(*x.shape[:-1], -1, group)
    smallest = torch.finfo(dtype).tiny
    if kind == "int4":
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / 15).clamp_min(smallest).to(dtype)
        offsets = low.to(dtype)
        steps = (grouped - offsets.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
        codes = torch.round(steps).clamp(0, 15).to(torch.uint8).flatten(-2)
        packed = codes[..., : width // 2] | codes[..., width // 2 :] << 4
        return Rows(kind, packed, scales, offsets)
    largest = LARGEST[kind]
    scales = (grouped.abs().amax(-1) / largest).clamp_min(smallest).to(dtype)
    steps = (grouped / scales.float().unsqueeze(-1)).clamp(-largest, largest).flatten(-2)
    return Rows(kind, (torch.round(steps) if kind == "int8" else steps).to(CODES[kind]), scales)


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
    blank = quantise(torch.zeros(1, 1, 1, width), kind, group=group, dtype=dtype)
    made = []
    for tensor in blank.tensors().values():
        size = (batch, heads, slots, tensor.shape[-1])
        raw = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
        made.append(torch.zeros(size, dtype=raw, device=device).view(tensor.dtype))
    return Rows(kind, *made)
