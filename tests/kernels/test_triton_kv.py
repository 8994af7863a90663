"""The Triton kernels of the cache and the fused norm, on a machine without a GPU.

Numbers: Triton's interpreter against the references, in a process of its own
(`test_the_interpreted_kernels_agree_with_their_references` runs this file again with it).
Machine code: compiled for compute capability 8.0 and 9.0, wide loads and no spilled registers.
"""

import itertools
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from compresskit_kernels import testing
from compresskit_kernels.kv_decode import (
    Rows,
    cases as kv_cases,
    empty,
    quantise,
    reference as kv_reference,
)
from compresskit_kernels.norm_quantise import (
    cases as norm_cases,
    reference as norm_reference,
)
from compresskit_kernels.rope_append import cases as rope_cases, reference as rope_reference
from compresskit_kernels.rope_append.triton import to_e4m3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
DTYPES = (torch.float32, torch.float16)  # bfloat16 is wrong in the interpreter


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch):
    """Triton warns while this is unset, since its default is about to change."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@compiled
def test_the_interpreted_kernels_agree_with_their_references():
    done = testing.interpreted(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, timeout_seconds=900
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def attention_case(shape, kinds, dtype):
    torch.manual_seed(shape.slots)
    key, key_groups, value, value_groups = kinds
    size = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    keys = quantise(torch.randn(size) + 0.3, key, group=shape.width // key_groups)
    values = quantise(
        torch.randn(size) + 0.5, value, group=shape.width // value_groups, dtype=torch.float16
    )
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.width).to(dtype)
    lengths = None if shape.lengths is None else torch.tensor(shape.lengths, dtype=torch.int32)
    return q, keys, values, lengths


def attend(q, keys, values, lengths, mask=None, parts=None):
    from compresskit_kernels.kv_decode import fits, triton as fast

    assert fits(q, keys, values)
    return fast.attend(q, keys, values, lengths, mask, q.shape[-1] ** -0.5, parts)


def difference(got, q, keys, values, lengths, mask=None):
    want = kv_reference.attend(q.float(), keys, values, lengths, mask, q.shape[-1] ** -0.5)
    return float((got.float() - want).norm() / want.norm())


@interpreted
@pytest.mark.parametrize("kinds", kv_cases.KINDS, ids=str)
@pytest.mark.parametrize("shape", kv_cases.SHAPES, ids=str)
def test_attention(shape, kinds):
    # Both types with every kind and every shape, but not each pair of them: it takes a while.
    dtype = DTYPES[(kv_cases.SHAPES.index(shape) + kv_cases.KINDS.index(kinds)) % 2]
    q, keys, values, lengths = attention_case(shape, kinds, dtype)
    got = attend(q, keys, values, lengths, parts=1 + 2 * (shape.slots % 2))
    assert got.dtype == dtype
    assert difference(got, q, keys, values, lengths) < kv_cases.RELATIVE_ERROR[dtype]


@interpreted
@pytest.mark.parametrize("kinds", kv_cases.KINDS[2:4], ids=str)
def test_attention_with_a_mask_strides_and_small_scales(kinds):
    """A view of a larger buffer, slots that hold NaN, and values below float16's normal numbers."""
    shape = kv_cases.Shape(2, 6, 2, 3, 90, 64, (80, 33))
    q, keys, values, lengths = attention_case(shape, kinds, torch.float16)
    values = Rows(values.kind, values.codes, values.scales * 2**-8,
                  None if values.offsets is None else values.offsets * 2**-8)  # fmt: skip
    keys, values = keys.between(5, 90), values.between(5, 90)
    mask = torch.rand(2, 85) > 0.3
    values.scales[~mask.unsqueeze(1).expand(2, 2, 85)] = torch.nan
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = attend(q, keys, values, lengths, mask, parts=2)
    assert difference(got, q, keys, values, lengths, mask) < kv_cases.RELATIVE_ERROR[q.dtype]
    assert not attend(q, keys, values, lengths * 0, mask).any()


@interpreted
def test_attention_without_the_type_e4m3(monkeypatch):
    """GPUs before compute capability 8.9 read the bytes by shifts."""
    from compresskit_kernels.kv_decode import triton as fast

    monkeypatch.setattr(fast, "_has_fp8", lambda _: False)
    q, keys, values, lengths = attention_case(kv_cases.SHAPES[2], kv_cases.KINDS[3], torch.float16)
    assert difference(attend(q, keys, values, lengths), q, keys, values, lengths) < 1e-3


@interpreted
@pytest.mark.parametrize("kinds", kv_cases.KINDS, ids=str)
def test_a_wrong_scale_or_a_shift_is_noticed_in_the_kernel(kinds):
    """Negative controls: what the kernel is fed, not the reference, is spoilt."""
    q, keys, values, lengths = attention_case(kv_cases.SHAPES[2], kinds, torch.float16)
    limit = kv_cases.RELATIVE_ERROR[torch.bfloat16]
    scales = values.scales.clone()
    scales[:, :, 3] *= 1.5
    spoilt = Rows(values.kind, values.codes, scales, values.offsets)
    assert difference(attend(q, keys, spoilt, lengths), q, keys, values, lengths) > limit
    assert difference(attend(q, keys, values, lengths - 1), q, keys, values, lengths) > limit


def rope_case(shape, kinds, dtype, scales):
    torch.manual_seed(shape.slots)
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.width)
    q = torch.randn(shape.batch, shape.heads, shape.tokens, shape.width).to(dtype)
    k, v = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    k[0, 0, 0] = 0
    v[-1, -1, -1] = 3
    angle = torch.rand(shape.batch, shape.tokens, shape.width // 2) * 6
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    room = (shape.batch, shape.kv_heads, shape.slots, shape.width)
    sides = [
        [
            empty(kind, room, group=shape.width // groups, dtype=scales)
            for kind, groups in (kinds[:2], kinds[2:])
        ]
        for _ in range(2)
    ]
    return (q, k, v, cos, sin), sides, torch.tensor(shape.starts, dtype=torch.int32)


@interpreted
@pytest.mark.parametrize(("dtype", "scales"), [DTYPES, DTYPES[::-1]], ids=str)
@pytest.mark.parametrize("kinds", kv_cases.KINDS, ids=str)
@pytest.mark.parametrize("shape", rope_cases.SHAPES[:2], ids=str)
def test_appending(shape, kinds, dtype, scales):
    from compresskit_kernels.rope_append import fits, triton as fast

    inputs, (ours, theirs), starts = rope_case(shape, kinds, dtype, scales)
    assert fits(inputs[0], inputs[3], *ours)
    got = fast.append(*inputs, *ours, starts)
    want = rope_reference.append(*inputs, *theirs, starts)
    torch.testing.assert_close(got, want)
    for mine, other in zip(ours, theirs, strict=True):
        apart = (mine.levels() - other.levels()).abs()
        assert (apart > 0).float().mean() <= rope_cases.SHARE_APART
        torch.testing.assert_close(mine.dequantise(), other.dequantise(), rtol=0.07, atol=0.3)
        torch.testing.assert_close(mine.scales, other.scales, rtol=1e-6, atol=0)


@interpreted
def test_appending_beyond_the_capacity_writes_nothing():
    from compresskit_kernels.rope_append import triton as fast

    inputs, (ours, _), _ = rope_case(
        rope_cases.SHAPES[1], kv_cases.KINDS[0], torch.float32, torch.float32
    )
    fast.append(*inputs, *ours, torch.tensor([18, -2], dtype=torch.int32))
    filled = ours[1].codes.any(-1).any(1)
    assert filled.nonzero().tolist() == [[0, 18], [0, 19], [1, 0]]


@triton.jit
def encode(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, to_e4m3(tl.load(x + at)))


@interpreted
def test_bytes_of_e4m3_are_those_of_torch():
    # Every e4m3 number, every middle of two, both neighbours of each in float32.
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (exact[1:] + exact[:-1]) / 2
    points = torch.cat([exact, ties, ties.nextafter(exact[1:]), ties.nextafter(exact[:-1])])
    x = torch.cat([points, -points])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    out = torch.zeros(1024, dtype=torch.uint8)
    encode[(1,)](x, out, 1024)
    assert torch.equal(out, x.to(torch.float8_e4m3fn).view(torch.uint8))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", norm_cases.SHAPES, ids=str)
def test_norm(shape, dtype):
    from compresskit_kernels.norm_quantise import fits, triton as fast

    torch.manual_seed(1)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    x[0] = 0
    assert fits(x)
    for rows in (x, torch.stack([x, x], -1)[..., 0]):
        got = fast.norm_rows(rows, weight, 1e-5, 1.0)
        want = norm_reference.norm_rows(x, weight, 1e-5, 1.0)
        torch.testing.assert_close(got.steps, want.steps, rtol=norm_cases.STEP_ERROR, atol=0)
        apart = (got.codes.int() - want.codes.int()).abs()
        assert apart.max() <= norm_cases.CODES_APART
        assert (apart > 0).float().mean() <= norm_cases.SHARE_APART
    wrong = fast.norm_rows(x, weight, 1e-5, 0.0)
    assert not x.any() or not torch.equal(wrong.codes, want.codes)


CODES = {"int8": "*i8", "int4": "*u8", "fp8": "*u8"}


def compile_attention(kind, groups, width, capability, share=4, queries=1, mask=False):
    from compresskit_kernels.kv_decode import triton as fast

    rows = share * queries
    options = fast.configuration(width, rows)
    constants = {
        "KEY": kind, "KEY_GROUPS": groups, "VALUE": kind, "VALUE_GROUPS": groups,
        "SHARE": share, "QUERIES": queries, "ROWS": max(16, 1 << (rows - 1).bit_length()),
        "HALF": width // 2, "BLOCK": options.pop("BLOCK"), "HAS_LENGTHS": True, "HAS_MASK": mask,
        "HAS_FP8": capability >= 89,
    }  # fmt: skip
    if groups == 1:  # what Triton makes of a stride of 1 at a launch
        constants |= {"ks_slot": 1, "vs_slot": 1}
    return testing.compile_for(
        fast.attend_part,
        signature(
            fast.attend_part,
            constants,
            q="*bf16", key_codes=CODES[kind], value_codes=CODES[kind], key_scales="*fp16",
            value_scales="*fp16", key_offsets="*fp16", value_offsets="*fp16", lengths="*i32",
            mask="*u8", out="*fp32", lse="*fp32", factor="fp32", heads="i32", parts="i32",
            ks_slot="i32", vs_slot="i32",
        ),
        constants,
        capability=capability,
        **options,
    )  # fmt: skip


def signature(kernel, constants, **kinds):
    """Types of all run-time arguments; those not named are strides that divide by 16."""
    return {n: kinds.get(n, "i32:16") for n in kernel.arg_names if n not in constants}


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kind", "groups"), [("int8", 1), ("int4", 2), ("fp8", 1)])
def test_attention_compiles_to_wide_copies_and_tensor_cores(kind, groups, capability):
    kernel = compile_attention(kind, groups, 128, capability)
    assert testing.spills(kernel) == 0
    assert testing.tensor_cores(kernel.ptx) > 0
    loads = testing.vector_loads(kernel.ptx)
    # The codes come by asynchronous copies of 8 or 16 bytes; what is narrow are scales.
    copies = re.findall(r"cp\.async\.c[ga]\S+ .*, (0x\w+), ", kernel.ptx)
    assert copies
    assert set(copies) <= {"0x8", "0x10"}
    assert loads.wide >= len(copies)
    assert kernel.metadata.shared < 75_000


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_the_other_kernels_compile_without_spills(capability):
    from compresskit_kernels.kv_decode.triton import MERGED, merge_parts
    from compresskit_kernels.norm_quantise.triton import norm_row, warps

    constants = {"ROWS": 4, "PARTS": 64, "WIDTH": 128, "BLOCK": MERGED}
    merge = testing.compile_for(
        merge_parts,
        signature(merge_parts, constants, partial="*fp32", lse="*fp32", out="*bf16", parts="i32"),
        constants,
        capability=capability,
    )
    append = compile_append("int4", 2, 128, capability)
    norm = testing.compile_for(
        norm_row,
        signature(
            norm_row, {"BLOCK": 4096}, x="*bf16", weight="*bf16", codes="*i8", steps="*fp32",
            eps="fp32", shift="fp32",
        ),
        {"BLOCK": 4096},
        capability=capability,
        num_warps=warps(4096),
    )  # fmt: skip
    assert [testing.spills(kernel) for kernel in (merge, append, norm)] == [0, 0, 0]
    for kernel in (merge, norm):
        assert testing.vector_loads(kernel.ptx).sixteen > 0


def compile_append(kind, groups, width, capability):
    from compresskit_kernels.rope_append.triton import append_row

    constants = {
        "KEY": kind, "KEY_GROUPS": groups, "KEY_TINY": 6.1e-5, "VALUE": kind,
        "VALUE_GROUPS": groups, "VALUE_TINY": 6.1e-5, "HALF": width // 2,
    }  # fmt: skip
    return testing.compile_for(
        append_row,
        signature(
            append_row, constants, q="*bf16", k="*bf16", v="*bf16", cos="*fp32", sin="*fp32",
            starts="*i32", out="*bf16", key_codes=CODES[kind], key_scales="*fp16",
            key_offsets="*fp16", value_codes=CODES[kind], value_scales="*fp16",
            value_offsets="*fp16", tokens="i32", q_heads="i32", kv_heads="i32", slots="i32",
            ks_slot="i32", vs_slot="i32",
        ),
        constants,
        capability=capability,
        num_warps=1,
    )  # fmt: skip


@compiled
def test_a_kernel_that_spills_is_noticed():
    """Negative control: the same kernel with 24 registers a thread."""
    from compresskit_kernels.norm_quantise.triton import norm_row

    constants = {"BLOCK": 4096}
    kinds = {"x": "*bf16", "weight": "*bf16", "codes": "*i8", "steps": "*fp32"}
    kernel = testing.compile_for(
        norm_row,
        signature(norm_row, constants, **kinds, eps="fp32", shift="fp32"),
        constants,
        capability=90,
        maxnreg=24,
    )
    assert testing.spills(kernel) > 0


@compiled
@pytest.mark.grid
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("kind", "groups"), [("int8", 1), ("int4", 1), ("int4", 2), ("fp8", 1)])
def test_every_configuration_fits_its_registers(kind, groups, width, capability):
    for (share, queries), mask in itertools.product(
        ((1, 1), (4, 1), (4, 4), (4, 8), (8, 8)), (False, True)
    ):
        kernel = compile_attention(kind, groups, width, capability, share, queries, mask)
        # Reading e4m3 takes registers, by shifts more than with the type; a mask takes some too.
        allowed = 64 if kind == "fp8" and (mask or capability < 89) else 0
        assert testing.spills(kernel) <= allowed, (share, queries, mask)
    assert testing.spills(compile_append(kind, groups, width, capability)) == 0


def test_the_sources_import_triton_nowhere_but_in_their_triton_files():
    """The references must work where triton is not installed."""
    folder = Path(kv_reference.__file__).parents[1]
    for op in ("kv_decode", "rope_append", "norm_quantise"):
        for path in (folder / op).glob("*.py"):
            text = path.read_text()
            assert ("\nimport triton" in text) == (path.name == "triton.py"), path
