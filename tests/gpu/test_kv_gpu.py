"""The kernels of the cache and the fused norm on a real GPU, bfloat16 and CUDA graphs included."""

from importlib.util import find_spec

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.kv_decode import Rows, cases, empty, kv_decode, quantise
from compresskit_kernels.norm_quantise import norm_quantise
from compresskit_kernels.rope_append import cases as rope_cases, rope_append

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = (
    cases.Shape(1, 32, 8, 1, 32768, 128),
    cases.Shape(4, 32, 8, 8, 5000, 128, (5000, 4999, 17, 8)),
    cases.Shape(2, 16, 16, 1, 3000, 256),
    cases.Shape(2, 64, 4, 8, 700, 64, (700, 600)),
)


def attention_case(shape, kinds, dtype):
    torch.manual_seed(shape.slots)
    key, key_groups, value, value_groups = kinds
    size = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    keys = quantise(torch.randn(size, device="cuda") + 0.3, key, group=shape.width // key_groups,
                    dtype=torch.float16)  # fmt: skip
    values = quantise(torch.randn(size, device="cuda") + 0.5, value,
                      group=shape.width // value_groups, dtype=torch.float16)  # fmt: skip
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.width, device="cuda").to(dtype)
    lengths = shape.lengths and torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
    return q, keys, values, lengths


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
@pytest.mark.parametrize("shape", [*cases.SHAPES, *LARGE], ids=str)
def test_attention_follows_its_reference(shape, kinds, dtype):
    q, keys, values, lengths = attention_case(shape, kinds, dtype)
    dispatch.reset()
    got = kv_decode(q, keys, values, lengths=lengths, impl="triton")
    assert dispatch.used()["kv_decode"][0].startswith("triton")
    want = kv_decode(q.float(), keys, values, lengths=lengths, impl="reference")
    assert relative(got, want) < cases.RELATIVE_ERROR[dtype]
    assert torch.equal(got, kv_decode(q, keys, values, lengths=lengths, impl="triton"))


@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_masks_and_unseen_slots(kinds):
    q, keys, values, lengths = attention_case(LARGE[1], kinds, torch.bfloat16)
    mask = torch.rand(4, 5000, device="cuda") > 0.3
    values.scales.masked_fill_(~mask[:, None, :, None], torch.nan)
    got = kv_decode(q, keys, values, lengths=lengths, mask=mask, impl="triton")
    want = kv_decode(q.float(), keys, values, lengths=lengths, mask=mask, impl="reference")
    assert relative(got, want) < cases.RELATIVE_ERROR[torch.bfloat16]


def test_a_wrong_scale_is_noticed():
    q, keys, values, lengths = attention_case(LARGE[1], cases.KINDS[0], torch.bfloat16)
    want = kv_decode(q, keys, values, lengths=lengths, impl="reference")
    scales = values.scales.clone()
    scales[:, :, ::7] *= 1.5
    spoilt = Rows(values.kind, values.codes, scales)
    got = kv_decode(q, keys, spoilt, lengths=lengths, impl="triton")
    assert relative(got, want) > 2 * cases.RELATIVE_ERROR[torch.bfloat16]


def test_one_graph_serves_every_length():
    q, keys, values, _ = attention_case(LARGE[0], cases.KINDS[0], torch.bfloat16)
    lengths = torch.tensor([32768], dtype=torch.int32, device="cuda")
    kv_decode(q, keys, values, lengths=lengths, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kv_decode(q, keys, values, lengths=lengths, impl="triton")
    for length in (32768, 1000, 1):
        lengths.fill_(length)
        graph.replay()
        want = kv_decode(q, keys, values, lengths=lengths, impl="reference")
        assert relative(out, want) < cases.RELATIVE_ERROR[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
@pytest.mark.parametrize("shape", rope_cases.SHAPES, ids=str)
def test_appending_follows_its_reference(shape, kinds, dtype):
    torch.manual_seed(shape.slots)
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.width)
    q = torch.randn(shape.batch, shape.heads, *size[2:], device="cuda").to(dtype)
    k, v = (torch.randn(size, device="cuda").to(dtype) for _ in range(2))
    angle = 6 * torch.rand(1, shape.tokens, shape.width // 2, device="cuda")
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    starts = torch.tensor(shape.starts, dtype=torch.int32, device="cuda")
    room = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    ours, theirs = (
        [
            empty(kind, room, group=shape.width // groups, dtype=torch.float16, device="cuda")
            for kind, groups in (kinds[:2], kinds[2:])
        ]
        for _ in range(2)
    )
    got = rope_append(q, k, v, cos, sin, *ours, starts, impl="triton")
    want = rope_append(q, k, v, cos, sin, *theirs, starts, impl="reference")
    torch.testing.assert_close(got, want)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.levels() != other.levels()).float().mean() <= rope_cases.SHARE_APART
        assert relative(mine.dequantise(), other.dequantise()) < 1e-2
        assert mine.dequantise().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 576), (5, 4096), (2, 16384)], ids=str)
def test_norm_follows_its_reference(shape, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[1], device="cuda")
    got = norm_quantise(x, weight, shift=1.0, impl="triton")
    want = norm_quantise(x, weight, shift=1.0, impl="reference")
    torch.testing.assert_close(got.steps, want.steps, rtol=1e-5, atol=0)
    apart = (got.codes.int() - want.codes.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 5e-3
    wrong = norm_quantise(x, weight, shift=0.0, impl="triton")
    assert shape == (1, 1) or not torch.equal(wrong.codes, want.codes)
