"""Codes laid out for kernels whose lanes are neighbouring outputs: 64 columns of words a tile.

    words[n // 64, 16 s + r, n % 64] = sum_ih codes[n, S s + 32 i + 2 r + h] << (bits i + 16 h)

with S = 32 * 16 / bits inputs a step, h 0 or 1, i below 16 / bits. A step of a kernel reads 16 rows
of words, whole lines of memory one after the other, and finds in them S neighbouring inputs. Why so:

- lanes are outputs, so that 4 words of a lane lie side by side (one load of 16 bytes), every lane
  of a warp meets the same few inputs, and sums need no exchange between lanes;
- `words >> bits i` holds two codes, 16 bits apart, of two neighbouring inputs. Put below exponent
  bits they are two 16-bit floats in the very register that a matrix instruction wants them in:
  one instruction for both, and no exchange between lanes or registers on the way;
- the 32 inputs of a shift lie side by side, so that groups of 32 and more have whole shifts;
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
"""Rows of words a step."""
RUN = 32
"""Inputs of one shift: two a row of words."""
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
    return group >= width or group % step == 0 or (group % RUN == 0 and step % group == 0)


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
        # [tiles, 64, steps, bytes a half word, codes a byte, 16, halves]
        part = part.view(-1, COLUMNS, steps, 2, 8 // bits, STEP, 2)
        filled = part[..., 0, :, :].clone()
        for place in range(1, 8 // bits):
            filled |= part[..., place, :, :] << (bits * place)
        words = filled.permute(0, 2, 4, 1, 5, 3).flatten(4).view(torch.int32)
        parts.append(words.view(-1, steps * STEP, COLUMNS))
    return torch.cat(parts)


def take(words: torch.Tensor, bits: int, width: int, index: torch.Tensor) -> torch.Tensor:
    """Codes uint8 `[n, K]` of the outputs `index` (int64 `[n]`)."""
    rows = words[index // COLUMNS, :, index % COLUMNS].contiguous()  # [n, R]
    each = rows.view(torch.uint8).view(index.shape[0], -1, STEP, 2, 2)  # halves, bytes of a half
    parts = [(each >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    codes = torch.stack(parts, dim=5).permute(0, 1, 4, 5, 2, 3)
    return codes.reshape(index.shape[0], -1)[:, :width]


def lay_out_groups(values: torch.Tensor) -> torch.Tensor:
    """One value a group `[N, G]` -> `[ceil(N / 64), G, 64]`, of the same type."""
    height, groups = values.shape
    filled = functional.pad(values, (0, 0, 0, -height % COLUMNS))
    return filled.view(-1, COLUMNS, groups).transpose(1, 2).contiguous()


def take_groups(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Undo `lay_out_groups` for the outputs `index`: `[n, G]`."""
    return values[index // COLUMNS, :, index % COLUMNS]
