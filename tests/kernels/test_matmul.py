"""The ladder of the matrix products: float64 formula, reference, then the other implementations."""

import pytest
import torch
from compresskit_kernels import dispatch, host, int4_matmul, int8_matmul
from compresskit_kernels.int4_matmul import cases as int4_cases
from compresskit_kernels.int8_matmul import cases as int8_cases

from compresskit.methods.quant import int4, int8

torch.set_num_threads(1)
needs_fast = pytest.mark.skipif(host.int4_block() is None, reason="no packed product on this CPU")
OPS = {"int8": (int8_matmul.OP, int8_cases), "int4": (int4_matmul.OP, int4_cases)}


def weight_of(kind, n, k, group=64, symmetric=False):
    torch.manual_seed(n * 1000 + k)
    dense = torch.randn(n, k)
    if n * k == 0:  # nothing to take a maximum of
        if kind == "int8":
            return int8_matmul.Int8Weight(dense.to(torch.int8), torch.ones(n, dtype=torch.bfloat16))
        groups = -(-k // group)
        packed = torch.zeros(n, groups * group // 2, dtype=torch.uint8)
        return int4_matmul.Int4Weight(packed, torch.ones(n, groups), None, k, group)
    if kind == "int8":
        return int8.quantise(dense)
    return int4.quantise(dense, group=group, symmetric=symmetric)


def formula(kind, x, weight):
    """The contract in float64, written without the library's own dequantisation."""
    x = x.double()
    if kind == "int8":
        return x @ (weight.codes.double() * weight.scales.double()[:, None]).T
    n, k = weight.shape
    dense = torch.zeros(n, k, dtype=torch.float64)
    for column in range(k):
        byte = weight.packed[:, column // 2]
        code = (byte >> 4 if column % 2 else byte & 15).double()
        g = column // weight.group
        dense[:, column] = (code - 8) * weight.scales[:, g].double()
        if weight.offsets is not None:
            dense[:, column] += weight.offsets[:, g].double()
    return x @ dense.T


def relative(got, want):
    return float((got.double() - want).norm() / want.norm()) if want.norm() else 0.0


def check(kind, impl, x, weight):
    op, cases = OPS[kind]
    way = next(w for w in op.implementations if w.name == impl)
    got = way.prepare(weight)(x)
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], weight.shape[0])
    error = relative(got, formula(kind, x, weight))
    assert error <= cases.RELATIVE_ERROR[impl] + cases.ROUNDING[x.dtype]


@pytest.mark.parametrize("dtype", int8_cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", int8_cases.SHAPES, ids=str)
@pytest.mark.parametrize(
    "impl", ["reference", "dequantised", pytest.param("cpu", marks=needs_fast)]
)
@pytest.mark.parametrize("kind", OPS)
def test_every_implementation_follows_the_formula(kind, impl, shape, dtype):
    m, n, k = shape
    if impl == "cpu" and k == 0:  # not its job: the automatic choice takes the reference
        assert dispatch.choose(OPS[kind][0], torch.empty(m, k)).name == "reference"
        return
    torch.manual_seed(1)
    check(kind, impl, torch.randn(m, k).to(dtype), weight_of(kind, n, k))


@needs_fast
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", int4_cases.GROUPS)
@pytest.mark.parametrize("shape", int4_cases.SHAPES[:8], ids=str)
def test_int4_groups_of_every_size(shape, group, symmetric):
    m, n, k = shape
    check("int4", "cpu", torch.randn(m, k), weight_of("int4", n, k, group, symmetric))


@needs_fast
@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("kind", OPS)
def test_strided_and_batched_inputs(kind, rows):
    weight = weight_of(kind, 48, 128)
    wide = torch.randn(3, rows, 256)[..., ::2]
    turned = torch.randn(3, 128, rows).transpose(1, 2)
    for x in (wide, turned, torch.randn(128)):
        check(kind, "cpu", x, weight)
        check(kind, "cpu", x.bfloat16(), weight)


@needs_fast
@pytest.mark.parametrize("kind", OPS)
def test_a_row_does_not_depend_on_the_others_in_the_packed_product(kind):
    product = OPS[kind][0].implementations[0].prepare(weight_of(kind, 192, 576))
    x = torch.randn(12, 576).bfloat16()
    together = product(x)
    for i in range(12):
        torch.testing.assert_close(product(x[i : i + 1])[0], together[i], rtol=2**-7, atol=2**-5)
    louder = x.clone()
    louder[3] *= 8
    assert torch.equal(product(louder)[0], together[0])


@needs_fast
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("kind", OPS)
def test_the_same_call_gives_the_same_bits(kind, rows):
    weight = weight_of(kind, 129, 576)
    way = OPS[kind][0].implementations[0]
    x = torch.randn(rows, 576).bfloat16()
    first = way.prepare(weight)
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), way.prepare(weight)(x))


@needs_fast
@pytest.mark.parametrize("rows", [1, 100])
def test_a_wrong_scale_is_noticed(rows):
    """Negative control: one scale in 64 off by a tenth must break the tolerance."""
    x = torch.randn(rows, 64)
    for kind in OPS:
        weight = weight_of(kind, 64, 64)
        scales = weight.scales.clone()
        scales[5] *= 1.5
        wrong = OPS[kind][0].implementations[0].prepare(weight._replace(scales=scales))
        limit = OPS[kind][1].RELATIVE_ERROR["cpu"]
        assert relative(wrong(x), formula(kind, x, weight)) > limit


@needs_fast
def test_swapped_nibbles_are_noticed():
    weight = weight_of("int4", 64, 64)
    swapped = weight._replace(packed=weight.packed << 4 | weight.packed >> 4)
    x = torch.randn(1, 64)
    got = int4_matmul.int4_matmul(x, swapped)
    assert relative(got, formula("int4", x, weight)) > 0.1


@needs_fast
def test_held_bytes_count_padding_and_nothing_twice():
    plain = OPS["int4"][0].implementations[0].prepare(weight_of("int4", 64, 128))
    assert plain.held_bytes() == {
        "packed": 64 * 64,
        "scales": 2 * 64 * 2,
        "zero_points": 2 * 64 * 2,
    }
    ragged = OPS["int4"][0].implementations[0].prepare(weight_of("int4", 65, 100))
    assert ragged.held_bytes() == {
        "packed": 128 * 64,
        "scales": 2 * 128 * 2,
        "zero_points": 2 * 128 * 2,
    }
    rows = OPS["int8"][0].implementations[0].prepare(weight_of("int8", 65, 100))
    assert rows.held_bytes() == {"codes": 65 * 112, "scales": 130}


@needs_fast
def test_the_unpacked_layout_is_the_stored_one():
    """The many-row path reads torch's packed codes back: exactly, block by block."""
    weight = weight_of("int4", 192, 64, group=32)
    product = OPS["int4"][0].implementations[0].prepare(weight)
    codes = host.int4_codes(product.packed, product.block)
    assert torch.equal(codes.transpose(1, 2).reshape(192, 64), weight.codes())


@needs_fast
def test_slabs_join_without_seams(monkeypatch):
    weights = {kind: weight_of(kind, 200, 96) for kind in OPS}
    x = torch.randn(70, 96)
    whole = {kind: OPS[kind][0].implementations[0].prepare(weights[kind])(x) for kind in OPS}
    monkeypatch.setattr(int4_matmul.cpu, "CHUNK", 1)
    monkeypatch.setattr(int8_matmul.cpu, "CHUNK", 5000)
    for kind in OPS:
        parts = OPS[kind][0].implementations[0].prepare(weights[kind])(x)
        torch.testing.assert_close(parts, whole[kind], rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("kind", OPS)
def test_a_torch_without_fast_products_falls_back_to_the_reference(kind, monkeypatch):
    monkeypatch.setattr(host, "int4_block", lambda: None)
    monkeypatch.setattr(host, "has_int8_pack", lambda: False)
    way = dispatch.choose(OPS[kind][0], torch.ones(1, 64))
    assert way.name == "reference"
    with pytest.raises(ValueError, match=r"'cpu' cannot take .* AVX2"):
        dispatch.choose(OPS[kind][0], torch.ones(1, 64), "cpu")


@needs_fast
def test_float32_where_the_cpu_does_not_multiply_bfloat16(monkeypatch):
    monkeypatch.setattr(host, "wide_dtype", lambda: torch.float32)
    for kind in OPS:
        weight = weight_of(kind, 100, 96)
        x = torch.randn(70, 96)
        got = OPS[kind][0].implementations[0].prepare(weight)(x)
        assert relative(got, formula(kind, x, weight)) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")
@pytest.mark.parametrize("kind", OPS)
def test_cuda_dequantises_and_says_so(kind):
    weight = weight_of(kind, 128, 256)
    moved = type(weight)(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in weight))
    x = torch.randn(3, 256)
    dispatch.reset()
    way = dispatch.choose(OPS[kind][0], x.cuda())
    assert way.name == "dequantised"
    got = way.prepare(moved)(x.cuda().bfloat16()).cpu()
    assert relative(got, formula(kind, x, weight)) < 1e-2
    assert dispatch.used() == {OPS[kind][0].name: ("cuda: torch dequantise + matmul",)}
