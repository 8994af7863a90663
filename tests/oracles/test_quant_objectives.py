"""Quantisers that solve for something are better at it than rounding to nearest.

The GPTQ figures were computed by a separate script that shares no code with this package: seed 0,
X = randn(2048, 256) @ (0.3 randn(256, 256) + I), H = XᵀX, then W = randn(256, 256); minimum to
maximum in groups of 64 with the group's scale taken from the updated columns, damping 0.01 of the
mean diagonal, float64. They are tr(Δ H Δᵀ) of GPTQ over that of rounding to nearest.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from compresskit.methods.quant import _gptq, _group, hqq
from compresskit.methods.quant._gptq import inverse_root, solve
from compresskit.methods.quant._moments import Moments
from compresskit.methods.quant.awq import Search

SIZE = 64
RATIOS = {4: 0.503, 3: 0.525, 2: 0.656}


@functools.cache
def recipe():
    torch.manual_seed(0)
    inputs = torch.randn(2048, 256) @ (0.3 * torch.randn(256, 256) + torch.eye(256))
    return torch.randn(256, 256).double(), (inputs.T @ inputs).double()


def objective(stored, weight, hessian):
    off = stored.dequantise().double() - weight
    return float(((off @ hessian) * off).sum())


def fit(bits, symmetric=False, zero_point="float"):
    options = {"bits": bits, "symmetric": symmetric, "zero_point": zero_point}
    return functools.partial(_group.fit, **options, dtype=torch.float32)


def gptq(weight, hessian, grid_of, size=SIZE, **options):
    solution = solve(weight, hessian, grid_of, size=size, **options)
    return solution.store(slice(None), size)


def rounded(weight, grid_of, size=SIZE):
    parts = _group.grouped(weight, size)
    grid = grid_of(parts)
    return _group.store(grid.codes(parts), grid, weight.shape[1], size)


@pytest.mark.parametrize("bits", RATIOS)
def test_gptq_leaves_the_share_of_the_error_that_was_computed_elsewhere(bits):
    weight, hessian = recipe()
    solved = objective(gptq(weight, hessian, fit(bits)), weight, hessian)
    plain = objective(rounded(weight, fit(bits)), weight, hessian)
    assert solved / plain == pytest.approx(RATIOS[bits], abs=6e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_without_correlations_gptq_is_rounding_to_nearest(act_order):
    weight, _ = recipe()
    stored = gptq(weight, torch.eye(256).double(), fit(4), act_order=act_order)
    assert torch.equal(stored.codes(), rounded(weight, fit(4)).codes())


@pytest.mark.parametrize(
    "grid_of",
    [fit(4, symmetric=True), fit(4, zero_point="integer"), fit(8)],
    ids=["symmetric", "integer zeros", "8 bits"],
)
@pytest.mark.parametrize("size", [32, 256, 96, 1000])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_on_every_grid(grid_of, size, act_order):
    """96 leaves a ragged last group, 256 is longer than a lazy block, 1000 a whole row."""
    weight, hessian = recipe()
    solved = gptq(weight, hessian, grid_of, size, act_order=act_order)
    assert objective(solved, weight, hessian) < 0.8 * objective(
        rounded(weight, grid_of, size), weight, hessian
    )


def test_lazy_blocks_do_not_change_the_result(monkeypatch):
    """The errors reach every later column, at once or a block later."""
    weight, hessian = recipe()
    usual = gptq(weight, hessian, fit(3))
    monkeypatch.setattr(_gptq, "LAZY", 256)
    monkeypatch.setattr(_gptq, "ROWS", 100)
    assert torch.equal(gptq(weight, hessian, fit(3)).codes(), usual.codes())


def test_the_root_of_the_inverse_is_one():
    _, hessian = recipe()
    upper = inverse_root(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(256).double())
    assert torch.equal(upper, upper.triu())


def test_unused_inputs_are_rounded_on_their_own():
    weight, hessian = recipe()
    hessian = hessian.clone()
    hessian[[3, 70]], hessian[:, [3, 70]] = 0.0, 0.0
    grid_of = fit(4, symmetric=True)
    solved = gptq(weight, hessian, grid_of)
    assert objective(solved, weight, hessian) < 0.7 * objective(
        rounded(weight, grid_of), weight, hessian
    )
    step = 2 * weight.abs().amax() / 15
    off = (solved.dequantise() - weight)[:, [3, 70]]
    assert float(off.abs().max()) <= step


@pytest.mark.parametrize("harm", ["scales", "offsets", "columns"])
def test_a_harmed_solution_is_noticed(harm):
    """Negative controls: shuffled scales, wrong zero points, codes in the order of rounding."""
    weight, hessian = recipe()
    stored = gptq(weight, hessian, fit(4), act_order=True)
    plain = objective(rounded(weight, fit(4)), weight, hessian)
    assert objective(stored, weight, hessian) < 0.6 * plain
    turned = torch.arange(256).roll(1)
    if harm == "scales":
        bad = replace(stored, scales=stored.scales[turned])
    elif harm == "offsets":
        bad = replace(stored, offsets=stored.offsets + stored.scales / 2)
    else:
        codes = stored.codes()[:, torch.argsort(hessian.diagonal(), descending=True)]
        bad = replace(stored, packed=_group.pack(codes, 4))
    assert objective(bad, weight, hessian) > plain


def heavy_tailed(rows=64, width=512):
    torch.manual_seed(1)
    return torch.distributions.StudentT(4.0).sample((rows, width))


def p_norm(stored, weight, p=0.7):
    """In steps of each group, as the solver counts."""
    step = stored.spread(stored.scales.float())
    return ((stored.dequantise() - weight) / step).abs().pow(p)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "width"), [(64, 512), (0, 512), (64, 500)])
def test_no_row_is_worse_in_the_p_norm_than_rounded(bits, group, width):
    weight = heavy_tailed(width=width)
    solved = p_norm(hqq.quantise(weight, bits=bits, group=group), weight).sum(dim=1)
    plain = p_norm(_group.quantise(weight, bits=bits, group=group), weight).sum(dim=1)
    assert bool((solved <= plain * (1 + 1e-6)).all())
    # With 8 bits a bfloat16 offset is hardly finer than the steps; nothing is left to gain.
    gain = 1.0 if bits == 8 else 0.98 if group else 0.995
    assert float(solved.sum()) < gain * float(plain.sum())


def test_an_offset_beside_the_solved_one_is_worse():
    """Negative control: the norm does depend on the offsets, in both directions."""
    weight = heavy_tailed()
    stored = hqq.quantise(weight, bits=3, group=64)
    least = float(p_norm(stored, weight).sum())
    for step in (-0.25, 0.25):
        moved = replace(stored, offsets=stored.offsets + step * stored.scales)
        assert float(p_norm(moved, weight).sum()) > least


def channels():
    """Inputs of which a few channels are thirty times larger, as in real models."""
    torch.manual_seed(2)
    scale = torch.ones(128)
    scale[::16] = 30.0
    moments = Moments.empty(128, torch.device("cpu"), products=True)
    moments.add(torch.randn(1024, 128) * scale)
    return torch.randn(96, 128), moments


def search(**options):
    usual = {"bits": 3, "group": 64, "symmetric": False, "zero_point": "float", "points": 10}
    return Search(**{**usual, "clip": False, **options})


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"zero_point": "integer"}])
def test_awq_finds_the_channels_that_matter(options):
    weight, moments = channels()
    looking = search(**options)
    scale = looking.scale([weight], moments)
    assert scale is not None
    assert scale[::16].min() > 1.5 * scale[1::16].max()
    assert looking.loss([weight], moments, scale) < 0.7 * looking.loss([weight], moments, None)


def test_awq_loss_is_the_output_error():
    weight, moments = channels()
    torch.manual_seed(2)
    scale = torch.ones(128)
    scale[::16] = 30.0
    inputs = torch.randn(1024, 128) * scale
    plain = _group.quantise(weight, bits=3, group=64).dequantise()
    direct = float((inputs @ (plain - weight).T).square().sum() / 1024)
    assert search().loss([weight], moments, None) == pytest.approx(direct, rel=1e-3)


def test_awq_leaves_even_channels_alone():
    torch.manual_seed(3)
    moments = Moments.empty(128, torch.device("cpu"), products=True)
    moments.products, moments.count = torch.eye(128), 1
    moments.absolute += 1
    assert search().scale([torch.randn(96, 128)], moments) is None
