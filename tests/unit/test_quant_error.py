"""How far rounded weights are from the originals, against numbers that were computed elsewhere.

The table holds ‖Ŵ - W‖ / ‖W‖ for seeded weights, from a separate script that shares no code with
this package (torch 2.13, float32 scales); the uniform rows also follow from arithmetic: rounding
to a step d loses d / sqrt(12), and uniform weights on [-h, h] measure h / sqrt(3), so the ratio is
d / 2h: 1/254 at 8 bits, 1/15 at 4 symmetric bits.
"""

import functools
from dataclasses import replace

import pytest
import torch
from compresskit_kernels import host
from compresskit_kernels.dispatch import choose
from compresskit_kernels.grouped_matmul import OP, GroupedWeight
from compresskit_kernels.native import build
from compresskit_kernels.packing import pack

from compresskit.methods.quant import int4, int8
from compresskit.methods.quant._group import quantise

TABLE = {
    "gaussian": {"int8": 0.0083, "asym": (0.0783, 0.0897, 0.0999), "sym": (0.0950, 0.1030, 0.1111)},
    "student": {"int8": 0.0173, "asym": (0.0899, 0.1103, 0.1321), "sym": (0.1198, 0.1398, 0.1626)},
    "uniform": {"int8": 0.0039, "asym": (0.0607, 0.0636, 0.0651), "sym": (0.0667, 0.0667, 0.0667)},
}
NARROW = {
    "gaussian": {(3, 32): 0.1679, (3, 128): 0.2143, (2, 32): 0.3934, (2, 128): 0.5017},
    "student": {(3, 32): 0.1928, (3, 128): 0.2830, (2, 32): 0.4518, (2, 128): 0.6613},
    "uniform": {(3, 32): 0.1300, (3, 128): 0.1395, (2, 32): 0.3035, (2, 128): 0.3256},
}
"""Asymmetric, (bits, group)."""
GROUPS = (32, 64, 128)


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


def int4_error(kind, group, symmetric, dtype=torch.float32):
    weight = drawn()[kind]
    return error(int4.quantise(weight, group=group, symmetric=symmetric, dtype=dtype), weight)


@pytest.mark.parametrize("kind", TABLE)
def test_int8_errors_are_the_published_ones(kind):
    weight = drawn()[kind]
    assert error(int8.quantise(weight, torch.float32), weight) == pytest.approx(
        TABLE[kind]["int8"], abs=6e-5
    )


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("scheme", ["asym", "sym"])
@pytest.mark.parametrize("place", range(3), ids=["g32", "g64", "g128"])
def test_int4_errors_are_the_published_ones(kind, scheme, place):
    got = int4_error(kind, GROUPS[place], scheme == "sym")
    assert got == pytest.approx(TABLE[kind][scheme][place], abs=6e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", TABLE)
def test_bfloat16_scales_cost_almost_nothing(kind, symmetric):
    """Codes are taken against the rounded scale, so its rounding is mostly undone."""
    exact = int4_error(kind, 64, symmetric)
    assert int4_error(kind, 64, symmetric, torch.bfloat16) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_smaller_groups_and_more_bits_are_closer(kind, symmetric):
    errors = [int4_error(kind, group, symmetric) for group in GROUPS]
    assert errors == sorted(errors)
    assert error(int8.quantise(drawn()[kind]), drawn()[kind]) < errors[0] / 4


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize(("bits", "group"), [(3, 32), (3, 128), (2, 32), (2, 128)])
def test_narrower_codes_have_the_published_errors(kind, bits, group):
    want = NARROW[kind][(bits, group)]
    weight = drawn()[kind]
    got = error(quantise(weight, bits=bits, group=group, dtype=torch.float32), weight)
    assert got == pytest.approx(want, abs=6e-5)


@pytest.mark.parametrize("kind", TABLE)
def test_every_further_bit_is_closer(kind):
    weight = drawn()[kind][:128]
    errors = [error(quantise(weight, bits=bits), weight) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_a_scale_that_is_off_is_noticed():
    """Negative control for the table: 2 % on every scale moves the error past its tolerance."""
    weight = drawn()["gaussian"]
    stored = int4.quantise(weight, group=64, symmetric=False, dtype=torch.float32)
    wrong = replace(stored, scales=stored.scales * 1.02)
    assert abs(error(wrong, weight) - TABLE["gaussian"]["asym"][1]) > 6e-5


def test_low_nibble_first():
    codes = torch.arange(16).reshape(1, 16)
    assert bytes(pack(codes, 4)[0].tolist()).hex() == "1032547698badcfe"


@pytest.mark.parametrize(
    "impl",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(host.int4_block() is None, reason="no AVX")),
        pytest.param("native", marks=pytest.mark.skipif(not build.available(), reason="no build")),
        "reference",
    ],
)
def test_the_packed_product_computes_code_minus_eight_times_scale_plus_offset(impl):
    """Codes 0 to 15 twice over, scale 0.5, offset 1, times the identity: exact by hand."""
    codes = torch.arange(32).remainder(16).reshape(1, 32)
    scale, offset = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    weight = GroupedWeight(pack(codes, 4), scale, width=32, group=32, offsets=offset)
    got = choose(OP, scale, weight, impl).prepare(weight)(torch.eye(32))[:, 0]
    by_hand = [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5]
    by_hand += [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    assert got.tolist() == by_hand * 2
