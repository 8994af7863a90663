"""Codes laid out for kernels whose lanes are neighbouring outputs: 64 columns of words a tile.

    words[n // 64, 16 b + r, n % 64] = sum_i codes[n, 16 P b + 16 i + r] << (bits i)     P = 32 / bits

A step of a kernel reads 16 rows of words, whole lines of memory one after the other, and finds in
them the codes of 16 P neighbouring inputs. Why so:

- lanes are outputs, so that 4 words of a lane lie side by side (one load of 16 bytes), every lane
  of a warp meets the same few inputs, and sums need no exchange between lanes;
- shift i of a row of words is input 16 i + r, so that `words >> bits i` for all i, put below each
  other, is the weight in its natural order: tensor cores take it next to a plain tile of x, and all
  codes of one shift belong to one group, whatever multiple of 16 the group is;
- a tile is one piece of memory and padded to whole steps, so that no load of weights is masked.

Codes take 2, 4 or 8 bits here; other widths take the next one. Groups of scales go alongside as
`[tiles, groups, 64]`. Padding holds zeros: x is zero where a code is padding.
"""

from __future__ import annotations

import torch
from torch.nn import functional

COLUMNS = 64
"""Outputs a tile: 256 bytes of words, 128 bytes of bfloat16 scales."""
STEP = 16
"""Rows of words a step: the inner dimension of the smallest matrix instruction of bfloat16."""
SLAB = 1 << 22
"""Codes laid out at a time; bounds the extra memory."""


def held_bits(bits: int) -> int:
    """Bits that a code of `bits` takes here."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def codes_a_word(bits: int) -> int:
    """Codes a 32-bit word, for 2, 4 or 8 bits."""
    return 32 // bits


def fits_group(group: int, width: int, bits: int) -> bool:
    """Whether groups of G inputs never begin inside a shift: G divides a step or a step divides G."""
    step = STEP * codes_a_word(held_bits(bits))
    return group >= width or group % step == 0 or (group % STEP == 0 and step % group == 0)


def lay_out(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 `[N, K]` of 2, 4 or 8 bits -> int32 `[ceil(N / 64), R, 64]`."""
    height, width = codes.shape
    per = codes_a_word(bits)
    steps = -(-width // (STEP * per))
    slabs = max(1, SLAB // max(1, width) // COLUMNS) * COLUMNS
    parts = []
    for start in range(0, height, slabs):
        part = codes[start : start + slabs]
        part = functional.pad(part, (0, steps * STEP * per - width, 0, -part.shape[0] % COLUMNS))
        # [tiles, 64, steps, bytes a word, codes a byte, 16]
        part = part.view(-1, COLUMNS, steps, 4, 8 // bits, STEP)
        filled = part[..., 0, :].clone()
        for place in range(1, 8 // bits):
            filled |= part[..., place, :] << (bits * place)
        words = filled.permute(0, 2, 4, 1, 3).contiguous().view(torch.int32)
        parts.append(words.view(-1, steps * STEP, COLUMNS))
    return torch.cat(parts)


def take(words: torch.Tensor, bits: int, width: int, index: torch.Tensor) -> torch.Tensor:
    """Codes uint8 `[n, K]` of the outputs `index` (int64 `[n]`)."""
    rows = words[index // COLUMNS, :, index % COLUMNS].contiguous()  # [n, R]
    each = rows.view(torch.uint8).view(index.shape[0], -1, STEP, 4)
    parts = [(each >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    codes = torch.stack(parts, dim=4).permute(0, 1, 3, 4, 2)  # [n, steps, byte, place, 16]
    return codes.reshape(index.shape[0], -1)[:, :width]


def lay_out_groups(values: torch.Tensor) -> torch.Tensor:
    """One value a group `[N, G]` -> `[ceil(N / 64), G, 64]`, of the same type."""
    height, groups = values.shape
    filled = functional.pad(values, (0, 0, 0, -height % COLUMNS))
    return filled.view(-1, COLUMNS, groups).transpose(1, 2).contiguous()


def take_groups(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Undo `lay_out_groups` for the outputs `index`: `[n, G]`."""
    return values[index // COLUMNS, :, index % COLUMNS]
