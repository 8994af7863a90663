"""Kernels that multiply by packed codes of 2, 4 or 8 bits (layout: `packed.tiles`).

    one_row     M = 1: every code meets one x; sums in float32 on the plain cores
    few_rows    M to 64: codes become a tile of x's type, tensor cores do the rest
    add_up      adds the parts of a product whose inputs were split among programs
    spread      the dense weight `[K, N]`, for products of many rows

Weight of a code: `level(code) * scale + offset`, level by `KIND`. An H100 has time for about five
instructions a 4-bit code before memory has brought the next, so a code turns into a float without a
conversion: its bits are put into the mantissa of a power of two, and the power is subtracted, which
is exact. Scales multiply sums, not weights: once a group in float32, so that the tensor cores meet
exact levels and nothing is rounded before the result (float32 inputs: to tf32, in `few_rows`).

Interpreted (see `testing`), `few_rows` is right for float16 and float32 only.
"""
# Triton's language has types of its own:
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from compresskit_kernels import launch

AFFINE = tl.constexpr(0)  # level = code - MIDDLE
E2M1 = tl.constexpr(1)  # 4-bit floats, times 2^-14
E4M3 = tl.constexpr(2)  # 8-bit floats, times 2^-8
TABLE = tl.constexpr(3)  # level = table[code]

NOTHING = tl.constexpr(0)  # what stands beside the scales
OFFSETS = tl.constexpr(1)
ZEROS = tl.constexpr(2)

FLOAT16, BFLOAT16 = tl.float16, tl.bfloat16
INTERPRETED = tl.constexpr(launch.INTERPRETED)

COLUMNS = tl.constexpr(64)
STEP = tl.constexpr(16)


@triton.jit
def small_floats(pair, KIND: tl.constexpr):
    """Two e2m1 or e4m3 codes as float16 bits: they are float16 with fewer bits and another bias."""
    if KIND == E2M1:
        return ((pair & 0x00080008) << 12) | ((pair & 0x00070007) << 9)
    return ((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << 7)


@triton.jit
def half(pair, HIGH: tl.constexpr, TYPE: tl.constexpr):
    """One of the two 16-bit floats of a word."""
    bits = (pair >> 16) & 0xFFFF if HIGH else pair & 0xFFFF
    return bits.to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def minus(left, right, HALF: tl.constexpr):
    """Difference in 16 bits; the interpreter takes bfloat16 for integers, so there by way of 32."""
    if INTERPRETED:
        return (left.to(tl.float32) - right).to(HALF)
    return left - right


@triton.jit
def level_at(
    words, table, PLACE: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """Float32 level of one code of each word: mask-and-or with constants, then subtract."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if KIND == AFFINE:
        # Bits that would not fit below the exponent come from the upper half of the word.
        UPPER: tl.constexpr = HIGH and BITS * PLACE + 16 + BITS > 23
        AT: tl.constexpr = BITS * PLACE if UPPER or not HIGH else BITS * PLACE + 16
        low = words >> 16 if UPPER else words
        if BITS == 8:  # two's complement: turning the top bit makes it the level + 128
            bits = (low & (MASK << AT)) ^ (((150 - AT) << 23) | (128 << AT))
            return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - AT) + 128)
        bits = (low & (MASK << AT)) | ((150 - AT) << 23)
        return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - AT) + MIDDLE)
    code = (words >> (BITS * PLACE + (16 if HIGH else 0))) & MASK
    if KIND == TABLE:
        # 64 bytes that stay in the first-level cache; a lane of any code reads the same line.
        return tl.load(table + code)
    return half(small_floats(code, KIND), False, tl.float16).to(tl.float32)


@triton.jit
def levels_of(
    words, table, FIRST: tl.constexpr, PLACES: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, MIDDLE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Levels `[32 PLACES, C]` of words `[16, C]` from shift FIRST on: exact, in the type HALF.

    Two codes a time, in 16-bit halves; the last reshape names registers and moves nothing.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    BOTH: tl.constexpr = MASK | (MASK << 16)
    WIDE: tl.constexpr = tl.float32 if INTERPRETED else HALF
    shifts = ((tl.arange(0, PLACES) + FIRST) * BITS)[:, None, None]
    pair = (words[None, :, :] >> shifts) & BOTH
    if KIND == TABLE:
        low = tl.load(table + (pair & MASK)).to(HALF)
        high = tl.load(table + (pair >> 16)).to(HALF)
    elif KIND != AFFINE:
        pair = small_floats(pair, KIND)
        low = half(pair, False, tl.float16).to(tl.float32).to(HALF)
        high = half(pair, True, tl.float16).to(tl.float32).to(HALF)
    elif tl.float16 == HALF:  # 1024 + code
        if BITS == 8:
            pair = pair ^ 0x64806480
            low = minus(half(pair, False, HALF), 1152.0, HALF)
            high = minus(half(pair, True, HALF), 1152.0, HALF)
        else:
            pair = pair | 0x64006400
            low = minus(half(pair, False, HALF), 1024.0 + MIDDLE, HALF)
            high = minus(half(pair, True, HALF), 1024.0 + MIDDLE, HALF)
    elif BITS == 8:  # 128 + the lower seven bits, minus 128 or (top bit) 256
        seven = (pair & 0x007F007F) | 0x43004300
        top = (pair & 0x00800080) | 0x43004300
        low = minus(half(seven, False, HALF), half(top, False, HALF).to(WIDE), HALF)
        high = minus(half(seven, True, HALF), half(top, True, HALF).to(WIDE), HALF)
    else:  # 128 + code
        pair = pair | 0x43004300
        low = minus(half(pair, False, HALF), 128.0 + MIDDLE, HALF)
        high = minus(half(pair, True, HALF), 128.0 + MIDDLE, HALF)
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, [32 * PLACES, words.shape[1]])


@triton.jit
def one_row(
    x, words, scales, beside, table, y, gain, N, K, R, GROUPS,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Multiply one row: y `[N]` of x `[K]`; a program makes `WIDTH` outputs, `DEPTH` rows of words a step.

    The whole inner dimension stays in one program, so that there are no parts to add up. The lanes
    of a warp cover `WIDTH` / 8 outputs times several rows; a lane has 8 outputs, so that two loads
    of 16 bytes share the inputs of a row of words.
    `WHOLE`: K fills its last step and DEPTH divides R, so that nothing is masked.
    """
    PLACES: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = 32 * PLACES
    # Shifts that share a group; GROUP = 0 means that a row has one scale and nothing else.
    RUN: tl.constexpr = PLACES if GROUP == 0 or GROUP >= SPAN else GROUP // 32
    column = tl.program_id(0) * WIDTH
    tile = (column // COLUMNS).to(tl.int64)
    # Triton 3.6 does not see by itself that the loads below begin at whole 16 bytes.
    inside = tl.multiple_of(column % COLUMNS, WIDTH) + tl.arange(0, WIDTH)
    words += tile * R * COLUMNS
    scales += tile * GROUPS * COLUMNS
    beside += tile * GROUPS * COLUMNS
    acc = tl.zeros([DEPTH, WIDTH], tl.float32)
    for start in range(0, R, DEPTH):
        row = start + tl.arange(0, DEPTH)
        at = row[:, None] * COLUMNS + inside[None, :]
        packed = tl.load(words + at) if WHOLE else tl.load(words + at, (row < R)[:, None], 0)
        step = row // STEP * SPAN
        inputs = step + row % STEP * 2
        near = x + inputs  # what differs from it by a constant becomes part of the load
        for run in tl.static_range(0, PLACES, RUN):
            part = tl.zeros([DEPTH, WIDTH], tl.float32)
            total = tl.zeros([DEPTH], tl.float32)
            for place in tl.static_range(run, run + RUN):
                for high in tl.static_range(2):
                    if WHOLE:
                        one = tl.load(near + (32 * place + high)).to(tl.float32)
                    else:
                        there = inputs + (32 * place + high) < K
                        one = tl.load(near + (32 * place + high), there, 0.0).to(tl.float32)
                    level = level_at(packed, table, place, high == 1, BITS, KIND, MIDDLE)
                    part = tl.fma(level, one[:, None], part)
                    if BESIDE != NOTHING:
                        total += one
            if GROUP == 0:
                acc += part
            else:
                g = tl.minimum((step + 32 * run) // GROUP, GROUPS - 1)
                spot = g[:, None] * COLUMNS + inside[None, :]
                if BESIDE == ZEROS:
                    zero = tl.load(beside + spot).to(tl.float32) - MIDDLE
                    part = tl.fma(zero, -total[:, None], part)
                scale = tl.load(scales + spot).to(tl.float32)
                if BESIDE == OFFSETS:
                    acc = tl.fma(part, scale * (FACTOR * gain), acc)
                    acc = tl.fma(tl.load(beside + spot).to(tl.float32), total[:, None], acc)
                else:
                    acc = tl.fma(part, scale, acc)
    out = tl.sum(acc, 0)
    if GROUP == 0:
        out *= tl.load(scales + inside).to(tl.float32)
    if BESIDE != OFFSETS:
        out *= FACTOR * gain
    n = column + tl.arange(0, WIDTH)
    tl.store(y + n, out.to(y.dtype.element_ty), n < N)


@triton.jit
def few_rows(
    x, words, scales, beside, table, out, gain, M, N, K, R, GROUPS, SPLITS,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of y `[SPLITS, M, N]`; `WHOLE` says that K fills its last step.

    Parts are summed by `add_up` in float32 and in order: atomic sums in bfloat16 are slower and
    round differently in every run. Multiplying M = 2 on the tensor cores wastes 14 of 16 rows of
    them, which costs nothing while the codes' memory traffic sets the pace.
    """
    PLACES: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = 32 * PLACES
    RUN: tl.constexpr = PLACES if GROUP == 0 or GROUP >= SPAN else GROUP // 32
    column = tl.program_id(0) * WIDTH
    tile = (column // COLUMNS).to(tl.int64)
    inside = tl.multiple_of(column % COLUMNS, WIDTH) + tl.arange(0, WIDTH)
    words += tile * R * COLUMNS
    scales += tile * GROUPS * COLUMNS
    beside += tile * GROUPS * COLUMNS
    steps = R // STEP
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    at = (tl.arange(0, STEP) * COLUMNS)[:, None] + inside[None, :]
    # The words of three more steps are on their way while these are multiplied: 16 KB a
    # multiprocessor must be, to keep an H100's memory busy. Left to the compiler's own pipeline they
    # would go through shared memory, transposed, 4 bytes at a time.
    packed = tl.load(words + first * (STEP * COLUMNS) + at)
    second = tl.load(words + tl.minimum(first + 1, last - 1) * (STEP * COLUMNS) + at)
    third = tl.load(words + tl.minimum(first + 2, last - 1) * (STEP * COLUMNS) + at)
    for step in range(first, last):
        fourth = tl.load(words + tl.minimum(step + 3, last - 1) * (STEP * COLUMNS) + at)
        for run in tl.static_range(0, PLACES, RUN):
            k = step * SPAN + 32 * run + tl.arange(0, 32 * RUN)
            here = (m < M)[:, None] if WHOLE else (m < M)[:, None] & (k < K)[None, :]
            some = tl.load(x + m[:, None] * K + k[None, :], here, 0.0)
            level = levels_of(packed, table, run, RUN, BITS, KIND, MIDDLE, HALF).to(some.dtype)
            if GROUP == 0:
                acc = tl.dot(some, level, acc)
            else:
                part = tl.dot(some, level)
                spot = tl.minimum((step * SPAN + 32 * run) // GROUP, GROUPS - 1) * COLUMNS + inside
                scale = tl.load(scales + spot).to(tl.float32) * (FACTOR * gain)
                if BESIDE != NOTHING:
                    aside = tl.load(beside + spot).to(tl.float32)
                    total = tl.sum(some.to(tl.float32), 1)
                    if BESIDE == ZEROS:
                        aside = (MIDDLE - aside) * scale
                    acc = tl.fma(total[:, None], aside[None, :], acc)
                acc = tl.fma(part, tl.broadcast_to(scale[None, :], part.shape), acc)
        packed = second
        second = third
        third = fourth
    if GROUP == 0:
        acc *= (tl.load(scales + inside).to(tl.float32) * (FACTOR * gain))[None, :]
    n = column + tl.arange(0, WIDTH)
    place = (tl.program_id(1) * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def add_up(parts, y, size, SPLITS, BLOCK: tl.constexpr):
    """Sum float32 parts `[SPLITS, size]` in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLITS):
        acc += tl.load(parts + part * size + at, at < size, 0.0)
    tl.store(y + at, acc.to(y.dtype.element_ty), at < size)


@triton.jit
def spread(
    words, scales, beside, table, out, gain, N, K, R, GROUPS,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The dense weight `[K, N]`, neighbouring outputs side by side as the codes are."""
    PLACES: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = 32 * PLACES
    RUN: tl.constexpr = PLACES if GROUP == 0 or GROUP >= SPAN else GROUP // 32
    tile = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    inside = tl.arange(0, COLUMNS)
    row = step * STEP + tl.arange(0, STEP)
    packed = tl.load(words + tile * R * COLUMNS + row[:, None] * COLUMNS + inside[None, :])
    n = tile * COLUMNS + inside
    for run in tl.static_range(0, PLACES, RUN):
        level = levels_of(packed, table, run, RUN, BITS, KIND, MIDDLE, HALF).to(tl.float32)
        g = 0 if GROUP == 0 else tl.minimum((step * SPAN + 32 * run) // GROUP, GROUPS - 1)
        spot = (tile * GROUPS + g) * COLUMNS + inside
        if BESIDE == ZEROS:
            level -= (tl.load(beside + spot).to(tl.float32) - MIDDLE)[None, :]
        level *= (tl.load(scales + spot).to(tl.float32) * (FACTOR * gain))[None, :]
        if BESIDE == OFFSETS:
            level += tl.load(beside + spot).to(tl.float32)[None, :]
        k = step * SPAN + 32 * run + tl.arange(0, 32 * RUN)
        place = k[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out + place, level.to(out.dtype.element_ty), (k < K)[:, None] & (n < N)[None, :])
