"""Lloyd-Max levels and random rotations: the two parts of kv/rotate that are pure mathematics."""

from __future__ import annotations

import math

import pytest
import torch

from compresskit.methods.kv._lloyd import fitted, nearest, normal
from compresskit.methods.kv._rotation import rotation

# Max 1960, table I (levels above zero to three or four digits, and the mean squared error).
LEVELS = {
    1: (0.7980,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
ERROR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def loss(levels: torch.Tensor) -> float:
    """Mean squared error on the standard normal distribution, by adding up a fine grid."""
    x = torch.linspace(-9, 9, 180001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return float((density * (x - levels[nearest(x, levels)]).square()).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_levels_of_the_normal_distribution_are_the_published_ones(bits):
    levels = normal(bits)
    assert len(levels) == 2**bits
    assert levels[2 ** (bits - 1) :] == pytest.approx(LEVELS[bits], abs=6e-4)
    assert levels == tuple(-one for one in reversed(levels))
    table = torch.tensor(levels, dtype=torch.float64)
    assert loss(table) == pytest.approx(ERROR[bits], rel=1e-3)
    assert 4.0**-bits < loss(table) < math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_other_levels_lose_more(bits):
    """Negative control: the loss above tells the best levels from nearly as good ones."""
    best = torch.tensor(normal(bits), dtype=torch.float64)
    assert loss(best * 1.05) > loss(best) * 1.001
    assert loss(best + 0.05) > loss(best) * 1.001
    moved = best.clone()
    moved[0] -= 0.2
    assert loss(moved) > loss(best) * 1.001


def test_levels_fitted_to_normal_samples_are_nearly_those():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    found = fitted(x, torch.ones_like(x), 3)
    assert loss(found.double()) == pytest.approx(ERROR[3], rel=0.02)


def weighted_loss(x: torch.Tensor, w: torch.Tensor, levels: torch.Tensor) -> float:
    return float((w * (x - levels[nearest(x, levels)]).square()).sum())


@pytest.mark.parametrize("seed", range(5))
def test_two_fitted_levels_are_those_of_an_exhaustive_search(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, generator=generator).double()
    w = torch.rand(60, generator=generator).double() ** 3
    ordered, weight = x.sort().values, w[x.argsort()]
    best = math.inf
    for cut in range(1, 60):
        sides = (slice(0, cut), slice(cut, 60))
        pair = [float((weight[s] * ordered[s]).sum() / weight[s].sum()) for s in sides]
        best = min(best, weighted_loss(x, w, torch.tensor(pair, dtype=torch.float64)))
    found = weighted_loss(x, w, fitted(x, w, 1).double())
    assert found == pytest.approx(best, rel=0.02)
    # Weights matter: levels fitted without them are worse by them.
    assert weighted_loss(x, w, fitted(x, torch.ones_like(w), 1).double()) > found


def test_fewer_numbers_than_levels_are_met_exactly():
    x = torch.tensor([3.0, -1.0, 3.0, 0.5])
    levels = fitted(x, torch.tensor([1.0, 1.0, 0.0, 2.0]), 3)
    assert torch.isfinite(levels).all()
    assert torch.equal(levels[nearest(x, levels)], x)
    assert torch.equal(levels, levels.sort().values)


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
@pytest.mark.parametrize("width", [8, 24, 64, 80, 96, 128])
def test_a_rotation_keeps_lengths_and_products(kind, width):
    turn = rotation(kind, width, 3)
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 50, width, generator=generator)
    products = ((k @ turn) * (q @ turn)).sum(-1)
    scale = k.norm(dim=-1) * q.norm(dim=-1)
    assert ((products - (k * q).sum(-1)) / scale).abs().max() < 1e-5
    assert (k @ turn).norm(dim=-1) == pytest.approx(k.norm(dim=-1), rel=1e-5)
    assert (k @ turn) @ turn.T == pytest.approx(k, abs=1e-5)
    # It does turn: no coordinate stays what it was.
    assert turn.diagonal().abs().max() < 0.9


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
def test_a_rotation_is_that_of_its_seed(kind):
    assert torch.equal(rotation(kind, 32, 1), rotation(kind, 32, 1))
    assert not torch.equal(rotation(kind, 32, 1), rotation(kind, 32, 2))


def test_a_hadamard_rotation_spreads_one_number_evenly():
    assert rotation("hadamard", 64, 0).abs() == pytest.approx(torch.full((64, 64), 1 / 8))


def distortion(turn: torch.Tensor, bits: int) -> float:
    """Mean |x - x^|^2 of unit vectors of 128 numbers, four of them 20 times as large."""
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40, 77, 100]] *= 20
    y = torch.nn.functional.normalize(x, dim=-1) @ turn * math.sqrt(128)
    table = torch.tensor(normal(bits))
    return float((y - table[nearest(y, table)]).square().mean())


@pytest.mark.parametrize(
    ("bits", "turned", "plain"),
    # Measured elsewhere, on other vectors made the same way.
    [(1, 0.357, 1.02), (2, 0.117, 0.61), (3, 0.034, 0.43), (4, 0.0092, 0.33)],
)
def test_rotated_vectors_lose_what_normal_numbers_do(bits, turned, plain):
    assert distortion(rotation("orthogonal", 128, 0), bits) == pytest.approx(turned, rel=0.1)
    # Negative control: without the rotation four channels spoil the levels for all others.
    assert distortion(torch.eye(128), bits) == pytest.approx(plain, rel=0.1)
