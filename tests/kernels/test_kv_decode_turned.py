"""Attention over turned codes: every way against the formula in float64, which turns the rows back."""

import math

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_decode import kv_decode, quantise, quantise_to
from compresskit_kernels.kv_decode.turned import kv_decode_turned
from compresskit_kernels.native import build

needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]
LIMIT = 3e-6
"""Relative, float32 against float64."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=9):
    return torch.linalg.qr(normal(width, width, seed=seed))[0].contiguous()


def levels(bits):
    """Rising, not evenly spaced, not symmetric."""
    half = torch.linspace(0.1, 1.6, 2 ** (bits - 1)) ** 2
    return torch.cat((-half.flip(0), half * 1.1))


def coded(kind, x):
    if kind in ("int8", "fp8"):
        return quantise(x, kind, dtype=torch.bfloat16)
    scales = x.norm(dim=-1, keepdim=True).bfloat16() / x.shape[-1] ** 0.5
    return quantise_to(x, kind, levels(int(kind[3])), scales)


def sides(kind, width, slots=53):
    return coded(kind, normal(2, 2, slots, width)), coded(kind, normal(2, 2, slots, width, seed=1))


def formula(q, keys, values, turn, mask=None):
    """Attention in float64 over rows that are turned back first."""
    share, (queries, slots) = q.shape[1] // keys.codes.shape[1], (q.shape[2], keys.slots)
    back = turn.double().inverse()
    keys, values = ((rows.dequantise().double() @ back) for rows in (keys, values))
    keys, values = (x.repeat_interleave(share, dim=1) for x in (keys, values))
    seen = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)
    if mask is not None:
        seen = seen & mask[:, None, None]
    scores = (q.double() @ keys.transpose(2, 3)) / math.sqrt(q.shape[3])
    return scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0) @ values


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "int3", "int2"])
def test_every_way_follows_the_formula(kind, width, queries, impl):
    keys, values = sides(kind, width)
    turn = rotation(width)
    q = normal(2, 6, queries, width, seed=2)
    mask = torch.rand(2, 53, generator=torch.Generator().manual_seed(3)) > 0.3
    got = kv_decode_turned(q, keys, values, turn, mask=mask, impl=impl)
    want = formula(q, keys, values, turn, mask)
    assert got.shape == q.shape
    assert relative(got, want) < LIMIT
    # Negative controls: turned the other way, and not at all.
    assert relative(kv_decode_turned(q, keys, values, turn.T.contiguous(), impl=impl), want) > 0.01
    assert relative(kv_decode(q, keys, values, impl=impl), want) > 0.01


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "int2"])
def test_bfloat16_queries_cost_no_more_than_rounding_the_result(kind, width, impl):
    """Neither turned queries nor levels are rounded to anything that would show."""
    keys, values = sides(kind, width, 200)
    turn = rotation(width)
    q = (normal(2, 6, 2, width, seed=2) * 2).bfloat16()
    want = formula(q, keys, values, turn)
    rounded = relative(want.bfloat16(), want)
    got = relative(kv_decode_turned(q, keys, values, turn, impl=impl), want)
    assert got < 1.01 * rounded
    # Negative control: queries turned and rounded in between, as two calls of torch do it.
    between = (q.float() @ turn).bfloat16()
    apart = (kv_decode(between, keys, values, impl=impl).float() @ turn.T).bfloat16()
    assert relative(apart, want) > 1.1 * rounded


@needs_native
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kind", ["int4", "int3", "int2"])
def test_sums_of_words_pass_no_limit(kind, width):
    """The largest sums there are: every level the largest, query and weights aligned with them."""
    x = torch.ones(1, 1, 32, width) * 9
    rows = quantise_to(x, kind, levels(int(kind[3])), torch.ones(1, 1, 32, 1))
    assert (rows.dequantise() == levels(int(kind[3]))[-1]).all()
    # Whatever the weights are and how they round, the mean of one number is that number.
    keys = coded(kind, normal(1, 1, 32, width))
    q = (normal(1, 64, 8, width, seed=4) * 2).bfloat16()
    got = kv_decode_turned(q, keys, rows, torch.eye(width), impl="native")
    torch.testing.assert_close(
        got.float(), rows.dequantise()[0, 0, 0].expand(q.shape), rtol=5e-3, atol=0
    )
    for q in (torch.ones(1, 1, 1, width), torch.eye(width)[None, None, :1]):
        turn = torch.eye(width)
        want = formula(q, rows, rows, turn)
        got = kv_decode_turned(q.bfloat16(), rows, rows, turn, impl="native")
        assert relative(got, want) < 8e-3
        # Scores, too: one row that is a little further along takes all the weight.
        moved = rows.scales.clone()
        moved[0, 0, 5] = 1 + 60 / width
        keys = quantise_to(x * moved, kind, levels(int(kind[3])), moved)
        values = coded(kind, normal(1, 1, 32, width))
        want = formula(q, keys, values, turn)
        got = kv_decode_turned(q.bfloat16(), keys, values, turn, impl="native")
        assert relative(got, want) < 8e-3


def test_one_way_turns_inside_and_the_others_around():
    keys, values = sides("int4", 64)
    q, turn = normal(2, 6, 1, 64), rotation(64)
    used = {}
    for impl in ("auto", "reference"):
        dispatch.reset()
        kv_decode_turned(q, keys, values, turn, impl=impl)
        used[impl] = dispatch.used()["kv_decode"]
        dispatch.reset()
    assert len(used["auto"]) == len(used["reference"]) == 1
    assert used["auto"][0].startswith("native" if build.available() else "reference")
    assert used["reference"][0].startswith("reference")


def test_what_does_not_fit_is_refused():
    keys, values = sides("int4", 64)
    q, turn = normal(2, 6, 1, 64), rotation(64)
    with pytest.raises(ValueError, match="does not turn rows of 64"):
        kv_decode_turned(q, keys, values, turn[:32, :32])
    with pytest.raises(ValueError, match="'native' cannot take"):
        kv_decode_turned(q, keys, values, turn.T, impl="native")
    got = kv_decode_turned(q, keys, values, turn.T)
    assert relative(got, formula(q, keys, values, turn.T)) < LIMIT
    with pytest.raises(LookupError, match="unknown implementation 'cuda'"):
        kv_decode_turned(q, keys, values, turn, impl="cuda")
