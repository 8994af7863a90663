"""Attention of one token, against the formula in float64."""

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.decode_attention import decode_attention
from compresskit_kernels.native import build

torch.set_num_threads(1)
needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "sdpa"]
SHAPES = [
    (1, 9, 3, 64, 160),
    (2, 4, 1, 256, 33),
    (1, 8, 8, 32, 1),
    (3, 12, 2, 128, 70),
    (1, 7, 1, 96, 17),
]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def drawn(batch, heads, key_heads, width, length, dtype=torch.float32):
    """Strided as they come: a query seen through its heads, keys cut from a longer buffer."""
    torch.manual_seed(length)
    query = torch.randn(batch, 1, heads, width).to(dtype).transpose(1, 2)
    key = torch.randn(batch, key_heads, length + 5, width).to(dtype)[:, :, :length]
    value = torch.randn(batch, length, key_heads, width).to(dtype).transpose(1, 2)
    return query, key, value


def formula(query, key, value, scale):
    heads = query.shape[1] // key.shape[1]
    key = key.double().repeat_interleave(heads, dim=1)
    value = value.double().repeat_interleave(heads, dim=1)
    scores = (query.double() @ key.transpose(2, 3)) * scale
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_follows_the_formula(impl, shape, dtype):
    query, key, value = drawn(*shape, dtype)
    got = decode_attention(query, key, value, 0.2, impl=impl)
    assert got.shape == (shape[0], 1, shape[1], shape[3])
    assert got.dtype is dtype
    assert relative(got, formula(query, key, value, 0.2)) < LIMIT[dtype]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_vanish(impl):
    query, key, value = drawn(1, 4, 2, 64, 40)
    for factor in (0.0, 1.0, 300.0):
        got = decode_attention(query * factor, key, value, impl=impl)
        assert relative(got, formula(query * factor, key, value, 64**-0.5)) < 2e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
def test_a_changed_number_is_noticed(impl, spoilt):
    """Negative control: a head seen through the wrong group, a token left out, a value of another."""
    query, key, value = drawn(1, 6, 2, 64, 40)
    want = formula(query, key, value, 64**-0.5)
    if spoilt == "query":
        query = query.flip(1)
    elif spoilt == "key":
        key, value = key[:, :, :-1], value[:, :, :-1]
    else:
        value = value.flip(2)
    assert relative(decode_attention(query, key, value, impl=impl), want) > 0.01


@needs_native
def test_a_row_of_a_batch_is_the_row_alone():
    query, key, value = drawn(3, 6, 2, 64, 40, torch.bfloat16)
    together = decode_attention(query, key, value, impl="native")
    for row in range(3):
        part = slice(row, row + 1)
        alone = decode_attention(query[part], key[part], value[part], impl="native")
        assert torch.equal(alone[0], together[row])


@needs_native
def test_the_same_bits_on_two_threads():
    query, key, value = drawn(2, 8, 4, 128, 1500)
    alone = decode_attention(query, key, value, impl="native")
    torch.set_num_threads(2)
    try:
        assert torch.equal(decode_attention(query, key, value, impl="native"), alone)
    finally:
        torch.set_num_threads(1)


def test_what_native_cannot_take_goes_to_torch_or_is_refused():
    query, key, value = drawn(1, 4, 2, 24, 10)  # a head size that is no multiple of 32
    dispatch.reset()
    decode_attention(query, key, value)
    assert dispatch.used() == {"decode_attention": ("torch: scaled_dot_product_attention",)}
    dispatch.reset()
    with pytest.raises(ValueError, match="multiple of 32"):
        decode_attention(query, key, value, impl="native")
    with pytest.raises(ValueError, match="unknown implementation 'flash'"):
        decode_attention(query, key, value, impl="flash")
