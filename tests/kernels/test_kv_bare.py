"""Bare keys with outliers apart: both implementations against formulas in float64, written anew."""

import math
from dataclasses import replace

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_bare import Held, Known, kv_decode_bare, kv_extend_bare
from compresskit_kernels.native import build

needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]
LIMIT = 3e-6
"""Relative, float32 against float64."""
POSITIONS = 3e-5
"""The same where the reference takes angles in float32, at the positions of these tests."""
PLANES = {"int4": (4,), "int3": (2, 1), "int2": (2,)}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known_for(kind, width, heads=2, *, apart=1, pairs=None, seed=3):
    """Ranges that differ by channel and head, levels that are neither even nor symmetric."""
    levels = torch.linspace(-1, 1.2, 2 ** int(kind[3]))
    spread = torch.rand(1, heads, 1, width, generator=torch.Generator().manual_seed(seed))
    pairs = width // 2 if pairs is None else pairs
    frequencies = 10000.0 ** (-torch.arange(pairs) / max(pairs, 1)) if pairs else None
    return Known(
        kind,
        levels * levels.abs(),
        levels * 0.9,
        normal(1, heads, 1, width, seed=seed),
        0.5 + 2 * spread,
        apart,
        frequencies,
    )


def rows(tokens, width, heads=2, batch=2, seed=0):
    """Keys with an offset, values with one number that stands out in each row."""
    keys, values = normal(2, batch, heads, tokens, width, seed=seed)
    values[..., 5] += 9
    return keys * 1.5 + 0.4, values


def filled(known, tokens=53, width=64, first=5, dtype=torch.float32, *, impl="reference", **kw):
    keys, values = (x.to(dtype) for x in rows(first + tokens, width, **kw))
    begun = Held.none(known, keys)
    if first:
        begun = begun._replace(first_keys=keys[:, :, :first], first_values=values[:, :, :first])
    return kv_extend_bare(known, begun, keys[:, :, first:], values[:, :, first:], impl=impl)


def codes_of(packed, kind):
    """One integer a number, read from the bytes as the layout says."""
    width = packed.shape[-1] * 8 // int(kind[3])
    column, codes, below, start = torch.arange(width), 0, 0, 0
    for bits in PLANES[kind]:
        size = width * bits // 8
        byte = packed[..., start + column % size].long()
        codes = codes + ((byte >> bits * (column // size)) % 2**bits << below)
        below, start = below + bits, start + size
    return codes


def rotated(x, start, sign, frequencies):
    """Pairs as complex numbers, float64."""
    if frequencies is None:
        return x
    n = len(frequencies)
    place = torch.arange(start, start + x.shape[2]).double()
    angle = sign * place.unsqueeze(1) * frequencies.double()
    pair = torch.complex(x[..., :n], x[..., n : 2 * n]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pair.real, pair.imag, x[..., 2 * n :]), dim=-1)


def put(x, places, numbers):
    """One number at a time."""
    x = x.clone()
    for b, h, s, i in torch.cartesian_prod(*(torch.arange(n) for n in places.shape)).tolist():
        x[b, h, s, int(places[b, h, s, i])] = numbers[b, h, s, i].double()
    return x


def numbers(known, held):
    """All rows in float64, without the library's own reading."""
    keys = known.key_table.double()[codes_of(held.keys, known.kind)]
    keys = put(keys * known.half.double() + known.middle, held.key_places, held.key_outliers)
    keys = rotated(keys, held.first, 1, known.frequencies)
    values = known.value_table.double()[codes_of(held.values, known.kind)]
    values = values * held.value_scales.double() + held.value_offsets.double()
    values = put(values, held.value_places, held.value_outliers)
    if held.first_keys is None:
        return keys, values
    firsts = held.first_keys.double(), held.first_values.double()
    return tuple(torch.cat(pair, 2) for pair in zip(firsts, (keys, values), strict=True))


def formula(q, keys, values):
    """Attention in float64, new tokens causal among themselves."""
    share, queries, slots = q.shape[1] // keys.shape[1], q.shape[2], keys.shape[2]
    keys, values = (x.repeat_interleave(share, dim=1) for x in (keys, values))
    seen = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
    scores = (q.double() @ keys.transpose(2, 3)) / math.sqrt(q.shape[3])
    return scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0) @ values


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


# Reading


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kind", PLANES)
def test_attention_follows_the_formula(kind, width, queries, impl):
    known = known_for(kind, width, apart=2)
    held = filled(known, 43, width)
    q = normal(2, 6, queries, width, seed=2)
    got = kv_decode_bare(q, known, held, impl=impl)
    assert got.shape == q.shape
    want = formula(q, *numbers(known, held))
    # Width 32 and 96 have 16 and 48 pairs, all multiples of 16.
    assert relative(got, want) < (LIMIT if impl == "native" else POSITIONS)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [0, 1, 5, 16, 40])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 100])
def test_first_and_coded_rows_of_every_number_join(tokens, first, dtype, impl):
    known = known_for("int3", 64)
    held = filled(known, tokens, 64, first, dtype)
    q = normal(2, 4, 1, 64, seed=2)
    want = formula(q, *numbers(known, held))
    assert relative(kv_decode_bare(q, known, held, impl=impl), want) < POSITIONS


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_more_queries_than_coded_rows_see_first_rows_only(tokens, impl):
    known = known_for("int4", 64)
    held = filled(known, tokens, 64, 5)
    q = normal(2, 4, 8, 64, seed=2)
    want = formula(q, *numbers(known, held))
    got = kv_decode_bare(q, known, held, impl=impl)
    seen = 8 - min(8, 5 + tokens)  # queries before it see nothing at all
    assert relative(got[:, :, seen:], want[:, :, seen:]) < POSITIONS


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("pairs", [0, 16, 32, 48])
def test_positions_may_be_on_some_of_the_numbers_or_none(pairs, impl):
    known = known_for("int4", 96, pairs=pairs)
    held = filled(known, 50, 96)
    q = normal(2, 4, 2, 96, seed=2)
    want = formula(q, *numbers(known, held))
    assert relative(kv_decode_bare(q, known, held, impl=impl), want) < POSITIONS


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("apart", [0, 1, 3, 30])
def test_any_number_may_be_kept_apart(apart, impl):
    known = known_for("int2", 64, apart=apart)
    held = filled(known, 40)
    assert held.key_places.shape[-1] == apart
    q = normal(2, 4, 1, 64, seed=2)
    want = formula(q, *numbers(known, held))
    assert relative(kv_decode_bare(q, known, held, impl=impl), want) < POSITIONS


@needs_native
def test_angles_do_not_drift_over_a_long_cache():
    """They are found by adding: 6,000 tokens on, float32 angles (the reference) are worse."""
    known = known_for("int4", 64, heads=1)
    held = filled(known, 6000, 64, 5, heads=1, batch=1)
    # Queries that look at the newest keys, and no others.
    keys, values = numbers(known, held)
    q = keys[:, :, -7:-6].float() * 2
    want = formula(q, keys, values)
    assert relative(kv_decode_bare(q, known, held, impl="native"), want) < 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", PLANES)
def test_bfloat16_queries_cost_no_more_than_rounding_the_result(kind, width, impl):
    known = known_for(kind, width)
    held = filled(known, 200, width, dtype=torch.bfloat16)
    q = (normal(2, 6, 2, width, seed=2) * 2).bfloat16()
    want = formula(q, *numbers(known, held))
    rounded = relative(want.bfloat16(), want)
    got = kv_decode_bare(q, known, held, impl=impl)
    assert got.dtype is torch.bfloat16
    assert relative(got, want) < 1.01 * rounded
    # Negative control: two last places of bfloat16 in the queries would show.
    moved = (q.float() * (1 + 2**-6)).bfloat16()
    assert relative(kv_decode_bare(moved, known, held, impl=impl), want) > 1.05 * rounded


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", Held._fields)
def test_whatever_is_wrong_is_noticed(field, impl):
    """Negative controls: each must break the tolerance by far."""
    known = known_for("int3", 64, apart=2)
    held = filled(known, 50)
    q = normal(2, 4, 1, 64, seed=2)
    want = formula(q, *numbers(known, held))
    wrong = held._replace(**{field: getattr(held, field).roll(1, 2)})
    assert relative(kv_decode_bare(q, known, wrong, impl=impl), want) > 100 * LIMIT


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", ["key_table", "value_table", "middle", "half", "frequencies"])
def test_whatever_is_not_known_is_noticed(field, impl):
    known = known_for("int3", 64)
    held = filled(known, 50)
    q = normal(2, 4, 1, 64, seed=2)
    want = formula(q, *numbers(known, held))
    wrong = replace(known, **{field: getattr(known, field) * 1.01})
    assert relative(kv_decode_bare(q, wrong, held, impl=impl), want) > 30 * LIMIT


@needs_native
def test_the_same_bits_on_two_threads():
    known = known_for("int4", 128, heads=4)
    held = filled(known, 2100, 128, heads=4, batch=1)
    q = normal(1, 8, 2, 128, seed=1).bfloat16()
    alone = kv_decode_bare(q, known, held, impl="native")
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(kv_decode_bare(q, known, held, impl="native"), alone)
    finally:
        torch.set_num_threads(threads)


# Writing


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("kind", PLANES)
def test_new_rows_are_coded_as_the_formula_says(kind, width, dtype, impl):
    known, first = known_for(kind, width, apart=2), 5
    keys, values = (x.to(dtype) for x in rows(60, width))
    held = filled(known, 55, width, first, dtype, impl=impl)
    bare = rotated(keys.double(), 0, -1, known.frequencies)[:, :, first:]
    z = (bare - known.middle) / known.half
    exact = values.double()[:, :, first:]
    far = exact - exact.mean(-1, keepdim=True)
    for sizes, places in ((z.abs(), held.key_places), (far.abs(), held.value_places)):
        # The places are those of the largest, up to ties within rounding.
        found = sizes.gather(-1, places.long()).sort(-1).values
        wanted = sizes.topk(2, -1).values.sort(-1).values
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    step = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    kept = bare.gather(-1, held.key_places.long())
    assert ((held.key_outliers.double() - kept).abs() <= step * kept.abs() + 1e-4).all()
    assert torch.equal(
        held.value_outliers, values[:, :, first:].gather(-1, held.value_places.long())
    )
    low = exact.scatter(-1, held.value_places.long(), torch.inf).amin(-1, keepdim=True)
    high = exact.scatter(-1, held.value_places.long(), -torch.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(held.value_scales.double(), (high - low) / 2, rtol=2**-8, atol=0)
    torch.testing.assert_close(held.value_offsets.double(), (high + low) / 2, rtol=2**-8, atol=1e-6)
    unit = (exact - held.value_offsets.double()) / held.value_scales.double()
    for x, table, packed in (
        (z, known.key_table, held.keys),
        (unit, known.value_table, held.values),
    ):
        found = table.double()[codes_of(packed, kind)]
        nearest = (x.unsqueeze(-1) - table.double()).abs().amin(-1)
        assert ((x - found).abs() <= nearest + 1e-4).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_may_come_in_any_cut_and_old_ones_stay(impl):
    known = known_for("int3", 64)
    keys, values = rows(40, 64)
    whole = kv_extend_bare(known, Held.none(known, keys), keys, values, impl=impl)
    held = Held.none(known, keys)
    for start, stop in ((0, 1), (1, 18), (18, 19), (19, 40)):
        before = held
        held = kv_extend_bare(
            known, held, keys[:, :, start:stop], values[:, :, start:stop], impl=impl
        )
        for old, new in zip(before[:8], held[:8], strict=True):
            assert torch.equal(new[:, :, :start], old)
    for one, other in zip(whole[:8], held[:8], strict=True):
        # Angles by another path may round a number to the next level.
        assert (one == other).float().mean() > 0.99


@needs_native
@pytest.mark.parametrize("left", [1, 20, 39])
def test_rows_cropped_without_a_copy_are_read_and_followed(left):
    """What a rollback leaves: views whose heads lie further apart than their rows take."""
    known = known_for("int4", 64)
    held = filled(known, 40)
    cropped = Held._make((*(part[:, :, :left] for part in held[:8]), *held[8:]))
    copied = Held._make((*(part.contiguous() for part in cropped[:8]), *held[8:]))
    q = normal(2, 4, 1, 64, seed=2)
    got = kv_decode_bare(q, known, cropped, impl="native")
    assert torch.equal(got, kv_decode_bare(q, known, copied, impl="native"))
    keys, values = rows(3, 64, seed=8)
    grown, again = (
        kv_extend_bare(known, one, keys, values, impl="native") for one in (cropped, copied)
    )
    assert all(torch.equal(a, b) for a, b in zip(grown[:8], again[:8], strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_of_equal_numbers_and_huge_ones_stay_finite(impl):
    known = known_for("int3", 64)
    keys, values = rows(6, 64)
    keys[:, :, 0], values[:, :, 0] = 0, 0
    values[:, :, 1] = 3
    values[:, :, 2, 7] = 1e30
    held = kv_extend_bare(known, Held.none(known, keys), keys, values, impl=impl)
    found = held.read(known, 0, 6)[1]
    assert (found[:, :, 0].abs() < 1e-30).all()
    assert torch.allclose(found[:, :, 1], torch.tensor(3.0), rtol=1e-6)
    assert (found[:, :, 2, 7] == 1e30).all()
    assert (found[:, :, 2, :5] - values[:, :, 2, :5]).abs().max() < 2
    got = kv_decode_bare(normal(2, 4, 1, 64), known, held, impl=impl)
    assert torch.isfinite(got).all()


# Choosing


def test_the_record_names_what_ran():
    known = known_for("int4", 64)
    for impl in ("auto", "reference"):
        dispatch.reset()
        held = filled(known, impl=impl)
        kv_decode_bare(normal(2, 4, 1, 64), known, held, impl=impl)
        ran = dispatch.used()
        dispatch.reset()
        assert set(ran) == {"kv_decode", "kv_extend"}
        wanted = "native" if impl == "auto" and build.available() else "reference"
        assert all(one.startswith(wanted) for routines in ran.values() for one in routines)


@pytest.mark.parametrize(("width", "pairs"), [(40, 16), (64, 24), (288, 144)])
def test_what_native_does_not_read_goes_to_the_reference(width, pairs):
    known = known_for("int4", width, pairs=pairs)
    keys, values = rows(20, width)
    with pytest.raises(ValueError, match="'native' cannot take"):
        kv_extend_bare(known, Held.none(known, keys), keys, values, impl="native")
    held = kv_extend_bare(known, Held.none(known, keys), keys, values)
    q = normal(2, 4, 1, width)
    with pytest.raises(ValueError, match="'native' cannot take"):
        kv_decode_bare(q, known, held, impl="native")
    got = kv_decode_bare(q, known, held)
    assert relative(got, formula(q, *numbers(known, held))) < POSITIONS


def test_what_does_not_fit_is_refused():
    known = known_for("int4", 64)
    held = filled(known)
    keys, values = rows(3, 64)
    for q in (normal(2, 4, 1, 32), normal(2, 5, 1, 64), normal(1, 4, 1, 64)):
        with pytest.raises(ValueError, match="do not fit a cache"):
            kv_decode_bare(q, known, held)
    for pair in ((keys[:, :1], values[:, :1]), (keys, values[:, :, :2]), (keys[..., :32],) * 2):
        with pytest.raises(ValueError, match="do not follow"):
            kv_extend_bare(known, held, *pair)
    with pytest.raises(LookupError, match="unknown implementation 'triton'"):
        kv_decode_bare(normal(2, 4, 1, 64), known, held, impl="triton")
