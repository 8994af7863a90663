"""Attention over a quantised cache: float64 formula, invariants, refusals, negative controls."""

import math

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_decode import (
    Rows,
    cases,
    empty,
    kv_decode,
    native,
    quantise,
    reference,
)
from compresskit_kernels.native import build
from torch.nn import functional

needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]


def e4m3(byte):
    """The number of one byte, from the definition of the format (OCP OFP8, table 1)."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([e4m3(b) for b in range(256)], dtype=torch.float64)


def numbers(rows):
    """The stored rows in float64, read without the library's own dequantisation."""
    if rows.kind == "fp8":
        levels = E4M3[rows.codes.view(torch.uint8).long()]
    elif rows.kind == "int4":
        levels = torch.cat([rows.codes % 16, rows.codes // 16], dim=-1).double()
    else:
        levels = rows.codes.double()
    out = torch.empty_like(levels)
    group = rows.width // rows.groups
    for d in range(rows.width):
        out[..., d] = levels[..., d] * rows.scales[..., d // group].double()
        if rows.offsets is not None:
            out[..., d] += rows.offsets[..., d // group].double()
    return out


def formula(q, keys, values, lengths=None, mask=None, scale=None):
    """The contract in float64, one query at a time."""
    batch, heads, queries, width = q.shape
    keys, values = numbers(keys), numbers(values)
    share = heads // keys.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        length = keys.shape[2] if lengths is None else int(lengths[b])
        for i in range(queries):
            seen = torch.arange(max(0, length - queries + i + 1))
            if mask is not None:
                seen = seen[mask[b, seen]]
            if not len(seen):
                continue
            for h in range(heads):
                scores = keys[b, h // share, seen] @ q[b, h, i].double()
                weights = torch.softmax(scores * (scale or 1 / math.sqrt(width)), dim=0)
                out[b, h, i] = weights @ values[b, h // share, seen]
    return out


def make(shape, kinds=cases.KINDS[0], dtype=torch.float32):
    """Random q and cache of one case; the values are not centred, as real ones are not."""
    torch.manual_seed(shape.slots)
    key, key_groups, value, value_groups = kinds
    size = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    keys = quantise(torch.randn(size) + 0.3, key, group=shape.width // key_groups)
    values = quantise(
        torch.randn(size) + 0.5, value, group=shape.width // value_groups, dtype=torch.float16
    )
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.width).to(dtype)
    lengths = None if shape.lengths is None else torch.tensor(shape.lengths, dtype=torch.int32)
    return q, keys, values, lengths


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_follows_the_formula(impl, shape, kinds):
    q, keys, values, lengths = make(shape, kinds)
    got = kv_decode(q, keys, values, lengths=lengths, impl=impl)
    want = formula(q, keys, values, lengths)
    assert got.shape == q.shape
    assert relative(got, want) < cases.RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_has_the_type_of_the_queries(dtype):
    q, keys, values, lengths = make(cases.SHAPES[2], dtype=dtype)
    got = kv_decode(q, keys, values, lengths=lengths)
    assert got.dtype == dtype
    limit = cases.RELATIVE_ERROR.get(dtype, 2e-6)
    assert relative(got, formula(q, keys, values, lengths)) < limit


def test_it_is_the_attention_of_torch_where_all_is_seen():
    q, keys, values, _ = make(cases.Shape(2, 8, 2, 1, 50, 64))
    want = functional.scaled_dot_product_attention(
        q.double(), numbers(keys), numbers(values), enable_gqa=True
    )
    assert relative(kv_decode(q, keys, values), want) < 2e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 4])
def test_masks_and_a_scale_of_ones_own(queries, impl):
    q, keys, values, lengths = make(cases.Shape(2, 4, 2, queries, 60, 32, (60, 31)))
    mask = torch.rand(2, 60) > 0.4
    got = kv_decode(q, keys, values, lengths=lengths, mask=mask, scale=0.7, impl=impl)
    assert relative(got, formula(q, keys, values, lengths, mask, 0.7)) < 2e-6


def test_stretches_join_without_seams(monkeypatch):
    q, keys, values, lengths = make(cases.SHAPES[5])
    whole = kv_decode(q, keys, values, lengths=lengths, impl="reference")
    monkeypatch.setattr(reference, "STRETCH", 17)
    parts = kv_decode(q, keys, values, lengths=lengths, impl="reference")
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros():
    q, keys, values, _ = make(cases.SHAPES[3])
    got = kv_decode(q, keys, values, lengths=torch.tensor([0, 2]))
    assert not got[0].any()
    assert not got[1, :, 0].any()
    assert got[1, :, 1].abs().min() > 0
    assert not kv_decode(q, keys, values, mask=torch.zeros(2, 100, dtype=torch.bool)).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_slots_that_nobody_sees_may_hold_anything(kind, masked, impl):
    q, keys, values, lengths = make(cases.SHAPES[2], (kind, 1, kind, 1))
    options = {"lengths": lengths, "impl": impl}
    if masked:
        seen = torch.ones(2, 41, dtype=torch.bool)
        seen[1, 7:-2] = False
        options = {"mask": seen, "impl": impl}
    clean = kv_decode(q, keys, values, **options)
    for side in (keys, values):
        side.scales[1, :, 7:-2] = torch.nan
        side.scales[1, :, -2:] *= 1 if masked else torch.nan
    assert torch.equal(kv_decode(q, keys, values, **options), clean)


def test_a_sequence_does_not_depend_on_the_others():
    q, keys, values, lengths = make(cases.SHAPES[5])
    together = kv_decode(q, keys, values, lengths=lengths)
    alone = [Rows(r.kind, r.codes[2:], r.scales[2:]) for r in (keys, values)]
    got = kv_decode(q[2:], *alone, lengths=lengths[2:])
    torch.testing.assert_close(got[0], together[2], rtol=1e-5, atol=1e-6)


def test_drafted_tokens_at_once_are_the_same_as_one_by_one():
    """Verification of a draft: query i sees the cache as it was after token i."""
    q, keys, values, _ = make(cases.Shape(1, 4, 2, 5, 40, 64))
    together = kv_decode(q, keys, values, lengths=torch.tensor([40]))
    for i in range(5):
        one = kv_decode(q[:, :, i : i + 1], keys, values, lengths=torch.tensor([36 + i]))
        torch.testing.assert_close(one[:, :, 0], together[:, :, i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("group", [64, 32])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_the_error_of_a_stored_number_is_bounded(kind, group, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 64) * torch.logspace(-3, 2, 50).unsqueeze(1) + 0.1
    x[0, 0, 0] = 0
    x[0, 0, 1] = 5  # a row without a spread
    rows = quantise(x, kind, group=group, dtype=dtype)
    assert rows.groups == 64 // group
    error = (numbers(rows) - x.double()).abs()
    step = rows.scales.double().repeat_interleave(group, dim=-1)
    slack = 1.01 if dtype == torch.float32 else 1.2  # the grid itself is rounded
    limit = step / 2
    if kind == "fp8":
        limit = torch.maximum(x.double().abs() * 2**-4, step * 2**-10)
    if kind == "int4" and dtype == torch.float16:
        limit = limit + x.abs().double() * 2**-11  # the offset is rounded as well
    assert (error <= limit * slack + 1e-7).all()


def test_bytes_of_a_row():
    """D + scale, D/2 + scale and offset of each group of 64, D + scale; in bytes of float16."""
    for kind, group, want in (("int8", 128, 130), ("int4", 64, 72), ("fp8", 128, 130)):
        rows = empty(kind, (2, 3, 7, 128), group=group, dtype=torch.float16)
        assert sum(t.nbytes for t in rows.tensors().values()) == 2 * 3 * 7 * want
        assert rows.width == 128
        assert not rows.dequantise().any()


def test_a_scale_shared_by_all_tokens_takes_no_memory():
    q, keys, values, _ = make(cases.SHAPES[1])
    shared = torch.tensor([0.01]).expand(1, 4, 129, 1)
    assert shared.untyped_storage().nbytes() == 4
    got = kv_decode(q, Rows("int8", keys.codes, shared), values)
    spelled = kv_decode(q, Rows("int8", keys.codes, shared.contiguous()), values)
    assert torch.equal(got, spelled)


def test_the_record_names_what_ran():
    dispatch.reset()
    q, keys, values, _ = make(cases.SHAPES[0])
    kv_decode(q, keys, values, impl="reference")
    assert dispatch.used() == {"kv_decode": (reference.ROUTINE.routine,)}
    dispatch.reset()
    kv_decode(q, keys, values)
    wanted = native.ATTEND if build.available() else reference.ROUTINE
    assert dispatch.used() == {"kv_decode": (wanted.routine,)}
    dispatch.reset()


def test_an_explicit_choice_that_cannot_run_raises():
    q, keys, values, _ = make(cases.SHAPES[0])
    with pytest.raises(ValueError, match=r"kv_decode: 'triton' cannot take .*CUDA device.*'auto'"):
        kv_decode(q, keys, values, impl="triton")
    with dispatch.forced("triton"), pytest.raises(ValueError, match="CUDA"):
        kv_decode(q, keys, values)
    with pytest.raises(LookupError, match=r"'cuda'\. Known: auto, triton, native, reference"):
        kv_decode(q, keys, values, impl="cuda")
    with pytest.raises(ValueError, match="nothing supports int64"):
        kv_decode(q.long(), keys, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :, :, :32], k, v, {}), "do not fit a cache"),
        (lambda q, k, v: (q[:, :5], k, v, {}), "multiple"),
        (lambda q, k, v: (q[0], k, v, {}), "do not fit a cache"),
        (lambda q, k, v: (q, k, v.between(0, 9), {}), "differ in shape"),
        (lambda q, k, v: (q, k, v, {"lengths": torch.tensor([3])}), "should be"),
        (lambda q, k, v: (q, k, v, {"mask": torch.ones(2, 3, dtype=torch.bool)}), "the mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    q, keys, values, _ = make(cases.SHAPES[2])
    q, keys, values, options = change(q, keys, values)
    with pytest.raises(ValueError, match=message):
        kv_decode(q, keys, values, **options)


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="rows of 64 numbers do not split into groups of 24"):
        quantise(torch.ones(1, 1, 1, 64), "int8", group=24)
    with pytest.raises(ValueError, match="halves"):
        quantise(torch.ones(1, 1, 1, 7), "int4")
    with pytest.raises(ValueError, match=r"unknown kind 'int5'\. Known: int8, fp8, int4, int3"):
        quantise(torch.ones(1, 1, 1, 8), "int5")


@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_a_wrong_scale_a_shift_and_swapped_halves_are_noticed(kinds):
    """Negative controls: each must break the tolerance by far."""
    q, keys, values, lengths = make(cases.SHAPES[2], kinds)
    want = formula(q, keys, values, lengths)
    limit = cases.RELATIVE_ERROR[torch.bfloat16]

    def wrong(keys, values, lengths):
        return relative(kv_decode(q, keys, values, lengths=lengths), want)

    for side in (0, 1):
        pair = [keys, values]
        scales = pair[side].scales.clone()
        scales[:, :, 3] *= 1.5
        pair[side] = Rows(pair[side].kind, pair[side].codes, scales, pair[side].offsets)
        assert wrong(*pair, lengths) > limit
        shifted = [keys, values]
        rolled = {n: t.view(torch.uint8).roll(1, 2).view(t.dtype) if n == "codes" else t.roll(1, 2)
                  for n, t in shifted[side].tensors().items()}  # fmt: skip
        shifted[side] = Rows(shifted[side].kind, **rolled)
        assert wrong(*shifted, lengths) > limit
    assert wrong(keys, values, lengths - 1) > limit
    if values.kind == "int4":
        swapped = values.codes >> 4 | values.codes << 4
        assert wrong(keys, Rows("int4", swapped, values.scales, values.offsets), lengths) > limit
