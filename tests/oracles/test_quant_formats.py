"""Codes and scales of the 4-bit float formats, bit by bit, against the libraries that define them."""

import pytest
import torch

from compresskit.methods.quant import _codebook, _float, fp8, mxfp4, nvfp4
from compresskit.methods.quant._foreign import bitsandbytes

functional = bitsandbytes().functional


def weights(name, shape=(96, 512)):
    torch.manual_seed(7)
    if name == "student":
        return torch.distributions.StudentT(3.0).sample(shape)
    return torch.randn(shape) * torch.logspace(-4, 3, shape[0]).unsqueeze(1)


def theirs(weight, kind, block):
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    flat = packed.view(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(weight.shape), state


@pytest.mark.parametrize("name", ["student", "scaled"])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(kind, block, name):
    weight = weights(name)
    levels = {"nf4": _codebook.NF4, "fp4": _codebook.FP4}[kind]
    codes, state = theirs(weight, kind, block)
    ours = _codebook.quantise(weight, levels, block=block, dtype=torch.float32)
    assert torch.equal(ours.codes(), codes)
    assert torch.equal(ours.scales.view(-1), state.absmax)
    assert torch.equal(torch.tensor(levels), state.code)
    torch.testing.assert_close(
        ours.dequantise(),
        functional.dequantize_4bit(
            functional.quantize_4bit(weight, blocksize=block, quant_type=kind)[0], state
        ),
        rtol=1e-6,
        atol=0,
    )


def test_other_codes_are_noticed():
    """Negative control: the other table, or blocks of another size, give other codes."""
    weight = weights("student")
    codes, _ = theirs(weight, "nf4", 64)
    for levels, block in ((_codebook.FP4, 64), (_codebook.NF4, 32)):
        wrong = _codebook.quantise(weight, levels, block=block, dtype=torch.float32)
        assert not torch.equal(wrong.codes(), codes)


def test_e2m1_is_that_of_compressed_tensors():
    cast = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils").cast_to_fp4
    values = torch.cat([torch.linspace(-7, 7, 2801), weights("student").view(-1)])
    assert torch.equal(_float.e2m1(values), cast(values.clone()))


@pytest.mark.parametrize("bits", [4, 8])
def test_e8m0_scales_are_those_of_compressed_tensors(bits):
    generate = pytest.importorskip("compressed_tensors.quantization.utils").generate_mx_scales
    largest = torch.cat([weights("scaled").abs().view(-1), torch.tensor([1.74, 1.75, 3.5, 7.0])])
    exponent = {4: _float.E2M1_EXPONENT, 8: _float.E4M3_EXPONENT}[bits]
    got = _float.power_of_two(largest, exponent)
    assert torch.equal(got.log2() + 127, generate(largest, num_bits=bits))


def test_mxfp4_bytes_are_those_of_compressed_tensors():
    compressors = pytest.importorskip("compressed_tensors.compressors")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    cast = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils").cast_to_fp4
    weight = weights("student")
    groups = weight.view(96, -1, 32)
    scales = torch.exp2(utils.generate_mx_scales(groups.abs().amax(dim=2)) - 127)
    packed = compressors.pack_fp4_to_uint8(cast(groups / scales.unsqueeze(2)).view(96, -1))
    ours = mxfp4.quantise(weight)
    assert torch.equal(ours.scales.float(), scales)
    # A negative number that rounds to zero may keep its sign or not; both are zero.
    assert torch.equal(no_negative_zero(ours.packed), no_negative_zero(packed))


def no_negative_zero(packed):
    codes = torch.stack([packed & 15, packed >> 4])
    return codes.where(codes != 8, 0)


def test_nvfp4_is_that_of_compressed_tensors():
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", symmetric=True, dynamic=False,
        group_size=16, scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    weight = weights("student")
    factor = utils.generate_gparam(weight.min(), weight.max())
    groups = weight.view(96, -1, 16)
    scales, zeros = utils.calculate_qparams(
        groups.amin(dim=2), groups.amax(dim=2), arguments, global_scale=factor
    )
    want = forward.fake_quantize(weight, scales, zeros, arguments, global_scale=factor)
    ours = nvfp4.quantise(weight)
    assert torch.equal(ours.scales.float(), scales.float())
    assert ours.gain == pytest.approx(1 / factor.item(), rel=1e-6)
    torch.testing.assert_close(ours.dequantise(), want, rtol=1e-5, atol=0)
    wrong = nvfp4.quantise(weight, factor=factor * 2)  # negative control
    assert not torch.allclose(wrong.dequantise(), want, rtol=1e-5)


def test_fp8_rows_are_those_of_compressed_tensors():
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel")
    weight = weights("student")
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    scales, zeros = utils.calculate_qparams(low, high, arguments)
    want = forward.fake_quantize(weight, scales, zeros, arguments)
    ours = fp8.quantise(weight, torch.float32)
    torch.testing.assert_close(ours.dequantise(), want, rtol=1e-6, atol=0)
