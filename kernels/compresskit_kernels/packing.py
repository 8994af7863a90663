"""Codes of 1 to 8 bits as a dense stream of bits, in 32-bit words.

    word w of a row holds the bits 32w .. 32w + 31 of  code[0] | code[1] << b | code[2] << 2b | ...

Low bits first, values may straddle words, and the last word is filled with zeros. It is the layout
of compressed-tensors' `pack-quantized` format (which stores signed codes with 2^(b-1) added, as we
do), so a stored weight can be written to a checkpoint as it is. Fast paths lay it out anew at load.
"""

from __future__ import annotations

import torch

WORD = 32


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of one row of `width` codes."""
    return -(-width * bits // WORD) * (WORD // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes 0 to 2^bits - 1, `[N, K]` -> uint8 `[N, ceil(K * bits / 32) * 4]`."""
    rows, width = codes.shape
    codes = codes.to(torch.uint8)
    out = torch.zeros(rows, packed_bytes(width, bits), dtype=torch.uint8, device=codes.device)
    if not codes.numel():
        return out
    if 8 % bits == 0:
        per = 8 // bits
        codes = torch.nn.functional.pad(codes, (0, -width % per))
        used = codes.shape[1] // per
        for place in range(per):
            out[:, :used] |= codes[:, place::per] << (place * bits)
        return out
    # Eight codes fill `bits` bytes exactly, whatever the number of bits.
    codes = torch.nn.functional.pad(codes, (0, -width % 8)).view(rows, -1, 8).to(torch.int64)
    words = (codes << (torch.arange(8, device=codes.device) * bits)).sum(dim=2)
    stream = torch.stack([(words >> 8 * i) & 255 for i in range(bits)], dim=2)
    stream = stream.to(torch.uint8).view(rows, -1)
    kept = min(stream.shape[1], out.shape[1])
    out[:, :kept] = stream[:, :kept]
    return out


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Undo `pack`: uint8 `[N, K]`."""
    rows = packed.shape[0]
    if not packed.numel() or not width:
        return torch.zeros(rows, width, dtype=torch.uint8, device=packed.device)
    if 8 % bits == 0:
        per, mask = 8 // bits, (1 << bits) - 1
        if per == 1:
            return packed[:, :width]
        used = packed[:, : -(-width // per)]
        parts = [(used >> (place * bits)) & mask for place in range(per)]
        return torch.stack(parts, dim=2).view(rows, -1)[:, :width]
    octets = -(-width // 8)
    filled = torch.nn.functional.pad(packed, (0, max(0, octets * bits - packed.shape[1])))
    stream = filled[:, : octets * bits].view(rows, octets, bits).to(torch.int64)
    words = (stream << (torch.arange(bits, device=packed.device) * 8)).sum(dim=2, keepdim=True)
    codes = (words >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :width]
