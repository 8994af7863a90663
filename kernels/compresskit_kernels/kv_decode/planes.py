"""Codes of 2, 3 and 4 bits as planes of bits inside each row.

int4   one plane of 4 bits:  byte j = code[j] | code[j + D/2] << 4
int2   one plane of 2 bits:  byte j = code[j] | code[j + D/4] << 2 | ... | code[j + 3D/4] << 6
int3   a plane of 2 bits, then one of the third bit:  D/4 + D/8 bytes
"""

from __future__ import annotations

import torch

BITS = {"int4": 4, "int3": 3, "int2": 2}
PLANES = {"int4": (4,), "int3": (2, 1), "int2": (2,)}
"""Kind -> bits of each plane, the lowest bits of a code first."""


def packed_width(width: int, kind: str) -> int:
    """Bytes of a row of `width` codes.

    Raises:
        ValueError: the row does not fill whole bytes of every plane.
    """
    narrowest = 8 // min(PLANES[kind])
    if width % narrowest:
        parts = {2: "halves", 4: "quarters", 8: "eighths"}[narrowest]
        raise ValueError(
            f"kv cache: rows of {width} numbers do not split into {parts}, as {kind} needs."
        )
    return width * BITS[kind] // 8


def pack(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Pack uint8 codes `[..., D]` of one number each into `[..., D * bits / 8]`."""
    planes, below = [], 0
    for bits in PLANES[kind]:
        parts = ((codes >> below) & (2**bits - 1)).chunk(8 // bits, dim=-1)
        plane = parts[0]
        for place, part in enumerate(parts[1:], 1):
            plane = plane | part << bits * place
        planes.append(plane)
        below += bits
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: torch.Tensor, kind: str) -> torch.Tensor:
    """The inverse of `pack`: uint8 `[..., D]`."""
    sizes = [packed.shape[-1] * bits // BITS[kind] for bits in PLANES[kind]]
    codes, below = None, 0
    for bits, plane in zip(PLANES[kind], torch.split(packed, sizes, dim=-1), strict=True):
        parts = [(plane >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        found = torch.cat(parts, dim=-1)
        codes = found if codes is None else codes | found << below
        below += bits
    assert codes is not None, "every kind has a plane"
    return codes


def bounds(table: torch.Tensor) -> torch.Tensor:
    """Middles between the neighbouring levels of a rising table, float32."""
    return (table[1:] + table[:-1]) / 2


def level_codes(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the level of `table`, rising, that is nearest to each number of x: uint8."""
    return torch.bucketize(x.contiguous(), bounds(table).to(x.device)).to(torch.uint8)
