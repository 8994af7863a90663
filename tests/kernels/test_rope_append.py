"""Rotate, quantise, write: float64 formula by complex numbers, invariants, negative controls."""

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_decode import Rows, empty, kv_decode, quantise
from compresskit_kernels.kv_decode.cases import KINDS
from compresskit_kernels.rope_append import cases, reference, rope_append


def angles(tokens, width, batch=1, first=0):
    """Angles `[batch, tokens, width / 2]` of the usual frequencies, each sequence 100 further on."""
    at = first + torch.arange(tokens).float() + 100 * torch.arange(batch).unsqueeze(1)
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return at.unsqueeze(2) * frequencies


def tables(angle):
    """Cosines and sines as transformers lays them out: both halves alike."""
    return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)


def rotated(x, angle):
    """x `[B, H, T, D]` in float64, its pairs turned in the complex plane."""
    half = angle.shape[-1]
    x = x.double()
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous())
    angle = angle.double().unsqueeze(1)
    turned = pairs * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def make(shape, kinds=KINDS[0], dtype=torch.float32, scales=torch.float32):
    torch.manual_seed(shape.slots)
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.width)
    q = torch.randn(shape.batch, shape.heads, shape.tokens, shape.width).to(dtype)
    k, v = torch.randn(size).to(dtype), (torch.randn(size) + 1).to(dtype)
    room = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    key, key_groups, value, value_groups = kinds
    keys = empty(key, room, group=shape.width // key_groups, dtype=scales)
    values = empty(value, room, group=shape.width // value_groups, dtype=scales)
    return q, k, v, keys, values, torch.tensor(shape.starts, dtype=torch.int32)


def expected(shape, k, v, keys, values, angle):
    """What the cache should hold, built slot by slot."""
    for side, rows in ((keys, rotated(k, angle)), (values, v.double())):
        group = side.width // side.groups
        new = quantise(rows.float(), side.kind, group=group, dtype=side.scales.dtype)
        want = empty(side.kind, (*k.shape[:2], shape.slots, side.width), group=group)
        out = want.dequantise()
        for b in range(shape.batch):
            for t in range(shape.tokens):
                out[b, :, shape.starts[b] + t] = new.dequantise()[b, :, t]
        yield out


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_the_reference_follows_the_formula(shape, kinds):
    q, k, v, keys, values, starts = make(shape, kinds)
    angle = angles(shape.tokens, shape.width, shape.batch)
    got = rope_append(q, k, v, *tables(angle), keys, values, starts)
    torch.testing.assert_close(got.double(), rotated(q, angle), rtol=0, atol=2e-5)
    for side, want in zip((keys, values), expected(shape, k, v, keys, values, angle), strict=True):
        difference = (side.dequantise() - want).abs()
        # A number between two codes may fall on either side of the last bit of a rotation.
        apart = difference > 1e-4
        assert apart.float().mean() <= cases.SHARE_APART
        step = side.scales.float().amax() * (32 if side.kind == "fp8" else cases.CODES_APART)
        assert difference.max() <= 1.01 * step
        assert want.abs().sum() > 0


def test_other_slots_stay_as_they_are():
    shape = cases.SHAPES[1]
    q, k, v, keys, values, starts = make(shape)
    keys.codes.fill_(7)
    rope_append(q, k, v, *tables(angles(3, 64)), keys, values, starts)
    written = (keys.codes != 7).any(-1).any(1)
    assert written.nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 17], [1, 18], [1, 19]]


def test_a_part_of_each_row_may_stay_unrotated():
    """Partial rotary embeddings: the first 32 of 64 numbers turn."""
    q, k, v, keys, values, starts = make(cases.SHAPES[1])
    angle = angles(3, 32)
    got = rope_append(q, k, v, *tables(angle), keys, values, starts)
    torch.testing.assert_close(got.double(), rotated(q, angle), rtol=0, atol=2e-5)
    assert torch.equal(got[..., 32:], q[..., 32:])


def test_one_by_one_is_the_same_as_at_once():
    shape = cases.SHAPES[2]
    q, k, v, keys, values, starts = make(shape, KINDS[4])
    _, _, _, keys1, values1, _ = make(shape, KINDS[4])
    cos, sin = tables(angles(shape.tokens, shape.width))
    rope_append(q, k, v, cos, sin, keys, values, starts)
    for t in range(shape.tokens):
        one = slice(t, t + 1)
        rope_append(
            q[:, :, one], k[:, :, one], v[:, :, one], cos[:, one], sin[:, one], keys1, values1,
            starts + t,
        )  # fmt: skip
    for side, other in ((keys, keys1), (values, values1)):
        for ours, theirs in zip(side.tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(ours, theirs)


def test_appended_rows_are_attended_to():
    """Both operations of a decoding step together, against dense attention on rotated rows."""
    q, k, v, keys, values, starts = make(cases.Shape(1, 4, 2, 6, 9, 64, (0,)))
    angle = angles(6, 64)
    turned = rope_append(q, k, v, *tables(angle), keys, values, starts)
    got = kv_decode(turned, keys, values, lengths=starts + 6)
    want = torch.nn.functional.scaled_dot_product_attention(
        rotated(q, angle), rotated(k, angle), v.double(), is_causal=True, enable_gqa=True
    )
    error = float((got.double() - want).norm() / want.norm())
    assert 1e-4 < error < 2e-2  # that of int8 rows: neither exact nor wrong


def test_the_queries_keep_their_type_and_the_record_names_the_routine():
    dispatch.reset()
    q, k, v, keys, values, starts = make(cases.SHAPES[0], dtype=torch.bfloat16)
    got = rope_append(q, k, v, *tables(angles(1, 32)), keys, values, starts)
    assert got.dtype == torch.bfloat16
    assert dispatch.used() == {"rope_append": (reference.ROUTINE.routine,)}
    dispatch.reset()


def test_a_wrong_position_is_noticed():
    """Negative control: an angle one token off breaks the tolerance of every case."""
    shape = cases.SHAPES[1]
    q, k, v, keys, values, starts = make(shape)
    got = rope_append(q, k, v, *tables(angles(3, 64, first=1)), keys, values, starts)
    assert (got - rotated(q, angles(3, 64))).abs().max() > 0.1
    want = next(expected(shape, k, v, keys, values, angles(3, 64)))
    assert ((keys.dequantise() - want).abs() > 1e-4).float().mean() > 10 * cases.SHARE_APART


@pytest.mark.parametrize(
    ("starts", "message"),
    [([-1, 0], "slots -1 to 2"), ([0, 18], "slots 0 to 20 of a cache with room for 20")],
)
def test_tokens_beyond_the_capacity_are_refused(starts, message):
    q, k, v, keys, values, _ = make(cases.SHAPES[1])
    with pytest.raises(ValueError, match=message):
        rope_append(q, k, v, *tables(angles(3, 64)), keys, values, torch.tensor(starts))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, keys, values, starts = make(cases.SHAPES[1])
    cos, sin = tables(angles(3, 64))
    with pytest.raises(ValueError, match=r"should be \[B, H, T, D\]"):
        rope_append(q[:, :, :2], k, v, cos, sin, keys, values, starts)
    with pytest.raises(ValueError, match="does not take keys"):
        rope_append(q, k, v, cos, sin, empty("int8", (2, 3, 20, 64)), values, starts)
    with pytest.raises(ValueError, match="cosines"):
        rope_append(q, k, v, cos[:, :2], sin[:, :2], keys, values, starts)
    with pytest.raises(ValueError, match="63 rotated numbers"):
        rope_append(q, k, v, cos[..., :63], sin[..., :63], keys, values, starts)
    with pytest.raises(ValueError, match="starts"):
        rope_append(q, k, v, cos, sin, keys, values, starts[:1])
    with pytest.raises(ValueError, match=r"'triton' cannot take .*CUDA device"):
        rope_append(q, k, v, cos, sin, keys, values, starts, impl="triton")


def test_rows_can_be_views_of_a_larger_buffer():
    q, k, v, keys, values, starts = make(cases.SHAPES[1])
    roomy = empty("int8", (2, 2, 50, 64))
    view = Rows("int8", roomy.codes[:, :, 5:25], roomy.scales[:, :, 5:25])
    rope_append(q, k, v, *tables(angles(3, 64)), view, values, starts)
    rope_append(q, k, v, *tables(angles(3, 64)), keys, values, starts)
    assert torch.equal(roomy.codes[:, :, 5:25], keys.codes)
    assert not roomy.codes[:, :, 25:].any()
