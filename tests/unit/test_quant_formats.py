"""Code books and tiny floats: nf4, fp4, E2M1, E8M0, E4M3, and the methods on top of them.

Vectors: the fp4 and nf4 strings are what bitsandbytes 0.50.2 packs `linspace(-1, 1, 64)` to; the
E2M1 and E8M0 vectors are those of compressed-tensors 0.20 (`pack_fp4_to_uint8`,
`generate_mx_scales`), which follow the OCP Microscaling specification 1.0; the E4M3 vectors follow
from the format (3 bits of mantissa, bias 7). The table of weight errors comes from a script that
shares no code with this package (torch 2.13, float32 scales, bitsandbytes' own codes).
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import dispatch, fp8_dynamic_matmul, grouped_matmul
from compresskit_kernels.fp8_dynamic_matmul import cases, scaled
from compresskit_kernels.native import build
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compresskit.device import resolve
from compresskit.errors import RunError
from compresskit.hf import modules
from compresskit.method import quiet
from compresskit.methods.quant import _codebook, _float, fp8, mxfp4, nvfp4
from compresskit.methods.quant.fp4 import Float4
from compresskit.methods.quant.fp8 import Float8
from compresskit.methods.quant.mxfp4 import MXFP4
from compresskit.methods.quant.nf4 import NormalFloat4
from compresskit.methods.quant.nvfp4 import NVFP4
from compresskit.system import System

needs_native = pytest.mark.skipif(not build.available(), reason="no native product on this CPU")
NF4, FP4 = _codebook.NF4, _codebook.FP4
ERRORS = {
    "gaussian": (0.0920, 0.1220),
    "student": (0.1048, 0.1543),
    "uniform": (0.0913, 0.1110),
}
METHODS = [NormalFloat4(), Float4(block=32), MXFP4(), NVFP4(), Float8()]


@functools.cache
def drawn():
    torch.manual_seed(0)
    return {
        "gaussian": torch.randn(1024, 2048),
        "student": torch.distributions.StudentT(5.0).sample((1024, 2048)),
        "uniform": torch.rand(1024, 2048) - 0.5,
    }


def error(stored, weight):
    return float((stored.dequantise() - weight).norm() / weight.norm())


@pytest.mark.parametrize("place", [0, 1], ids=["nf4", "fp4"])
@pytest.mark.parametrize("kind", ERRORS)
def test_weight_errors_are_the_published_ones(kind, place):
    weight = drawn()[kind]
    exact = _codebook.quantise(weight, (NF4, FP4)[place], dtype=torch.float32)
    assert error(exact, weight) == pytest.approx(ERRORS[kind][place], abs=6e-5)
    assert error(_codebook.quantise(weight, (NF4, FP4)[place]), weight) == pytest.approx(
        ERRORS[kind][place], rel=6e-3
    )


def test_shuffled_scales_and_a_wrong_table_are_noticed():
    """Negative controls for the table."""
    weight = drawn()["gaussian"]
    stored = _codebook.quantise(weight, NF4, dtype=torch.float32)
    shuffled = replace(stored, scales=stored.scales.roll(1, dims=1))
    wrong = replace(stored, table=tuple(torch.linspace(-1, 1, 16).tolist()))
    for bad in (shuffled, wrong):
        assert abs(error(bad, weight) - ERRORS["gaussian"][0]) > 5e-3


@pytest.mark.parametrize(
    ("levels", "codes"),
    [
        (NF4, "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"),
        (FP4, "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333"),
    ],
    ids=["nf4", "fp4"],
)
def test_codes_of_a_line(levels, codes):
    stored = _codebook.quantise(torch.linspace(-1, 1, 64).view(1, 64), levels)
    assert "".join(f"{code:x}" for code in stored.codes()[0].tolist()) == codes
    assert stored.scales.tolist() == [[1.0]]


def test_a_block_of_zeros():
    stored = _codebook.quantise(torch.zeros(1, 64), NF4)
    assert stored.codes().unique().tolist() == [7]
    assert not stored.dequantise().any()


@pytest.mark.parametrize("width", [1, 40, 100, 128])
def test_a_ragged_block_is_a_block_of_its_own(width):
    torch.manual_seed(3)
    weight = torch.randn(5, width)
    whole = _codebook.quantise(weight, NF4, block=32).dequantise()
    last = width // 32 * 32 or 0
    if last < width:
        alone = _codebook.quantise(weight[:, last:].contiguous(), NF4, block=32).dequantise()
        assert torch.equal(whole[:, last:], alone)
    assert float((whole - weight).abs().max() / weight.abs().max()) < 0.16


def test_e2m1_rounds_to_nearest_and_ties_to_even():
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]  # halfway, one and all
    assert _float.e2m1(torch.tensor(values)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    above = _float.e2m1(torch.tensor(values) * 1.001).tolist()
    assert above == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert _float.e2m1(torch.tensor([-100.0, 7.0, -0.3])).tolist() == [-6.0, 6.0, -0.5]


def test_e2m1_codes_pack_low_nibble_first():
    ladder = torch.tensor([[0.0, 0.5, 1, 1.5, 2, 3, 4, 6]])
    codes = torch.cat([_float.e2m1_codes(ladder), _float.e2m1_codes(-ladder) | 8], dim=1)
    packed = grouped_matmul.GroupedWeight(
        mxfp4.pack(codes, 4), torch.ones(1, 1), 16, 32, table=_float.E2M1
    )
    assert bytes(packed.packed[0].tolist()).hex() == "1032547698badcfe"
    assert torch.equal(packed.dequantise(), torch.cat([ladder, -ladder], dim=1))


@pytest.mark.parametrize(
    ("largest", "biased"),
    [(6, 127), (1, 125), (1.74, 125), (1.75, 126), (3.5, 127), (7, 128), (448, 134)],
)
def test_e8m0_scales_of_mxfp4(largest, biased):
    scale = _float.power_of_two(torch.tensor([float(largest)]), _float.E2M1_EXPONENT)
    assert scale.item() == 2.0 ** (biased - 127)


@pytest.mark.parametrize(("largest", "biased"), [(6, 121), (448, 128)])
def test_e8m0_scales_of_mxfp8(largest, biased):
    scale = _float.power_of_two(torch.tensor([float(largest)]), _float.E4M3_EXPONENT)
    assert scale.item() == 2.0 ** (biased - 127)


def test_a_floor_instead_of_the_rounded_exponent_is_noticed():
    """Negative control: the plain floor agrees on every vector but those from 1.75 on."""
    largest = torch.tensor([1.0, 1.74, 1.75, 6.0, 7.0])
    floor = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    differs = _float.power_of_two(largest, 2) != floor
    assert differs.tolist() == [False, False, True, False, True]


def test_e8m0_scales_are_exact_powers_over_the_whole_range():
    powers = torch.arange(-120, 126)
    largest = torch.ldexp(torch.ones(len(powers)), powers)
    scales = _float.power_of_two(largest, 2)
    assert [s.hex() for s in scales.tolist()] == [(2.0 ** (p - 2)).hex() for p in powers.tolist()]
    assert torch.equal(scales.bfloat16().float(), scales)
    assert _float.power_of_two(torch.tensor([0.0, 1e-45]), 2).tolist() == [2.0**-126] * 2


def test_e4m3_saturates_and_rounds_to_even():
    values = torch.tensor([500.0, 1e4, float("inf"), 2.0**-9, 2.0**-10, 17.0, 19.0, -449.0])
    assert _float.e4m3(values).tolist() == [448, 448, 448, 2.0**-9, 0, 16, 20, -448]
    assert _float.e4m3(torch.tensor([float("nan")])).isnan().all()


def test_a_row_of_fp8_by_hand():
    stored = fp8.quantise(torch.tensor([[448.0, 17.0, -1.0], [0.0, 0.0, 0.0]]))
    assert stored.scales.tolist() == [1.0, 0.0]
    assert stored.dequantise().tolist() == [[448, 16, -1], [0, 0, 0]]


def test_an_mxfp4_group_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -1.2, 0.3, 5.0])
    stored = mxfp4.quantise(weight)
    assert stored.scales.tolist() == [[1.0]]
    assert stored.dequantise()[0, :4].tolist() == [6.0, -1.0, 0.5, 4.0]


def test_nvfp4_uses_the_whole_range_of_its_scales():
    torch.manual_seed(0)
    weight = torch.randn(8, 64) * 1e-3
    stored = nvfp4.quantise(weight)
    assert stored.scales.max() == 448  # the group with the largest weight
    assert torch.equal(_float.e4m3(stored.scales), stored.scales.float())
    assert error(stored, weight) < 0.11
    assert not nvfp4.quantise(torch.zeros(2, 32)).dequantise().any()


def test_nvfp4_rows_of_a_weight_share_their_factor(monkeypatch):
    """Slabs of rows must not find a factor each: joined, they would all take the first one's."""
    from compresskit.methods.quant import _packing

    torch.manual_seed(1)
    weight = torch.randn(16, 32) * torch.logspace(-2, 2, 16).unsqueeze(1)
    whole = nvfp4.quantise(weight).dequantise()
    monkeypatch.setattr(_packing, "SLAB", 64)  # two rows
    scheme = nvfp4.TwoScales(grouped_matmul.OP, 4, nvfp4.quantise)
    assert torch.equal(scheme.store(weight).dequantise(), whole)
    plain = nvfp4.Scheme(grouped_matmul.OP, 4, nvfp4.quantise).store(weight)
    assert not torch.allclose(plain.dequantise(), whole)  # negative control


def test_activations_in_mx_formats_by_hand():
    x = torch.zeros(1, 64)
    x[0, :3], x[0, 32] = torch.tensor([6.0, 1.2, -0.3]), 0.1
    four = _float.round_mx(x, group=32, kind="e2m1")
    # 0.1 is 6.4 / 64: its mantissa of 1.6 keeps the scale at 1/64 and 6.4 saturates at 6.
    assert four[0, [0, 1, 2, 32]].tolist() == [6.0, 1.0, -0.5, 6 / 64]
    eight = _float.round_mx(x, group=32, kind="e4m3")
    assert eight[0, :3].tolist() == [6.0, 1.25, -0.3125]


def test_activations_in_nvfp4_stand_alone_by_token():
    torch.manual_seed(2)
    x = torch.randn(4, 48)
    together = nvfp4.round_inputs(x)
    assert torch.equal(together[1:2], nvfp4.round_inputs(x[1:2]))
    louder = x.clone()
    louder[0] *= 1000
    assert torch.equal(nvfp4.round_inputs(louder)[1:], together[1:])
    assert 0.05 < float((together - x).norm() / x.norm()) < 0.12


# The op fp8_dynamic_matmul.


def fp8_weight(n, k):
    torch.manual_seed(n * 1000 + k)
    dense = torch.randn(n, k)
    if n * k == 0:
        return fp8.Fp8Weight(dense.to(torch.float8_e4m3fn), torch.ones(n, dtype=torch.bfloat16))
    return fp8.quantise(dense)


def formula(x, weight):
    """The contract in float64, written without the op's own rounding."""
    x = x.double()
    steps = x.abs().amax(dim=1, keepdim=True) / 448 if x.shape[1] else x.new_zeros(len(x), 1)
    units = (x.float() / steps.where(steps > 0, 1.0).float()).clamp(-448, 448)
    codes = units.to(torch.float8_e4m3fn).double()
    return (codes * steps) @ (weight.codes.double() * weight.scales.double()[:, None]).T


def relative(got, want):
    return float((got.double() - want).norm() / want.norm()) if want.norm() else 0.0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_fp8_dynamic_follows_the_formula(impl, shape, dtype):
    m, n, k = shape
    torch.manual_seed(1)
    x, weight = torch.randn(m, k).to(dtype), fp8_weight(n, k)
    if impl == "native" and k == 0:
        assert dispatch.choose(fp8_dynamic_matmul.OP, x, weight).name == "reference"
        return
    got = fp8_dynamic_matmul.fp8_dynamic_matmul(x, weight, impl=impl)
    assert (got.dtype, got.shape) == (dtype, (m, n))
    limit = cases.RELATIVE_ERROR[impl] + cases.ROUNDING[dtype]
    assert relative(got, formula(x, weight)) <= limit


@pytest.mark.parametrize("shape", cases.SHAPES[:7], ids=str)
def test_the_scaled_product_on_a_cpu(shape):
    """torch emulates `_scaled_mm` with scales by row on a CPU: padding and order of arguments."""
    m, n, k = shape
    x, weight = torch.randn(m, k), fp8_weight(n, k)
    prepared = scaled.ScaledProduct(weight)
    assert all(size % 16 == 0 for size in prepared.codes.shape)
    limit = cases.RELATIVE_ERROR["scaled"]
    assert relative(prepared(x), formula(x, weight)) <= limit
    assert torch.equal(prepared.rows(torch.arange(n)), weight.dequantise())
    assert prepared(torch.randn(2, 0, k)).shape == (2, 0, n)
    if n > 1:  # negative control
        wrong = scaled.ScaledProduct(weight._replace(scales=weight.scales.roll(1)))
        assert relative(wrong(x), formula(x, weight)) > limit


def test_a_cpu_is_refused_the_scaled_product():
    with pytest.raises(ValueError, match=r"'scaled' cannot take .* capability 8\.9"):
        dispatch.choose(fp8_dynamic_matmul.OP, torch.ones(1, 16), fp8_weight(16, 16), "scaled")


def test_inputs_that_are_not_rounded_are_noticed():
    """Negative control for the formula: the weight-only product is outside every tolerance."""
    x, weight = torch.randn(4, 576), fp8_weight(192, 576)
    plain = x @ weight.dequantise().T
    assert relative(plain, formula(x, weight)) > 2 * max(cases.RELATIVE_ERROR.values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_the_scaled_product_on_tensor_cores(shape, dtype):
    if torch.cuda.get_device_capability() < scaled.CAPABILITY:
        pytest.skip("no 8-bit floats on this GPU")
    m, n, k = shape
    x, weight = torch.randn(m, k).to(dtype), fp8_weight(n, k)
    moved = type(weight)(*(tensor.cuda() for tensor in weight))
    dispatch.reset()
    got = fp8_dynamic_matmul.fp8_dynamic_matmul(x.cuda(), moved).cpu()
    assert (got.dtype, got.shape) == (dtype, (m, n))
    # One more rounding to bfloat16 than the float32 case counts: the operator's own output.
    limit = cases.RELATIVE_ERROR["scaled"] + cases.ROUNDING[dtype] + 2**-8
    assert relative(got, formula(x, weight)) <= limit
    if k:
        assert dispatch.used() == {"fp8_dynamic_matmul": (scaled.SCALED.routine,)}


# The methods.


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"intermediate_size": 144, "num_key_value_heads": 2, "vocab_size": 200}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options)).bfloat16().eval()


def apply(method, model, device=None, **facts):
    nothing = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    system = System(
        model=model, device=device or resolve("cpu"), context=64, facts=facts, **nothing
    )
    return method.apply(system, SimpleNamespace(progress=quiet))


@torch.inference_mode()
def logits(model, length=12):
    tokens = torch.arange(length).remainder(200).view(1, length)
    return model(tokens, use_cache=False).logits.double()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_packed_model_computes_what_the_reference_does(method):
    dense = logits(llama().float())
    with dispatch.forced("reference"):
        want = logits(apply(method, llama().float()).model)
    got = logits(apply(method, llama()).model)
    assert float((got - want).norm() / want.norm()) < 0.03
    assert float((want - dense).norm() / dense.norm()) > 0.005


@needs_native
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_it_runs_packed_and_says_so(method):
    system = apply(method, llama())
    assert system.simulated == ()
    (op,) = system.kernels
    assert system.kernels[op].startswith("native: ")
    dispatch.reset()
    logits(system.model)
    assert dispatch.used()[op][0].startswith("native: ")


@pytest.mark.parametrize(
    ("method", "bits", "nominal"),
    [
        (NormalFloat4(), 4.25, None),
        (Float4(block=128), 4.125, None),
        (MXFP4(), 4.5, 4.25),
        (NVFP4(), 5.0, 4.5),
    ],
    ids=repr,
)
def test_bits_a_weight(method, bits, nominal):
    """By hand: 4 bits a code and 16 a scale; what the format itself would store is a fact."""
    with dispatch.forced("reference"):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256,
            vocab_size=256, tie_word_embeddings=False,
        )  # fmt: skip
        system = apply(method, LlamaForCausalLM(config).bfloat16())
    packed = modules.weight_bytes(system.model) - sum(modules.left_dense(system.model).values())
    assert 8 * packed / system.facts["quantized_parameters"] == bits
    assert system.facts.get("nominal_bits_per_parameter") == nominal


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (MXFP4(activations="fp4"), "quant/mxfp4"),
        (MXFP4(activations="fp8"), "quant/mxfp4"),
        (NVFP4(activations="fp4"), "quant/nvfp4"),
        (Float8(activations="fp8"), "quant/fp8"),
    ],
    ids=repr,
)
def test_rounded_activations_are_simulated_and_change_the_result(method, name):
    plain = logits(apply(type(method)(), llama()).model)
    system = apply(method, llama())
    assert system.simulated == (name,)
    got = logits(system.model)
    assert 0.005 < float((got - plain).norm() / plain.norm()) < 0.5


def test_activations_are_rounded_before_the_product():
    """The wrapped product gets exactly what the format makes of x."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    stored = mxfp4.quantise(weight)
    op = _float.simulating(grouped_matmul.OP, "named", _float.rounding_mx(32, "e2m1"))
    with dispatch.forced("reference"):
        way = dispatch.choose(op, x, stored)
    product = way.prepare(stored)
    dispatch.reset()
    want = _float.round_mx(x, group=32, kind="e2m1") @ stored.dequantise().T
    torch.testing.assert_close(product(x), want)
    assert set(dispatch.used()) == {"named", "grouped_matmul"}
    assert product.weight is stored
    assert product(torch.zeros(0, 64)).shape == (0, 32)
    x[1, 7] = float("inf")
    assert product(x).isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("method", [NVFP4(), MXFP4()], ids=repr)
def test_fused_experts_are_packed(method):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, num_local_experts=4, vocab_size=200,
    )  # fmt: skip
    facts = apply(method, MixtralForCausalLM(config).eval()).facts
    assert "experts" not in facts["left_dense"]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_weights_that_are_not_numbers_are_refused(method):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
        apply(method, model)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_embeddings_and_progress(method):
    told = []
    model = llama()
    nothing = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    system = System(model=model, device=resolve("cpu"), context=64, **nothing)
    both = type(method).model_validate({**method.model_dump(), "embeddings": True})
    context = SimpleNamespace(progress=lambda label, done, total: told.append((done, total)))
    system = both.apply(system, context)
    assert set(system.facts["left_dense"]) == {"norm"}
    assert told[-1] == (15, 15)
    assert logits(model).isfinite().all()
