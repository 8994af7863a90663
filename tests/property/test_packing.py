"""Packing loses nothing, rounding loses at most half a step: for any weight, not for nice ones."""

import pytest
import torch
from compresskit_kernels import host
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.packing import pack, packed_bytes, unpack
from hypothesis import given, settings, strategies as st

from compresskit.methods.quant import int4, int8

GROUPS = st.sampled_from((32, 64, 128, 256))
SLACK = 1.0001  # float32 arithmetic around the exact bound


@st.composite
def weights(draw):
    """Small matrices of any scale, some rows shifted far from zero, some constant, some zero."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, width, generator=generator)
    weight *= 10.0 ** draw(st.integers(-6, 6))
    kind = draw(st.sampled_from(("plain", "zero", "constant", "outlier")))
    if kind == "zero":
        weight[0] = 0
    elif kind == "constant":
        weight[0] = weight[0, 0].clone()
    elif kind == "outlier":
        weight[0, draw(st.integers(0, width - 1))] *= 1000
    return weight


def per_weight(values, weight, group):
    """Spread one value per group over the columns."""
    return values.float().repeat_interleave(group, dim=1)[:, : weight.shape[1]]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 90), st.integers(0, 2**32))
def test_codes_of_every_width_come_back(bits, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(width, bits))
    assert packed_bytes(width, bits) == -(-width * bits // 32) * 4
    assert torch.equal(unpack(packed, bits, width), codes)


@settings(deadline=None)
@given(weights(), GROUPS)
def test_int4_asymmetric_is_within_half_a_scale(weight, group):
    stored = int4.quantise(weight, group=group, symmetric=False, dtype=torch.float32)
    error = (stored.dequantise() - weight).abs()
    largest = weight.abs().amax()
    assert (error <= per_weight(stored.scales, weight, group) / 2 * SLACK + largest * 1e-6).all()


@settings(deadline=None)
@given(weights(), GROUPS)
def test_int4_symmetric_is_within_half_a_scale(weight, group):
    """Half a step everywhere, the top of the range too: the largest weight lies at 7.5 steps."""
    stored = int4.quantise(weight, group=group, symmetric=True, dtype=torch.float32)
    error = (stored.dequantise() - weight).abs()
    assert (error <= per_weight(stored.scales, weight, group) / 2 * SLACK).all()


@settings(deadline=None)
@given(weights())
def test_int8_is_within_half_a_scale(weight):
    stored = int8.quantise(weight, torch.float32)
    error = (stored.dequantise() - weight).abs()
    assert (error <= stored.scales[:, None] / 2 * SLACK).all()


@settings(deadline=None)
@given(weights(), GROUPS, st.booleans())
def test_bfloat16_metadata_adds_its_own_rounding_and_no_more(weight, group, symmetric):
    stored = int4.quantise(weight, group=group, symmetric=symmetric)
    scales = per_weight(stored.scales, weight, group)
    bound = scales * (0.5 + 8 * 2**-8)
    if stored.offsets is not None:
        bound = bound + per_weight(stored.offsets, weight, group).abs() * 2**-8
    assert ((stored.dequantise() - weight).abs() <= bound * SLACK + 1e-30).all()


@settings(deadline=None)
@given(weights())
def test_quantising_twice_changes_nothing(weight):
    once = int8.quantise(weight, torch.float32)
    twice = int8.quantise(once.dequantise(), torch.float32)
    assert torch.equal(once.codes, twice.codes)


@settings(deadline=None)
@given(weights(), GROUPS)
def test_rows_stand_alone(weight, group):
    """Slabs of rows are quantised one after the other, so no row may look at another."""
    whole = int4.quantise(weight, group=group, symmetric=False)
    parts = [int4.quantise(row[None], group=group, symmetric=False) for row in weight]
    joined = GroupedWeight.join(parts)
    assert torch.equal(whole.packed, joined.packed)
    assert torch.equal(whole.scales, joined.scales)


@pytest.mark.skipif(host.int4_block() is None, reason="no packed product on this CPU")
@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32))
def test_the_layout_of_torch_comes_back(blocks, half, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks * host.ROWS, 2 * half)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    back = host.int4_codes(packed, host.int4_block())
    assert torch.equal(back.transpose(1, 2).reshape(shape).int(), codes)
