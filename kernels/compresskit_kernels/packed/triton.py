"""Kernels that multiply by packed codes of 2, 4 or 8 bits (layout: `packed.tiles`).

    one_row     M = 1: every code meets one x; sums in float32 on the plain cores
    few_rows    M to 64: codes become a tile of x's type, tensor cores do the rest
    add_up      adds the parts of a product whose inputs were split among programs
    spread      the dense weight `[K, N]`, for products of many rows

Weight of a code: `level(code) * scale + offset`, level by `KIND`. A code turns into a float without
a conversion instruction (those run at a fraction of the arithmetic's rate, and an H100 has time for
about five instructions a 4-bit code): its bits are put into the mantissa of a power of two, and the
power is subtracted, which is exact.

Interpreted (see `testing`), `few_rows` is right for float16 and float32 only.
"""
# Triton's language has types of its own:
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN202, ANN201

import triton
import triton.language as tl

AFFINE = tl.constexpr(0)  # level = code - MIDDLE
E2M1 = tl.constexpr(1)  # 4-bit floats, times 2^-14
E4M3 = tl.constexpr(2)  # 8-bit floats, times 2^-8
TABLE = tl.constexpr(3)  # level = table[code]

NOTHING = tl.constexpr(0)  # what stands beside the scales
OFFSETS = tl.constexpr(1)
ZEROS = tl.constexpr(2)

COLUMNS = tl.constexpr(64)
STEP = tl.constexpr(16)


@triton.jit
def small_float(code, KIND: tl.constexpr):
    """e2m1 and e4m3 codes are float16 with fewer bits: shifted into place, only the bias differs."""
    if KIND == E2M1:
        half = ((code & 8) << 12) | ((code & 7) << 9)
    else:
        half = ((code & 128) << 8) | ((code & 127) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def level_at(
    words, table, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr
):
    """Float32 level of the codes at a place known at compile time: mask-and-or, then subtract."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if KIND == AFFINE:
        # Bits that would not fit below the exponent come from the upper half of the word.
        UPPER: tl.constexpr = BITS * PLACE + BITS > 23
        AT: tl.constexpr = BITS * PLACE - 16 if UPPER else BITS * PLACE
        low = words >> 16 if UPPER else words
        bits = (low & (MASK << AT)) | ((150 - AT) << 23)
        return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - AT) + MIDDLE)
    code = (words >> (BITS * PLACE)) & MASK
    if KIND == TABLE:
        # 64 bytes that stay in the first-level cache; a lane of any code reads the same line.
        return tl.load(table + code)
    return small_float(code, KIND)


@triton.jit
def levels_of(words, table, BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr):
    """Words `[16, C]` -> float32 levels `[codes a word, 16, C]`, the natural order of inputs."""
    PER: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    shifts = (tl.arange(0, PER) * BITS)[:, None, None]
    codes = (words[None, :, :] >> shifts) & MASK
    if KIND == AFFINE:
        return (codes | (150 << 23)).to(tl.float32, bitcast=True) - (2.0**23 + MIDDLE)
    if KIND == TABLE:
        return tl.load(table + codes)
    return small_float(codes, KIND)


@triton.jit
def one_row(
    x, words, scales, beside, table, y, gain, N, K, R, GROUPS,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """y `[N]` of x `[K]`; a program makes `WIDTH` outputs, `DEPTH` rows of words a step.

    The whole inner dimension stays in one program: at M = 1 a second launch to add parts up would
    cost more than it gains. The lanes of a warp cover `WIDTH` / 8 outputs times several rows; a
    lane has 8 outputs, so that two loads of 16 bytes share the 8 inputs of a row of words.
    `WHOLE`: K fills its last step and DEPTH divides R, so that nothing is masked.
    """
    PER: tl.constexpr = 32 // BITS
    SPAN: tl.constexpr = STEP * PER
    # Shifts that share a group; GROUP = 0 means that a row has one scale and nothing else.
    RUN: tl.constexpr = PER if GROUP == 0 or GROUP >= SPAN else GROUP // STEP
    column = tl.program_id(0) * WIDTH
    tile = (column // COLUMNS).to(tl.int64)
    inside = column % COLUMNS + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    # Addresses are made once and moved on; what differs by a constant becomes part of the load.
    code_at = words + tile * R * COLUMNS + depth[:, None] * COLUMNS + inside[None, :]
    x_at = x + (depth // STEP * SPAN + depth % STEP)
    scales += tile * GROUPS * COLUMNS
    beside += tile * GROUPS * COLUMNS
    acc = tl.zeros([DEPTH, WIDTH], tl.float32)
    for start in range(0, R, DEPTH):
        row = start + depth
        first = row // STEP * SPAN
        if WHOLE:
            packed = tl.load(code_at)
        else:
            packed = tl.load(code_at, (row < R)[:, None], 0)
        for run in tl.static_range(0, PER, RUN):
            part = tl.zeros([DEPTH, WIDTH], tl.float32)
            total = tl.zeros([DEPTH], tl.float32)
            for place in tl.static_range(run, run + RUN):
                if WHOLE:
                    one = tl.load(x_at + STEP * place).to(tl.float32)
                else:
                    here = first + row % STEP + STEP * place < K
                    one = tl.load(x_at + STEP * place, here, 0.0).to(tl.float32)
                level = level_at(packed, table, place, BITS, KIND, MIDDLE)
                part = tl.fma(level, one[:, None], part)
                if BESIDE != NOTHING:
                    total += one
            if GROUP == 0:
                acc += part
            else:
                g = (first + STEP * run) // GROUP
                if not WHOLE:
                    g = tl.minimum(g, GROUPS - 1)
                at = g[:, None] * COLUMNS + inside[None, :]
                if BESIDE == ZEROS:
                    zero = tl.load(beside + at).to(tl.float32) - MIDDLE
                    part = tl.fma(zero, -total[:, None], part)
                scale = tl.load(scales + at).to(tl.float32)
                if BESIDE == OFFSETS:
                    acc = tl.fma(part, scale * (FACTOR * gain), acc)
                    acc = tl.fma(tl.load(beside + at).to(tl.float32), total[:, None], acc)
                else:
                    acc = tl.fma(part, scale, acc)
        code_at += DEPTH * COLUMNS
        x_at += DEPTH * PER
    out = tl.sum(acc, 0)
    if GROUP == 0:
        out *= tl.load(scales + inside).to(tl.float32)
    if BESIDE != OFFSETS:
        out *= FACTOR * gain
    n = column + tl.arange(0, WIDTH)
    tl.store(y + n, out.to(y.dtype.element_ty), n < N)


@triton.jit
def weights(
    packed, scales, beside, table, step, inside, GROUPS, gain,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Float32 weights `[SPAN, WIDTH]` of a step's words; unscaled when a row has only one scale."""
    PER: tl.constexpr = 32 // BITS
    SPAN: tl.constexpr = STEP * PER
    level = levels_of(packed, table, BITS, KIND, MIDDLE)
    if GROUP != 0:
        if GROUP >= SPAN:
            g = tl.full([1, 1, 1], 0, tl.int32) + tl.minimum(step * SPAN // GROUP, GROUPS - 1)
        else:
            place = tl.arange(0, PER)[:, None, None] * STEP
            g = tl.minimum((step * SPAN + place) // GROUP, GROUPS - 1)
        at = g * COLUMNS + inside[None, None, :]
        if BESIDE == ZEROS:
            level -= tl.load(beside + at).to(tl.float32) - MIDDLE
        level *= tl.load(scales + at).to(tl.float32) * (FACTOR * gain)
        if BESIDE == OFFSETS:
            level += tl.load(beside + at).to(tl.float32)
    return tl.reshape(level, [SPAN, WIDTH])


@triton.jit
def few_rows(
    x, words, scales, beside, table, out, gain, M, N, K, R, GROUPS, SPLITS,
    BITS: tl.constexpr, KIND: tl.constexpr, BESIDE: tl.constexpr, MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of y `[SPLITS, M, N]`; `WHOLE` says that K fills its last step.

    Parts are summed by `add_up` in float32 and in order: atomic sums in bfloat16 are slower and
    round differently in every run. Multiplying M = 2 on the tensor cores wastes 14 of 16 rows of
    them, which costs nothing while the codes' memory traffic sets the pace.
    """
    SPAN: tl.constexpr = STEP * (32 // BITS)
    column = tl.program_id(0) * WIDTH
    tile = (column // COLUMNS).to(tl.int64)
    inside = column % COLUMNS + tl.arange(0, WIDTH)
    words += tile * R * COLUMNS
    scales += tile * GROUPS * COLUMNS
    beside += tile * GROUPS * COLUMNS
    steps = R // STEP
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    last = tl.minimum(first + share, steps)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    at = (tl.arange(0, STEP) * COLUMNS)[:, None] + inside[None, :]
    packed = tl.load(words + first * STEP * COLUMNS + at)
    for step in range(first, last):
        # The next words are on their way while these are multiplied. Left to the compiler's own
        # pipeline they would go through shared memory, transposed, 4 bytes at a time.
        following = tl.load(words + tl.minimum(step + 1, steps - 1) * STEP * COLUMNS + at)
        k = step * SPAN + tl.arange(0, SPAN)
        here = (m < M)[:, None] if WHOLE else (m < M)[:, None] & (k < K)[None, :]
        some = tl.load(x + m[:, None] * K + k[None, :], here, 0.0)
        weight = weights(
            packed, scales, beside, table, step, inside, GROUPS, gain,
            BITS, KIND, BESIDE, MIDDLE, FACTOR, GROUP, WIDTH,
        )  # fmt: skip
        acc = tl.dot(some, weight.to(x.dtype.element_ty), acc)
        packed = following
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
    FACTOR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The dense weight `[K, N]`, neighbouring outputs side by side as the codes are."""
    SPAN: tl.constexpr = STEP * (32 // BITS)
    tile = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, COLUMNS)
    row = tl.program_id(1) * STEP + tl.arange(0, STEP)
    packed = tl.load(words + tile * R * COLUMNS + row[:, None] * COLUMNS + inside[None, :])
    scales += tile * GROUPS * COLUMNS
    weight = weights(
        packed, scales, beside + tile * GROUPS * COLUMNS, table,
        tl.program_id(1), inside, GROUPS, gain,
        BITS, KIND, BESIDE, MIDDLE, FACTOR, GROUP, COLUMNS,
    )  # fmt: skip
    if GROUP == 0:
        weight *= (tl.load(scales + inside).to(tl.float32) * (FACTOR * gain))[None, :]
    k = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    n = tile * COLUMNS + inside
    at = k[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + at, weight.to(out.dtype.element_ty), (k < K)[:, None] & (n < N)[None, :])
