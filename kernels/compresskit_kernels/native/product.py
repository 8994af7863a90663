"""A stored weight laid out for `products.cpp`, and the call.

    codes     [tiles, chunks, bits, 16, 4]  16 rows x 32 inputs a chunk, planes of 1, 2 and 4 bits
    scales    [tiles, groups, 16]           bfloat16; offsets or zero points likewise

Rows are padded to 16 and inputs to 32, which `held_bytes` counts. With more rows of activations than
`most_rows` the codes are spread to bfloat16, a slab at a time, and multiplied densely.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from compresskit_kernels import traced
from compresskit_kernels.dispatch import Prepared, Use, note
from compresskit_kernels.native import build

if TYPE_CHECKING:
    from compresskit_kernels.fp8_matmul.weight import Fp8Weight
    from compresskit_kernels.grouped_matmul.weight import GroupedWeight
    from compresskit_kernels.int8_matmul.weight import Int8Weight

TILE, CHUNK = 16, 32
SLAB = 1 << 19
"""Weights spread at a time: 1 MB of bfloat16 stays in the second-level cache."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LONGEST = 1 << 16
"""Inputs a group: 65536 * 255 * 127 still fits the 32-bit sums."""


class Kind(IntEnum):
    """How a code becomes a number."""

    AFFINE = 0
    TABLE = 1
    FLOAT8 = 2


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("gain", ctypes.c_float),
        ("group16", ctypes.c_int32),
    )


class NativeProduct(Prepared):
    """A weight in tiles; how it is called is decided by `Routines`."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_call",
        "_few",
        "_held",
        "_many",
        "_struct",
        "bits",
        "height",
        "integer",
        "most_rows",
        "number",
        "width",
    )  # fmt: skip

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        *,
        width: int,
        group: int,
        bits: int,
        kind: Kind,
        routines: tuple[Use, Use],
        most_rows: int,
        integer: bool = False,
        offsets: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        table: tuple[float, ...] | None = None,
        gain: float = 1.0,
    ) -> None:
        """Lay out `codes` (uint8 `[N, K]`) with `[N, G]` scales and offsets or zero points."""
        library = build.load().library
        if library is None:
            raise ValueError(f"the native product cannot run here: {build.reason()}")
        rows = codes.shape[0]
        self.height, self.width, self.bits = rows, width, bits
        self.integer, self.most_rows = integer, most_rows
        self._few, self._many = routines
        self._call = library.compresskit_product
        tiles, chunks = -(-rows // TILE), -(-width // CHUNK)
        packed = torch.zeros(tiles * chunks * bits * 64, dtype=torch.uint8)
        codes = codes.contiguous()
        library.compresskit_lay_out(codes.data_ptr(), rows, width, bits, packed.data_ptr())
        levels = None if table is None else _levels(table)
        self._held = {
            "packed": packed,
            "scales": _tiled(scales.to(torch.bfloat16)),
            "offsets": None if offsets is None else _tiled(offsets.to(torch.bfloat16)),
            "zeros": None if zeros is None else _tiled(zeros),
            "table": levels,
        }
        held = {role: None if t is None else t.data_ptr() for role, t in self._held.items()}
        self._struct = _Weight(
            codes=held["packed"],
            scales=held["scales"],
            offsets=held["offsets"],
            zeros=held["zeros"],
            table=held["table"],
            rows=rows,
            width=width,
            group=group if group < width else chunks * CHUNK,
            bits=bits,
            kind=int(kind),
            gain=gain,
            group16=int(group == 16),
        )
        self._address = ctypes.addressof(self._struct)
        self.number = traced.register(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        if torch.compiler.is_compiling():
            return traced.product(x, self.number, self.height)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]` in code that is not traced."""
        flat = x.reshape(-1, self.width)
        rows = flat.shape[0]
        if rows > self.most_rows:
            note(self._many)
            return self._wide(flat).to(x.dtype).view(*x.shape[:-1], self.height)
        note(self._few)
        if not flat.is_contiguous():
            flat = flat.contiguous()
        y = x.new_empty((*x.shape[:-1], self.height))
        self._call(self._address, flat.data_ptr(), y.data_ptr(), rows, TYPES[x.dtype], self.integer)
        return y

    def _wide(self, flat: torch.Tensor) -> torch.Tensor:
        """Spread a slab of rows, multiply, go on."""
        flat = flat.to(torch.bfloat16)
        step = max(TILE, SLAB // self.width // TILE * TILE)
        out = flat.new_empty((flat.shape[0], self.height))
        for start in range(0, self.height, step):
            stop = min(start + step, self.height)
            out[:, start:stop] = functional.linear(flat, self._spread(start, stop))
        return out

    def _spread(self, start: int, stop: int) -> torch.Tensor:
        """Rows start (a multiple of a tile) to stop as bfloat16 `[.., K]`."""
        out = torch.empty(stop - start, self.width, dtype=torch.bfloat16)
        library = build.load().library
        assert library is not None
        library.compresskit_spread(self._address, start // TILE, -(-stop // TILE), out.data_ptr())
        return out

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight, in bfloat16 precision."""
        if torch.compiler.is_compiling():
            return traced.rows(index, self.number, self.width)
        return self.look_up(index)

    def look_up(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight in code that is not traced."""
        flat = index.reshape(-1).tolist()
        out = torch.empty(len(flat), self.width)
        for place, row in enumerate(flat):
            start = row // TILE * TILE
            out[place] = self._spread(start, min(start + TILE, self.height))[row - start]
        return out.view(*index.shape, self.width)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes, scales, zero points or offsets, and the code book of 64 bytes."""
        names = {"offsets": "zero_points", "zeros": "zero_points"}
        if self.bits == 8:
            names["packed"] = "codes"
        return {names.get(role, role): t for role, t in self._held.items() if t is not None}


def _levels(table: tuple[float, ...]) -> torch.Tensor:
    """The 32 bfloat16 numbers that a code of at most 5 bits picks from."""
    return torch.tensor([*table, *([0.0] * (32 - len(table)))], dtype=torch.bfloat16)


def _tiled(values: torch.Tensor) -> torch.Tensor:
    """`[N, G]` -> `[tiles, G, 16]`, rows padded with zeros."""
    rows, groups = values.shape
    padded = functional.pad(values, (0, 0, 0, -rows % TILE))
    return padded.view(-1, TILE, groups).transpose(1, 2).contiguous()


def supports(x: torch.Tensor) -> bool:
    """Whether the products can run for inputs like `x`."""
    return x.device.type == "cpu" and x.dtype in TYPES and x.shape[-1] > 0 and build.available()


NEEDS = (
    "a float32, bfloat16 or float16 input with K > 0 on an x86 CPU with AVX-512 VNNI, VBMI and BF16, and "
    "a C++ compiler"
)


def grouped(
    weight: GroupedWeight, routines: tuple[Use, Use], most_rows: int, *, integer: bool = False
) -> NativeProduct:
    """Lay out a group-wise weight."""
    return NativeProduct(
        weight.codes(),
        weight.scales,
        width=weight.width,
        group=weight.group,
        bits=weight.bits,
        kind=Kind.AFFINE if weight.table is None else Kind.TABLE,
        routines=routines,
        most_rows=most_rows,
        integer=integer,
        offsets=weight.offsets,
        zeros=weight.zeros,
        table=weight.table,
        gain=weight.gain,
    )


def supports_grouped(weight: GroupedWeight, *, integer: bool = False) -> bool:
    """Whether the layout can take this weight."""
    whole = weight.group >= weight.width or weight.group % CHUNK == 0
    if weight.table is not None:
        return not integer and weight.bits <= 5 and (whole or weight.group == 16)
    return whole and weight.width <= LONGEST and 2 <= weight.bits <= 8


def by_row(
    weight: Int8Weight, routines: tuple[Use, Use], most_rows: int, *, integer: bool = False
) -> NativeProduct:
    """Lay out int8 codes with one scale a row: 8-bit codes around 128."""
    return NativeProduct(
        weight.codes.view(torch.uint8) ^ 128,
        weight.scales.unsqueeze(1),
        width=weight.codes.shape[1],
        group=-(-weight.codes.shape[1] // CHUNK) * CHUNK,
        bits=8,
        kind=Kind.AFFINE,
        routines=routines,
        most_rows=most_rows,
        integer=integer,
    )


def float8(weight: Fp8Weight, routines: tuple[Use, Use], most_rows: int) -> NativeProduct:
    """Lay out e4m3 numbers with one scale a row."""
    return NativeProduct(
        weight.codes.view(torch.uint8),
        weight.scales.unsqueeze(1),
        width=weight.codes.shape[1],
        group=-(-weight.codes.shape[1] // CHUNK) * CHUNK,
        bits=8,
        kind=Kind.FLOAT8,
        routines=routines,
        most_rows=most_rows,
    )
