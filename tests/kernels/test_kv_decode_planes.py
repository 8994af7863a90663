"""Codes below a byte, levels from a table, scales per channel, tails: against the formula in float64."""

import math
from dataclasses import replace

import pytest
import torch
from compresskit_kernels.kv_decode import (
    Rows,
    empty,
    kv_decode,
    kv_extend,
    quantise,
    quantise_to,
    reference,
)
from compresskit_kernels.native import build
from compresskit_kernels.rope_append import rope_append

needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]
BITS = {"int4": 4, "int3": 3, "int2": 2}
LIMIT = 3e-6
"""Relative, float32 against float64."""


def codes_of(rows):
    """One integer a number, read from the bytes as the layout says."""
    column, codes, below, start = torch.arange(rows.width), 0, 0, 0
    for bits in {"int4": (4,), "int3": (2, 1), "int2": (2,)}[rows.kind]:
        size = rows.width * bits // 8
        byte = rows.codes[..., start + column % size].long()
        codes = codes + ((byte >> bits * (column // size)) % 2**bits << below)
        below, start = below + bits, start + size
    return codes


def numbers(rows):
    """The rows in float64, without the library's own unpacking."""
    codes = codes_of(rows)
    levels = codes.double() if rows.table is None else rows.table.double()[codes]
    slot = torch.arange(rows.coded).unsqueeze(1) // rows.span
    column = torch.arange(rows.width) // (rows.width // rows.groups)
    out = levels * rows.scales.double()[:, :, slot, column]
    if rows.offsets is not None:
        out = out + rows.offsets.double()[:, :, slot, column]
    return out if rows.tail is None else torch.cat((out, rows.tail.double()), dim=2)


def formula(q, keys, values, mask=None):
    """Attention in float64, new tokens causal among themselves."""
    share = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(share, dim=1) for x in (keys, values))
    queries, slots = q.shape[2], keys.shape[2]
    seen = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if mask is not None:
        seen = seen & mask[:, None, None]
    scores = (q.double() @ keys.transpose(2, 3)) / math.sqrt(q.shape[3])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights @ values


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BITS)
def test_the_layout_is_the_documented_one(kind):
    x = normal(2, 1, 3, 64)
    rows = quantise(x, kind, group=32)
    assert rows.codes.shape == (2, 1, 3, 8 * BITS[kind])
    torch.testing.assert_close(rows.dequantise().double(), numbers(rows), rtol=1e-6, atol=1e-6)
    lowest, highest = (quantise(torch.tensor([[[[v] * 32 + [1 - v] * 32]]]), kind) for v in (0, 1))
    assert codes_of(lowest).flatten()[[0, 63]].tolist() == [0, 2 ** BITS[kind] - 1]
    assert codes_of(highest).flatten()[[0, 63]].tolist() == [2 ** BITS[kind] - 1, 0]


def test_bytes_of_the_layout_by_hand():
    """Codes 0 1 2 ... of a row of 8: quarters j, j + 2, j + 4, j + 6 of a byte, least bits first."""
    codes = torch.arange(8) % 8
    x = codes.float().reshape(1, 1, 1, 8)
    three = quantise(x, "int3", group=8)  # low planes 0 1 2 3 0 1 2 3; third bits 0 0 0 0 1 1 1 1
    assert three.codes.flatten().tolist() == [0b10001000, 0b11011101, 0b11110000]
    two = quantise(x.clamp(max=3), "int2", group=8)
    assert two.codes.flatten().tolist() == [0b11111000, 0b11111101]
    four = quantise(torch.tensor([[[[0.0, 15.0, 3.0, 1.0]]]]), "int4")
    assert four.codes.flatten().tolist() == [0 | 3 << 4, 15 | 1 << 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("kind", BITS)
def test_the_error_is_at_most_half_a_scale(kind, spanned, dtype):
    x = normal(2, 3, 64, 32) * torch.logspace(-3, 2, 32) + 0.1
    x[0, 0, :32] = 5  # no spread
    x[0, 1, 0] = 0
    rows = quantise(x, kind, span=32, dtype=dtype) if spanned else quantise(x, kind, group=16)
    error = (numbers(rows) - x.double()).abs()
    step = rows.scales.double()
    step = step.repeat_interleave(32, 2) if spanned else step.repeat_interleave(16, 3)
    # What is lost when the grid itself is rounded: half a last place of the offset, and of the
    # scale as often as the largest code counts it.
    last = torch.finfo(dtype).eps / 2 if spanned else 2.0**-24
    assert (error <= step / 2 * (1 + 40 * last) + 2 * last * x.abs().double().amax(2, True)).all()
    assert (error > step / 4).any(), "a grid twice as fine would pass"


def test_rounding_again_changes_nothing():
    x = normal(1, 2, 64, 32)
    for options in ({"group": 16}, {"span": 32}):
        once = quantise(x, "int4", **options)
        again = quantise(once.dequantise(), "int4", **options)
        assert torch.equal(again.codes, once.codes)
        # Negative control: other groups are another grid, the drift of re-quantised caches.
        moved = quantise(once.dequantise().roll(1, 2), "int4", group=32).dequantise().roll(-1, 2)
        assert (moved - once.dequantise()).abs().max() > 1e-3


def test_levels_of_a_table_are_the_nearest_ones():
    x, table = normal(1, 2, 40, 32), torch.tensor([-1.5, -0.4, 0.4, 1.5])
    scales = torch.full((1, 2, 40, 1), 0.7)
    rows = quantise_to(x, "int2", table, scales)
    best = (x.double().unsqueeze(-1) / 0.7 - table.double()).abs().argmin(-1)
    assert torch.equal(numbers(rows), table.double()[best] * scales.double())
    shifted = quantise_to(x, "int2", table, scales, scales / 7)
    best = ((x.double().unsqueeze(-1) - scales.double().unsqueeze(-1) / 7) / 0.7 - table).abs()
    assert torch.equal(shifted.levels().double(), table.double()[best.argmin(-1)])


def sides(kind, width, slots, *, batch=2, heads=2, key_coded=None, value_coded=None, group=16):
    """Keys per channel in spans of 16 and values per token, with tails where less is coded."""
    x, y = normal(batch, heads, slots, width) + 0.3, normal(batch, heads, slots, width, seed=1) + 1
    key_coded = slots // 16 * 16 if key_coded is None else key_coded
    value_coded = slots if value_coded is None else value_coded
    keys = quantise(x[:, :, :key_coded], kind, span=16, dtype=torch.float16) if key_coded else None
    if keys is None:
        keys = empty(kind, (batch, heads, 0, width), group=1, dtype=torch.float16)
        keys = replace(keys, span=16)
    values = quantise(y[:, :, :value_coded], kind, group=group, dtype=torch.float16)
    return (
        replace(keys, tail=x[:, :, key_coded:].bfloat16()),
        replace(values, tail=y[:, :, value_coded:]),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", [1, 3, 4])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("kind", BITS)
def test_spans_and_tails_follow_the_formula(kind, width, share, impl):
    slots, queries = 41, 2 * share  # heads of a group times queries: 2, 18, 32
    keys, values = sides(kind, width, slots, key_coded=16, value_coded=29)
    q = normal(2, 2 * share, queries, width, seed=2)
    mask = torch.rand(2, slots, generator=torch.Generator().manual_seed(3)) > 0.3
    want = formula(q, numbers(keys), numbers(values), mask)
    assert relative(kv_decode(q, keys, values, mask=mask, impl=impl), want) < LIMIT


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("key_coded", "value_coded"), [(0, 1), (32, 35), (32, 20), (16, 36)])
def test_the_sides_need_not_be_coded_equally_far(key_coded, value_coded, impl):
    keys, values = sides("int2", 64, 36, key_coded=key_coded, value_coded=value_coded)
    q = normal(2, 4, 1, 64, seed=2)
    got = kv_decode(q, keys, values, impl=impl)
    assert relative(got, formula(q, numbers(keys), numbers(values))) < LIMIT


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BITS)
def test_tables_follow_the_formula(kind, dtype, impl):
    table = torch.linspace(-2, 2, 2 ** BITS[kind]) ** 3
    x = normal(1, 2, 50, 64)
    scales = x.norm(dim=-1, keepdim=True).bfloat16() / 8
    rows = quantise_to(x, kind, table, scales)
    q = normal(1, 6, 3, 64, seed=2).to(dtype)
    got = kv_decode(q, rows, rows, impl=impl)
    limit = LIMIT if dtype is torch.float32 else 8e-3
    assert got.dtype is dtype
    assert relative(got, formula(q, numbers(rows), numbers(rows))) < limit


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("kind", ["int8", "fp8", *BITS])
@needs_native
def test_native_is_the_reference(kind, queries):
    """Also at lengths that fill no tile, and in bfloat16, where products may be taken otherwise."""
    slots = 30 + 17 * queries
    keys = quantise(normal(2, 3, slots, 64) + 0.2, kind, dtype=torch.bfloat16)
    values = quantise(normal(2, 3, slots, 64, seed=1) + 1, kind, dtype=torch.bfloat16)
    for dtype, limit in ((torch.float32, LIMIT), (torch.bfloat16, 8e-3)):
        q = normal(2, 9, queries, 64, seed=2).to(dtype)
        want = kv_decode(q.float(), keys, values, impl="reference").double()
        assert relative(kv_decode(q, keys, values, impl="native"), want) < limit
        wrong = replace(values, scales=values.scales.roll(1, 2))
        assert relative(kv_decode(q, keys, wrong, impl="native"), want) > 2 * limit


@needs_native
@pytest.mark.parametrize("width", [64, 128, 192])
@pytest.mark.parametrize("kind", ["int8", *BITS])
def test_bfloat16_queries_cost_no_more_than_rounding_the_result(kind, width):
    """16-bit words of queries and weights: their error must vanish beside that of the result."""
    keys = quantise(normal(2, 2, 200, width), kind, dtype=torch.bfloat16)
    values = quantise(normal(2, 2, 200, width, seed=1) + 1, kind, group=32, dtype=torch.float16)
    if kind != "int8":
        keys = sides(kind, width, 200)[0]
    q = normal(2, 6, 2, width, seed=2).bfloat16() * 2
    mask = torch.rand(2, 200, generator=torch.Generator().manual_seed(3)) > 0.2
    want = formula(q, numbers(keys) if kind != "int8" else keys.dequantise().double(),
                   numbers(values) if kind != "int8" else values.dequantise().double(), mask)  # fmt: skip
    rounded = relative(want.bfloat16(), want)
    got = relative(kv_decode(q, keys, values, mask=mask, impl="native"), want)
    assert got < 1.01 * rounded
    # Negative control: two last places of bfloat16 in the queries would show.
    moved = (q.float() * (1 + 2**-6)).bfloat16()
    assert relative(kv_decode(moved, keys, values, mask=mask, impl="native"), want) > 1.05 * rounded


@needs_native
def test_what_native_does_not_read_goes_to_the_reference():
    for rows in (
        quantise(normal(1, 1, 20, 80), "int4"),  # no multiple of 32
        quantise(normal(1, 1, 20, 64), "int4", group=8),
        quantise(normal(1, 1, 24, 64), "int4", span=8),
    ):
        q = normal(1, 2, 1, rows.width)
        with pytest.raises(ValueError, match="'native' cannot take"):
            kv_decode(q, rows, rows, impl="native")
        got = kv_decode(q, rows, rows)
        assert relative(got, formula(q, numbers(rows), numbers(rows))) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8", *BITS])
@needs_native
def test_extending_natively_gives_the_same_bits(kind, dtype):
    x = normal(2, 3, 37, 64) * torch.logspace(-6, 3, 37).unsqueeze(1)
    x[0, 0, 0], x[0, 0, 1], x[1, 2, 3, 5] = 0, 5, -1e6
    # Halves between two codes of int8 go to the even one.
    x[1, 1, 4] = torch.arange(64) * 2 + 0.5
    x[1, 1, 4, 0] = 127
    for rounded in (x, x.bfloat16(), x.transpose(1, 2).contiguous().transpose(1, 2)):
        rows = {}
        for impl in ("native", "reference"):
            begun = empty(kind, (2, 3, 0, 64), group=32, dtype=dtype)
            begun = kv_extend(begun, rounded[:, :, :20], group=32, impl=impl)
            rows[impl] = kv_extend(begun, rounded[:, :, 20:], group=32, impl=impl)
        whole = quantise(rounded, kind, group=32, dtype=dtype)
        for role, held in whole.tensors().items():
            for made in rows.values():
                assert torch.equal(
                    made.tensors()[role].view(torch.uint8), held.contiguous().view(torch.uint8)
                ), role


def test_stretches_keep_to_the_spans(monkeypatch):
    keys, values = sides("int3", 64, 80)
    q = normal(2, 4, 1, 64)
    whole = kv_decode(q, keys, values, impl="reference")
    monkeypatch.setattr(reference, "STRETCH", 40)
    torch.testing.assert_close(
        kv_decode(q, keys, values, impl="reference"), whole, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="cut a span of 16"):
        keys.between(0, 40)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda x: quantise(x, "int2"), "quarters, as int2 needs"),
        (lambda x: quantise(x, "int3"), "eighths, as int3 needs"),
        (lambda x: quantise(x[..., :4], "int4", group=3), "groups of 3"),
        (lambda x: quantise(x[..., :4], "int4", span=2), "multiple of the span"),
        (lambda x: quantise(x[..., :4], "int4", span=3, group=2), "groups of 1"),
        (lambda x: quantise_to(x[..., :4], "int2", torch.ones(3), x), "table of"),
        (lambda x: quantise_to(x[..., :4], "int8", torch.ones(256), x), "table of"),
        (lambda x: quantise_to(x[..., :4], "int2", torch.ones(4), x), "do not fit"),
        (lambda x: kv_extend(empty("int4", (1, 1, 0, 8)), x[..., :4]), "do not follow"),
        (lambda x: kv_extend(quantise(x, "int8", span=3), x), "do not grow"),
    ],
)
def test_what_does_not_fit_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused(torch.ones(1, 1, 3, 6))


def test_rows_that_one_token_cannot_be_written_to_are_refused():
    q = normal(1, 2, 1, 64)
    turn = torch.ones(1, 1, 64)
    for keys in (
        sides("int4", 64, 32, batch=1)[0],
        quantise_to(q, "int2", torch.arange(4.0), torch.ones(1, 2, 1, 1)),
    ):
        with pytest.raises(ValueError, match="one token at a time"):
            rope_append(q, q, q, turn, turn, keys, keys, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", BITS)
def test_a_wrong_plane_span_or_tail_is_noticed(kind, impl):
    """Negative controls: each must break the tolerance by far."""
    keys, values = sides(kind, 64, 60, key_coded=48, value_coded=50)
    q = normal(2, 4, 1, 64, seed=2)
    want = formula(q, numbers(keys), numbers(values))

    def error(keys: Rows, values: Rows) -> float:
        return relative(kv_decode(q, keys, values, impl=impl), want)

    assert error(keys, values) < LIMIT
    for side in (0, 1):
        for change in (
            lambda rows: {"codes": rows.codes.roll(1, 3)},
            lambda rows: {"codes": rows.codes ^ 128},
            lambda rows: {"scales": rows.scales.roll(1, 2)},
            lambda rows: {"offsets": rows.offsets.roll(1, 3)},
            lambda rows: {"tail": rows.tail.flip(2)},
        ):
            pair = [keys, values]
            pair[side] = replace(pair[side], **change(pair[side]))
            assert error(*pair) > 100 * LIMIT


@needs_native
def test_the_same_bits_on_two_threads():
    rows = quantise(normal(1, 4, 2100, 128), "int4", group=64, dtype=torch.float16)
    for q in (normal(1, 8, 1, 128, seed=1), normal(1, 8, 2, 128, seed=1).bfloat16()):
        alone = kv_decode(q, rows, rows, impl="native")
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        try:
            assert torch.equal(kv_decode(q, rows, rows, impl="native"), alone)
        finally:
            torch.set_num_threads(threads)
