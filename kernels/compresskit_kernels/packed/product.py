"""A weight of packed codes prepared for the Triton kernels, and which of them runs when.

M = 1            `one_row`
M to `MOST`      `few_rows`, its inputs split until the GPU is full, then `add_up`
M beyond         `spread` once, then torch's dense product in the type of x
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit_kernels import launch, traced
from compresskit_kernels.dispatch import Prepared, Use, note
from compresskit_kernels.packed import tiles, triton as kernels

if TYPE_CHECKING:
    from compresskit_kernels.fp8_matmul.weight import Fp8Weight
    from compresskit_kernels.grouped_matmul.weight import GroupedWeight
    from compresskit_kernels.int8_matmul.weight import Int8Weight

MOST = 64
"""Most rows of activations for `few_rows`: near it, codes cost less to spread than to expand again
in every block of rows, and the dense product is no longer short of memory bandwidth."""

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Routines(NamedTuple):
    """What an operation notes for each of the three ways."""

    one: Use
    few: Use
    many: Use

    @property
    def detail(self) -> str:
        """What the record says."""
        return (
            f"{self.one.routine} (M = 1 at 8 bits or in float32), {self.few.routine} (M <= {MOST}), "
            f"{self.many.routine} (M > {MOST})"
        )


def routines(op: str, codes: str) -> Routines:
    """The three ways of an operation whose codes are called `codes`."""
    return Routines(
        Use(op, f"triton: {codes} x one row"),
        Use(op, f"triton: {codes} x few rows, tensor cores"),
        Use(op, f"triton: spread {codes} + matmul"),
    )


class Levels(NamedTuple):
    """How a code becomes a number (the kernels' KIND, MIDDLE, FACTOR and table)."""

    kind: int
    middle: int = 0
    factor: float = 1.0
    table: tuple[float, ...] = ()

    def numbers(self, bits: int) -> torch.Tensor:
        """Float32 number of every code of `bits` bits, before the scale."""
        codes = torch.arange(2**bits)
        if self.kind == kernels.AFFINE.value:
            return codes.to(torch.int8).float() if bits == 8 else (codes - self.middle).float()
        if self.kind == kernels.E2M1.value:
            return torch.tensor([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])
        if self.kind == kernels.E4M3.value:
            return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        return torch.tensor(self.table)


class PackedProduct(Prepared):
    """Words of codes and scales in tiles of 64 outputs."""

    __slots__ = (
        "__weakref__", "bits", "book", "constants", "full", "gain", "group", "groups", "height", "levels",
        "number", "offsets", "routines", "scales", "width", "words", "zeros",
    )  # fmt: skip

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, *, group: int, bits: int, levels: Levels,
        routines: Routines, offsets: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None, gain: float = 1.0,
    ) -> None:  # fmt: skip
        """Lay out `codes` (uint8 `[N, K]`) with scales `[N, G]` and offsets or zeros beside them."""
        self.height, self.width = codes.shape
        self.bits = tiles.held_bits(bits)
        if self.bits == 8 and levels.kind == kernels.AFFINE.value:
            codes = codes - levels.middle  # two's complement, by wrapping
        self.words = tiles.lay_out(codes, self.bits)
        self.scales = tiles.lay_out_groups(scales)
        self.offsets = None if offsets is None else tiles.lay_out_groups(offsets)
        self.zeros = None if zeros is None else tiles.lay_out_groups(zeros)
        inputs = self.words.shape[1] * tiles.codes_a_word(self.bits)
        self.full = inputs == self.width
        self.groups = scales.shape[1]
        self.group = 0 if self.groups == 1 and offsets is None and zeros is None else group
        self.gain, self.levels, self.routines = gain, levels, routines
        numbers = [*levels.table, *[0.0] * (2**self.bits - len(levels.table))]
        self.book = torch.tensor(numbers, device=codes.device) if levels.table else None
        beside = kernels.OFFSETS if offsets is not None else kernels.ZEROS
        self.constants: dict[str, Any] = {
            "BITS": self.bits,
            "KIND": levels.kind,
            "BESIDE": kernels.NOTHING.value if self._beside is None else beside.value,
            "MIDDLE": levels.middle,
            "FACTOR": levels.factor,
            # A group of the whole row and more: any number of whole steps that covers it.
            "GROUP": min(self.group, inputs),
        }
        self.number = traced.register(self)

    @property
    def _beside(self) -> torch.Tensor | None:
        return self.offsets if self.offsets is not None else self.zeros

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`."""
        if torch.compiler.is_compiling():
            return traced.product(x, self.number, self.height)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]` in code that is not traced."""
        flat = x.reshape(-1, self.width).contiguous()
        rows = flat.shape[0]
        with launch.on(flat):
            if rows == 1 and self.alone(flat.dtype):
                y = self._one(flat)
            elif rows <= MOST:
                y = self._few(flat)
            else:
                note(self.routines.many)
                y = flat @ self.dense(flat.dtype)
        return y.view(*x.shape[:-1], self.height)

    def alone(self, dtype: torch.dtype) -> bool:
        """Whether `one_row` takes a single row: exact in float32, and no parts to add up.

        It takes about 5 instructions a code, tensor cores 3.7 (Triton 3.9) to 4.9 (3.6), counted in
        the machine code of symmetric groups of 128 for sm_90. An H100 issues some 5 a code while the
        next 4 bits arrive: enough for 8 bits a code, hardly for 4. Not yet measured on a GPU.
        """
        return self.bits == 8 or dtype is torch.float32

    def _weight(self) -> tuple[torch.Tensor, ...]:
        """The kernels' pointers; what a weight does not have points anywhere."""
        beside = self.scales if self._beside is None else self._beside
        return self.words, self.scales, beside, self.words if self.book is None else self.book

    def _one(self, x: torch.Tensor) -> torch.Tensor:
        note(self.routines.one)
        y = x.new_empty(1, self.height)
        tile = launch.tile("packed_one_row", 1, x.device)
        columns = tile.columns
        # Narrow programs only where wide ones would leave multiprocessors without work.
        wanted = tile.waves * launch.multiprocessors(x.device)
        while columns > 16 and self.words.shape[0] * tiles.COLUMNS // columns < wanted:
            columns //= 2
        kernels.one_row[(-(-self.height // columns),)](
            x, *self._weight(), y, self.gain, self.height, self.width, self.words.shape[1],
            self.groups, **self.constants, WIDTH=columns, DEPTH=tile.depth,
            WHOLE=self.full and self.words.shape[1] % tile.depth == 0,
            num_warps=tile.warps, **launch.FUSED,
        )  # fmt: skip
        return y

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        note(self.routines.few)
        rows = x.shape[0]
        y = x.new_empty(rows, self.height)
        if not rows:
            return y
        tile = launch.tile("packed_few_rows", rows, x.device)
        programs = -(-self.height // tile.columns)
        steps = self.words.shape[1] // tiles.STEP
        parts = launch.splits(programs, steps, tile.waves, x.device)
        parts = -(-steps // -(-steps // parts))  # none without work
        out = y if parts == 1 else x.new_empty(parts, rows, self.height, dtype=torch.float32)
        kernels.few_rows[(programs, parts, -(-rows // tile.rows))](
            x, *self._weight(), out, self.gain, rows, self.height, self.width, self.words.shape[1],
            self.groups, parts, **self.constants, HALF=_half(x.dtype), ROWS=tile.rows, WIDTH=tile.columns,
            WHOLE=self.full,
            num_warps=warps(tile, self.bits),
            # A pipeline would bring every look-up of a code book by way of shared memory.
            num_stages=1 if self.book is not None else tile.stages, **launch.FUSED,
        )  # fmt: skip
        if parts > 1:
            kernels.add_up[(-(-y.numel() // 1024),)](
                out, y, y.numel(), parts, BLOCK=1024, **launch.FUSED
            )
        return y

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[K, N]`, made anew in every call."""
        out = torch.empty(self.width, self.height, dtype=dtype, device=self.words.device)
        grid = (self.words.shape[0], self.words.shape[1] // tiles.STEP)
        kernels.spread[grid](
            *self._weight(), out, self.gain, self.height, self.width, self.words.shape[1],
            self.groups, **self.constants, HALF=_half(dtype), num_stages=1, **launch.FUSED,
        )  # fmt: skip
        return out

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight, by the formula in torch."""
        if torch.compiler.is_compiling():
            return traced.rows(index, self.number, self.width)
        return self.look_up(index)

    def look_up(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight in code that is not traced."""
        flat = index.reshape(-1)
        codes = tiles.take(self.words, self.bits, self.width, flat).long()
        level = self.levels.numbers(self.bits).to(codes.device)[codes]
        if self.zeros is not None:
            level += self.levels.middle - self._spread(self.zeros, flat)
        dense = level * self._spread(self.scales, flat)
        if self.gain != 1.0:
            dense *= self.gain
        if self.offsets is not None:
            dense += self._spread(self.offsets, flat)
        return dense.view(*index.shape, self.width)

    def _spread(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        each = tiles.take_groups(values, index).float()
        if self.groups == 1:
            return each
        return each.repeat_interleave(self.group, dim=1)[:, : self.width]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Words, scales, zero points or offsets, and the code book."""
        extra = {"zero_points": self._beside, "table": self.book}
        held = {role: tensor for role, tensor in extra.items() if tensor is not None}
        return {"packed": self.words, "scales": self.scales, **held}


def warps(tile: launch.Tile, bits: int) -> int:
    """Warps of a `few_rows` program: a step of 2-bit codes holds 256 inputs, too many for as few."""
    return 2 * tile.warps if bits == 2 else tile.warps


def _half(dtype: torch.dtype) -> Any:
    """The 16-bit type in which codes turn into levels: exact in both."""
    return kernels.BFLOAT16 if dtype is torch.bfloat16 else kernels.FLOAT16


@functools.cache
def _levels(bits: int, table: tuple[float, ...] | None) -> Levels:
    """The cheapest way to the levels of a group-wise weight."""
    if table is None:
        return Levels(kernels.AFFINE.value, 2 ** (bits - 1))
    if table == (*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)):
        return Levels(kernels.E2M1.value, factor=2.0**14)
    return Levels(kernels.TABLE.value, table=table)


def grouped(weight: GroupedWeight, routines: Routines) -> PackedProduct:
    """Lay out a group-wise weight."""
    return PackedProduct(
        weight.codes(),
        weight.scales,
        group=weight.group,
        bits=weight.bits,
        levels=_levels(weight.bits, weight.table),
        routines=routines,
        offsets=weight.offsets,
        zeros=weight.zeros,
        gain=weight.gain,
    )


def by_row(weight: Int8Weight, routines: Routines) -> PackedProduct:
    """Lay out int8 codes with one scale a row: 8-bit codes around 128."""
    return PackedProduct(
        weight.codes.view(torch.uint8) ^ 128,
        weight.scales.unsqueeze(1),
        group=weight.codes.shape[1],
        bits=8,
        levels=Levels(kernels.AFFINE.value, 128),
        routines=routines,
    )


def float8(weight: Fp8Weight, routines: Routines) -> PackedProduct:
    """Lay out e4m3 numbers with one scale a row."""
    return PackedProduct(
        weight.codes.view(torch.uint8),
        weight.scales.unsqueeze(1),
        group=weight.codes.shape[1],
        bits=8,
        levels=Levels(kernels.E4M3.value, factor=2.0**8),
        routines=routines,
    )
