"""The Triton products against the formula, on real hardware."""

from importlib.util import find_spec

import pytest
import torch
from compresskit_kernels import (
    dispatch,
    fp8_matmul,
    grouped_matmul,
    int8_dynamic_matmul,
    int8_matmul,
)
from compresskit_kernels.activations import round_rows
from compresskit_kernels.packing import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

# Rounding of x's type, or of tf32 on the tensor cores; sums are float32 throughout.
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-3}
BOOK = tuple(torch.linspace(-1, 1, 16).bfloat16().tolist())
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*E2M1, *(-level for level in E2M1))
ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 200)


@pytest.fixture(autouse=True)
def clean_record():
    dispatch.reset()
    yield
    dispatch.reset()


def grouped(n, k, bits, group, kind):
    groups = -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), device="cuda")
    scales = torch.rand(n, groups, device="cuda").add(0.1).bfloat16()
    beside = {}
    if kind == "offsets":
        beside["offsets"] = torch.randn(n, groups, device="cuda").bfloat16()
    elif kind == "zeros":
        beside["zeros"] = torch.randint(0, 2**bits, (n, groups), device="cuda", dtype=torch.uint8)
    elif kind in ("book", "e2m1"):
        beside["table"] = BOOK if kind == "book" else E2M1
    return grouped_matmul.GroupedWeight(pack(codes, bits), scales, k, group, bits, **beside)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def check(op, weight, x):
    assert dispatch.choose(op, x, weight).name == "triton"
    got = dispatch.choose(op, x, weight).prepare(weight)(x)
    assert got.dtype == x.dtype
    assert relative(got, x.double() @ weight.dequantise().double().T) < LIMIT[x.dtype]
    assert all(name.startswith("triton") for name in dispatch.used()[op.name])


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", [(576, 1536), (1000, 577), (4096, 4096)], ids=str)
@pytest.mark.parametrize("kind", ["symmetric", "offsets", "zeros", "book", "e2m1"])
def test_four_bits(kind, shape, dtype):
    n, k = shape
    for group in (32, 128):
        weight = grouped(n, k, 4, group, kind)
        for rows in ROWS:
            check(grouped_matmul.OP, weight, torch.randn(rows, k, device="cuda").to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_other_widths(bits):
    for kind in ("symmetric", "zeros"):
        weight = grouped(300, 1024, bits, 64, kind)
        for rows in ROWS:
            x = torch.randn(rows, 1024, device="cuda").bfloat16()
            check(grouped_matmul.OP, weight, x)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_eight_bits_a_row(dtype):
    codes = torch.randint(-127, 128, (1000, 577), device="cuda", dtype=torch.int8)
    scales = torch.rand(1000, device="cuda").add(0.1).bfloat16()
    floats = torch.randn(1000, 577, device="cuda").mul(50).to(torch.float8_e4m3fn)
    for rows in ROWS:
        x = torch.randn(rows, 577, device="cuda").to(dtype)
        check(int8_matmul.OP, int8_matmul.Int8Weight(codes, scales), x)
        check(fp8_matmul.OP, fp8_matmul.Fp8Weight(floats, scales), x)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", [(576, 1536), (1000, 577), (4096, 4096)], ids=str)
def test_int8_activations(shape, dtype):
    n, k = shape
    codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    weight = int8_matmul.Int8Weight(codes, torch.rand(n, device="cuda").add(0.1).bfloat16())
    for rows in (*ROWS, 1000):
        x = torch.randn(rows, k, device="cuda").to(dtype)
        product = dispatch.choose(int8_dynamic_matmul.OP, x, weight).prepare(weight)
        rounded = round_rows(x)
        got, steps = product.round(x)
        assert torch.equal(steps, rounded.steps[:, 0])
        assert torch.equal(got[:, :k], rounded.codes)
        want = rounded.dequantise().double() @ weight.dequantise().double().T
        assert relative(product(x), want) < (1e-6 if dtype == torch.float32 else LIMIT[dtype])


def test_the_same_call_gives_the_same_bits_also_in_a_graph():
    weight = grouped(1024, 4096, 4, 128, "offsets")
    product = dispatch.choose(grouped_matmul.OP, torch.empty(1, 4096, device="cuda"), weight)
    product = product.prepare(weight)
    for rows in (1, 16):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        first = product(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = product(x)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, first)


def test_a_shuffled_scale_is_noticed():
    weight = grouped(256, 1024, 4, 128, "symmetric")
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    want = x.double() @ weight.dequantise().double().T
    weight.scales.copy_(weight.scales.roll(1, 1))
    got = dispatch.choose(grouped_matmul.OP, x, weight).prepare(weight)(x)
    assert relative(got, want) > 10 * LIMIT[torch.bfloat16]
