"""The ladder of the matrix products: float64 formula, reference, then the other implementations."""

from dataclasses import replace

import pytest
import torch
from compresskit_kernels import (
    activations,
    dispatch,
    fp8_matmul,
    grouped_dynamic_matmul,
    grouped_matmul,
    host,
    int8_dynamic_matmul,
    int8_matmul,
)
from compresskit_kernels.grouped_matmul import GroupedWeight, cases as grouped_cases
from compresskit_kernels.int8_matmul import Int8Weight, cases as int8_cases
from compresskit_kernels.native import build, product

from compresskit.methods.quant import int8
from compresskit.methods.quant._group import quantise

torch.set_num_threads(1)
needs_torch = pytest.mark.skipif(host.int4_block() is None, reason="no packed product on this CPU")
needs_native = pytest.mark.skipif(not build.available(), reason=build.reason())
OPS = {
    "int8": int8_matmul.OP,
    "int8_dynamic": int8_dynamic_matmul.OP,
    "grouped": grouped_matmul.OP,
    "grouped_dynamic": grouped_dynamic_matmul.OP,
    "fp8": fp8_matmul.OP,
}
IMPLEMENTATIONS = [
    *((kind, "reference") for kind in OPS),
    *(pytest.param(kind, "native", marks=needs_native) for kind in OPS),
    *(pytest.param(kind, "cpu", marks=needs_torch) for kind in ("int8", "int8_dynamic", "grouped")),
    *((kind, "dequantised") for kind in ("int8", "grouped", "fp8")),
]
MIXED = {"reference": 1e-6, "native": 6e-3, "cpu": 6e-3, "dequantised": 6e-3}
EXACT = {"reference": 1e-6, "native": 1e-6, "cpu": 1e-6}
"""Largest relative error by implementation; what rounds its inputs has only the sum left to err in."""
SHAPES = grouped_cases.SHAPES
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def weight_of(kind, n, k, **options):
    torch.manual_seed(n * 1000 + k)
    dense = torch.randn(n, k)
    if "int8" in kind:
        if n * k == 0:
            return Int8Weight(dense.to(torch.int8), torch.ones(n, dtype=torch.bfloat16))
        return int8.quantise(dense)
    if kind == "fp8":
        scales = torch.rand(n).bfloat16() + 0.5
        return fp8_matmul.Fp8Weight((dense * 40).to(torch.float8_e4m3fn), scales)
    if n * k == 0:
        packed = torch.zeros(n, 0 if k == 0 else 8, dtype=torch.uint8)
        groups = -(-k // 64)
        return GroupedWeight(packed, torch.ones(n, groups), k, 64)
    return quantise(dense, **options)


def rounded(kind, x, weight):
    """Inputs as the contract wants them, written out column by column."""
    if "dynamic" not in kind:
        return x.double()
    width = x.shape[1]
    group = width if kind == "int8_dynamic" else weight.group
    out = torch.zeros(x.shape, dtype=torch.float64)
    for start in range(0, width, max(1, group)):
        part = x[:, start : start + group].float()
        step = part.abs().amax(dim=1, keepdim=True) / 127
        codes = torch.round(part / torch.where(step > 0, step, 1.0))
        out[:, start : start + group] = codes.double() * step.double()
    return out


def dense_of(weight):
    """The weight in float64, written without the library's own unpacking."""
    if isinstance(weight, (Int8Weight, fp8_matmul.Fp8Weight)):
        return weight.codes.double() * weight.scales.double()[:, None]
    n, k = weight.shape
    dense = torch.zeros(n, k, dtype=torch.float64)
    bits, middle = weight.bits, 2 ** (weight.bits - 1)
    for column in range(k):
        code = torch.zeros(n, dtype=torch.int64)
        for bit in range(bits):
            place = column * bits + bit
            code += ((weight.packed[:, place // 8].long() >> place % 8) & 1) << bit
        g = column // weight.group
        scale = weight.scales[:, g].double() * weight.gain
        if weight.table is not None:
            dense[:, column] = torch.tensor(weight.table, dtype=torch.float64)[code] * scale
        elif weight.zeros is not None:
            dense[:, column] = (code - weight.zeros[:, g].long()) * scale
        else:
            dense[:, column] = (code - middle) * scale
            if weight.offsets is not None:
                dense[:, column] += weight.offsets[:, g].double()
    return dense


def formula(kind, x, weight):
    """The contract in float64."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    product = rounded(kind, flat, weight) @ dense_of(weight).T
    return product.view(*x.shape[:-1], weight.shape[0])


def relative(got, want):
    return float((got.double() - want).norm() / want.norm()) if want.norm() else 0.0


def prepared(kind, impl, weight):
    way = next(w for w in OPS[kind].implementations if w.name == impl)
    return way.prepare(weight)


def check(kind, impl, x, weight):
    got = prepared(kind, impl, weight)(x)
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], weight.shape[0])
    limit = (EXACT if "dynamic" in kind else MIXED)[impl]
    assert relative(got, formula(kind, x, weight)) <= limit + int8_cases.ROUNDING[x.dtype]


@pytest.mark.parametrize("dtype", int8_cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_every_implementation_follows_the_formula(kind, impl, shape, dtype):
    m, n, k = shape
    weight = weight_of(kind, n, k)
    if impl in ("cpu", "native") and (k == 0 or (impl == "cpu" and n == 0)):
        # Not its job: the automatic choice takes another.
        assert dispatch.choose(OPS[kind], torch.empty(m, k), weight).name != impl
        return
    torch.manual_seed(1)
    check(kind, impl, torch.randn(m, k).to(dtype), weight)


@needs_native
@pytest.mark.parametrize(
    "options", [{"symmetric": True}, {}, {"zero_point": "integer"}], ids=["sym", "offset", "zero"]
)
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_group(bits, group, options):
    weight = weight_of("grouped", 41, 401, bits=bits, group=group, **options)
    x = torch.randn(15, 401)  # 8 + 4 + 2 + 1 rows: every block of the kernel
    check("grouped", "native", x, weight)
    check("grouped_dynamic", "native", x, weight)
    check("grouped", "reference", x, weight)


@needs_native
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_code_books(rows, group):
    weight = weight_of("grouped", 33, 96, symmetric=True)
    scales = torch.rand(33, -(-96 // group)).bfloat16()
    weight = replace(weight, group=group, scales=scales, table=E2M1, gain=0.3)
    x = torch.randn(rows, 96)
    for impl in ("native", "reference", "dequantised"):
        check("grouped", impl, x, weight)
    assert not product.supports_grouped(weight, integer=True)


@needs_native
def test_every_e4m3_number():
    """Subnormal ones included; 0x7f and 0xff are not numbers."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    weight = fp8_matmul.Fp8Weight(
        codes.view(1, -1).view(torch.float8_e4m3fn), torch.ones(1, dtype=torch.bfloat16)
    )
    eye = torch.eye(codes.numel())
    want = weight.codes.float().flatten()
    assert torch.equal(prepared("fp8", "native", weight)(eye[:8]).flatten(), want[:8])
    for row in range(codes.numel()):
        got = prepared("fp8", "native", weight)(eye[row : row + 1])
        assert got.item() == want[row].item()


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_strided_and_batched_inputs(kind, impl, rows):
    weight = weight_of(kind, 48, 128)
    wide = torch.randn(3, rows, 256)[..., ::2]
    turned = torch.randn(3, 128, rows).transpose(1, 2)
    for x in (wide, turned, torch.randn(128)):
        check(kind, impl, x, weight)
        check(kind, impl, x.bfloat16(), weight)


@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_the_others(kind, impl):
    one = prepared(kind, impl, weight_of(kind, 192, 576))
    x = torch.randn(12, 576).bfloat16()
    together = one(x)
    louder = x.clone()
    louder[3] *= 8
    assert torch.equal(one(louder)[0], together[0])
    for i in range(12):
        alone = one(x[i : i + 1])[0]
        if impl == "native":
            assert torch.equal(alone, together[i])
        else:
            torch.testing.assert_close(alone, together[i], rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_the_same_call_gives_the_same_bits(kind, impl, rows):
    weight = weight_of(kind, 129, 576)
    x = torch.randn(rows, 576).bfloat16()
    first = prepared(kind, impl, weight)
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), prepared(kind, impl, weight)(x))


@needs_native
@pytest.mark.parametrize("kind", OPS)
def test_the_same_bits_on_every_number_of_threads(kind):
    one = prepared(kind, "native", weight_of(kind, 129, 576))
    x = torch.randn(90, 576).bfloat16()  # enough work for it to be shared
    assert 144 * 576 * 90 > 1 << 22
    alone = one(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(one(x), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_a_wrong_scale_is_noticed(kind, impl, rows):
    """Negative control: one scale in 64 off by half must break the tolerance."""
    x = torch.randn(rows, 64)
    weight = weight_of(kind, 64, 64)
    scales = weight.scales.clone()
    scales[5] *= 1.5
    changed = (
        replace(weight, scales=scales)
        if isinstance(weight, GroupedWeight)
        else weight._replace(scales=scales)
    )
    limit = MIXED[impl]
    assert relative(prepared(kind, impl, changed)(x), formula(kind, x, weight)) > limit


@needs_native
@pytest.mark.parametrize("kind", ["grouped", "grouped_dynamic"])
def test_a_wrong_zero_point_and_shuffled_scales_are_noticed(kind):
    weight = weight_of(kind, 64, 128, zero_point="integer")
    x = torch.randn(1, 128)
    want = formula(kind, x, weight)
    zeros = replace(weight, zeros=weight.zeros ^ 1)
    shuffled = replace(weight, scales=weight.scales.flip(0))
    swapped = replace(weight, packed=weight.packed << 4 | weight.packed >> 4)
    for wrong in (zeros, shuffled, swapped):
        assert relative(prepared(kind, "native", wrong)(x), want) > 0.02


@pytest.mark.parametrize(("kind", "impl"), IMPLEMENTATIONS)
def test_rows_are_those_of_the_weight(kind, impl):
    weight = weight_of(kind, 129, 200)
    index = torch.tensor([[0, 128, 5], [17, 5, 16]])
    got = prepared(kind, impl, weight).rows(index)
    assert got.shape == (2, 3, 200)
    assert got.dtype is torch.float32
    assert relative(got, dense_of(weight)[index]) < 4e-3


@needs_torch
def test_held_bytes_of_torch_count_padding_and_nothing_twice():
    plain = prepared("grouped", "cpu", weight_of("grouped", 64, 128))
    want = {"packed": 64 * 64, "scales": 2 * 64 * 2, "zero_points": 2 * 64 * 2}
    assert plain.held_bytes() == want
    ragged = prepared("grouped", "cpu", weight_of("grouped", 65, 100))
    want = {"packed": 128 * 64, "scales": 2 * 128 * 2, "zero_points": 2 * 128 * 2}
    assert ragged.held_bytes() == want
    rows = prepared("int8", "cpu", weight_of("int8", 65, 100))
    assert rows.held_bytes() == {"codes": 65 * 112, "scales": 130}


@needs_native
@pytest.mark.parametrize("bits", range(2, 9))
def test_held_bytes_are_the_bits_of_the_codes(bits):
    held = prepared(
        "grouped", "native", weight_of("grouped", 64, 128, bits=bits, zero_point="integer")
    ).held_bytes()
    assert held["codes" if bits == 8 else "packed"] == 64 * 128 * bits // 8
    assert held["scales"] == 64 * 2 * 2
    assert held["zero_points"] == 64 * 2
    padded = prepared("int8", "native", weight_of("int8", 65, 100)).held_bytes()
    assert padded == {"codes": 80 * 128, "scales": 80 * 2}


@needs_torch
def test_the_unpacked_layout_of_torch_is_the_stored_one():
    """The many-row path reads torch's packed codes back: exactly, block by block."""
    weight = weight_of("grouped", 192, 64, group=32)
    one = prepared("grouped", "cpu", weight)
    codes = host.int4_codes(one.packed, one.block)
    assert torch.equal(codes.transpose(1, 2).reshape(192, 64), weight.codes())


@needs_torch
def test_slabs_join_without_seams(monkeypatch):
    kinds = ("int8", "grouped")
    x = torch.randn(70, 96)
    whole = {kind: prepared(kind, "cpu", weight_of(kind, 200, 96))(x) for kind in kinds}
    monkeypatch.setattr(grouped_matmul.cpu, "CHUNK", 1)
    monkeypatch.setattr(int8_matmul.cpu, "CHUNK", 5000)
    monkeypatch.setattr(product, "SLAB", 96 * 40)
    for kind in kinds:
        for impl in ("cpu", "native") if build.available() else ("cpu",):
            parts = prepared(kind, impl, weight_of(kind, 200, 96))(x)
            torch.testing.assert_close(parts, whole[kind], rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("kind", OPS)
def test_a_torch_without_fast_products_falls_back_to_the_reference(kind, monkeypatch):
    monkeypatch.setattr(host, "int4_block", lambda: None)
    monkeypatch.setattr(host, "has_int8_pack", lambda: False)
    monkeypatch.setattr(int8_dynamic_matmul.onednn, "_works", lambda: False)
    monkeypatch.setattr(build, "available", lambda: False)
    x, weight = torch.ones(1, 64), weight_of(kind, 16, 64)
    assert dispatch.choose(OPS[kind], x, weight).name == "reference"
    with pytest.raises(ValueError, match=r"'native' cannot take .* C\+\+ compiler"):
        dispatch.choose(OPS[kind], x, weight, "native")


def test_native_can_be_turned_off_and_says_why_it_is(monkeypatch):
    monkeypatch.setenv("COMPRESSKIT_NATIVE", "0")
    assert not build.available()
    assert "COMPRESSKIT_NATIVE" in build.reason()


@needs_native
def test_a_compiler_that_fails_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    build.load.cache_clear()
    try:
        assert not build.available()
        assert "false failed" in build.reason()
        weight = weight_of("grouped", 16, 64)
        assert dispatch.choose(OPS["grouped"], torch.ones(1, 64), weight).name != "native"
    finally:
        monkeypatch.undo()
        build.load.cache_clear()


@needs_torch
def test_float32_where_the_cpu_does_not_multiply_bfloat16(monkeypatch):
    monkeypatch.setattr(host, "wide_dtype", lambda: torch.float32)
    for kind in ("int8", "grouped"):
        weight = weight_of(kind, 100, 96)
        x = torch.randn(70, 96)
        assert relative(prepared(kind, "cpu", weight)(x), formula(kind, x, weight)) < 1e-6


def test_rounding_keeps_rows_apart_and_survives_zeros():
    x = torch.randn(3, 70)
    x[1] = 0
    parts = activations.round_rows(x, 32)
    assert parts.steps.shape == (3, 3)
    assert parts.codes.abs().amax(dim=1).tolist() == [127, 0, 127]
    assert (parts.dequantise() - x).abs().amax() <= parts.steps.amax() / 2 * 1.0001
    alone = activations.round_rows(x[:1], 32)
    assert torch.equal(alone.codes[0], parts.codes[0])
    whole = activations.round_rows(x)
    assert whole.steps.shape == (3, 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")
@pytest.mark.parametrize("kind", ["int8", "grouped"])
def test_cuda_dequantises_and_says_so(kind):
    weight = weight_of(kind, 128, 256)
    if isinstance(weight, GroupedWeight):
        moved = replace(
            weight,
            packed=weight.packed.cuda(),
            scales=weight.scales.cuda(),
            offsets=weight.offsets.cuda(),
        )
    else:
        moved = type(weight)(*(v.cuda() for v in weight))
    x = torch.randn(3, 256)
    dispatch.reset()
    way = dispatch.choose(OPS[kind], x.cuda(), moved, "dequantised")
    got = way.prepare(moved)(x.cuda().bfloat16()).cpu()
    assert relative(got, formula(kind, x, weight)) < 1e-2
    assert dispatch.used() == {OPS[kind].name: ("cuda: torch dequantise + matmul",)}
