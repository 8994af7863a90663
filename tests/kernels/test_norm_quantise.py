"""RMSNorm and rounding in one pass: float64 formula, agreement with the parts, negative controls."""

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.activations import round_rows
from compresskit_kernels.norm_quantise import cases, norm_quantise, reference


def formula(x, weight, eps=1e-6, shift=0.0):
    """Codes before rounding `[M, K]` and steps `[M]` in float64."""
    x = x.reshape(-1, x.shape[-1]).double()
    normed = x / ((x * x).mean(dim=1, keepdim=True) + eps).sqrt() * (shift + weight.double())
    steps = normed.abs().amax(dim=1) / 127
    return normed / steps.where(steps > 0, 1.0).unsqueeze(1), steps


def make(shape, dtype=torch.float32):
    torch.manual_seed(shape[-1])
    return (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)


def check(got, x, weight, **options):
    exact, steps = formula(x, weight, **options)
    assert got.codes.dtype == torch.int8
    assert got.codes.shape == exact.shape
    assert got.steps.shape == (exact.shape[0], 1)
    torch.testing.assert_close(got.steps[:, 0].double(), steps, rtol=cases.STEP_ERROR, atol=0)
    apart = (got.codes - exact).abs()
    assert apart.max() <= 0.5 + 1e-4  # the nearest code, up to a tie


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_the_reference_follows_the_formula(shape, dtype, shift):
    x, weight = make(shape, dtype)
    check(norm_quantise(x, weight, shift=shift, eps=1e-5), x, weight, eps=1e-5, shift=shift)


def test_it_is_torchs_norm_followed_by_rounding():
    x, weight = make((5, 64))
    want = round_rows(torch.nn.functional.rms_norm(x, (64,), weight, 1e-6))
    got = norm_quantise(x, weight)
    assert (got.codes.int() - want.codes.int()).abs().max() <= cases.CODES_APART
    torch.testing.assert_close(got.dequantise(), want.dequantise(), rtol=0, atol=0.05)


def test_a_row_of_zeros_stays_one():
    x, weight = make((3, 40))
    x[1] = 0
    got = norm_quantise(x, weight)
    assert got.steps[1] == 0
    assert not got.codes[1].any()
    check(got, x, weight)


def test_a_row_does_not_depend_on_the_others():
    x, weight = make((6, 64))
    together = norm_quantise(x, weight)
    louder = x.clone()
    louder[0] *= 100
    again = norm_quantise(louder, weight)
    assert torch.equal(again.codes[1:], together.codes[1:])
    assert torch.equal(again.steps[1:], together.steps[1:])


def test_nothing_in_nothing_out():
    assert norm_quantise(torch.ones(0, 8), torch.ones(8)).codes.shape == (0, 8)
    assert norm_quantise(torch.ones(3, 0), torch.ones(0)).codes.shape == (3, 0)


def test_refusals_and_the_record():
    x, weight = make((3, 40))
    with pytest.raises(ValueError, match=r"a weight \[39\] does not fit inputs \[3, 40\]"):
        norm_quantise(x, weight[:39])
    with pytest.raises(ValueError, match=r"'triton' cannot take .*CUDA device"):
        norm_quantise(x, weight, impl="triton")
    dispatch.reset()
    norm_quantise(x, weight)
    assert dispatch.used() == {"norm_quantise": (reference.ROUTINE.routine,)}
    dispatch.reset()


@pytest.mark.parametrize("wrong", ["eps", "shift", "weight"])
def test_a_wrong_parameter_is_noticed(wrong):
    """Negative controls for the formula's three parameters."""
    x, weight = make((4, 64))
    x = x / 100  # small enough for eps to matter
    options = {"eps": 1e-5, "shift": 0.0}
    spoilt = weight
    if wrong == "weight":
        spoilt = weight.roll(1)
    else:
        options[wrong] += 1e-4 if wrong == "eps" else 1.0
    with pytest.raises(AssertionError):
        check(norm_quantise(x, spoilt, **options), x, weight, eps=1e-5)
