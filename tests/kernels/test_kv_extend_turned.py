"""Turned rows behind old ones: the kernel against the formula in float64."""

import pytest
import torch
from compresskit_kernels.kv_decode import Rows
from compresskit_kernels.kv_decode.planes import packed_width, unpack
from compresskit_kernels.kv_decode.turned import kv_extend_turned
from compresskit_kernels.native import build

IMPLEMENTATIONS = [
    pytest.param("native", marks=pytest.mark.skipif(not build.available(), reason=build.reason())),
    "reference",
]
MIDDLE = 1e-5
"""How near the middle of two levels rounding in float32 may decide."""


def table(bits):
    """Levels that are not evenly spaced."""
    half = torch.linspace(0.1, 2.5, 2 ** (bits - 1)) ** 1.3
    return torch.cat((-half.flip(0), half))


def none(bits, shape, dtype=torch.bfloat16):
    batch, heads, _, width = shape
    codes = torch.empty((batch, heads, 0, packed_width(width, f"int{bits}")), dtype=torch.uint8)
    scales = torch.empty((batch, heads, 0, 1), dtype=dtype)
    return Rows(f"int{bits}", codes, scales, table=table(bits))


def case(width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 9, width, generator=generator).to(dtype) * 3
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].contiguous()
    return x, turn


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_levels_of_the_turned_row(impl, bits, width, dtype):
    x, turn = case(width, dtype)
    rows = kv_extend_turned(none(bits, x.shape), x[:, :, :4], turn, impl=impl)
    rows = kv_extend_turned(rows, x[:, :, 4:], turn, impl=impl)
    y = x.double() @ turn.double()
    scale = y.norm(dim=-1, keepdim=True) / width**0.5
    unit, levels = y / scale, rows.table.double()
    found = unpack(rows.codes, f"int{bits}").long()
    nearest = (unit.unsqueeze(-1) - levels).abs().amin(-1)
    assert ((unit - levels[found]).abs() <= nearest + MIDDLE).all()
    torch.testing.assert_close(rows.scales.double(), scale, rtol=2**-8, atol=0)
    # Another turn gives other codes: the comparison above could have failed.
    other = kv_extend_turned(none(bits, x.shape), x, torch.eye(width), impl=impl)
    assert not torch.equal(other.codes, rows.codes)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_of_zeros_stays_finite(impl):
    x, turn = case(64)
    rows = kv_extend_turned(none(3, x.shape), x * 0, turn, impl=impl)
    assert torch.isfinite(rows.dequantise()).all()
    assert rows.dequantise().abs().max() < 1e-30


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_old_rows_are_untouched(impl):
    x, turn = case(64)
    before = kv_extend_turned(none(4, x.shape), x, turn, impl=impl)
    after = kv_extend_turned(before, x.flip(2), turn, impl=impl)
    assert torch.equal(after.codes[:, :, :9], before.codes)
    assert torch.equal(after.scales[:, :, :9], before.scales)
    assert torch.equal(after.codes[:, :, 9:], before.codes.flip(2))


def test_what_does_not_fit_is_refused():
    x, turn = case(64)
    with pytest.raises(ValueError, match="do not follow"):
        kv_extend_turned(none(4, x.shape), x, turn[:32, :32])
    with pytest.raises(ValueError, match="need a table"):
        kv_extend_turned(Rows("int4", *none(4, x.shape).tensors().values()), x, turn)
    odd, turn = case(80)
    with pytest.raises(ValueError, match="native"):
        kv_extend_turned(none(4, odd.shape), odd, turn, impl="native")
    assert kv_extend_turned(none(4, odd.shape), odd, turn).coded == 9
