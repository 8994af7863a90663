"""The Triton products compiled ahead of time for sm_80 and sm_90: what the machine code must hold.

Wide loads, no spilled registers, tensor cores where there is more than one row. The configurations
are those of the tables in `tuned/`; the whole grid runs with `-m grid`.
"""

import importlib.util
import itertools

import pytest
from compresskit_kernels import launch
from compresskit_kernels.testing import compile_for, spills, tensor_cores, vector_loads

if launch.INTERPRETED or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from compresskit_kernels.int8_dynamic_matmul import triton as int8
from compresskit_kernels.packed import triton as packed
from compresskit_kernels.packed.product import warps

GPUS = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H100 80GB HBM3"}
WEIGHT = {
    "words": "*i32", "scales": "*bf16", "beside": "*bf16", "table": "*fp32", "gain": "fp32",
    "N": "i32:16", "K": "i32:16", "R": "i32:16", "GROUPS": "i32:16",
}  # fmt: skip
AFFINE, BOOK = packed.AFFINE.value, packed.TABLE.value
# bits, kind, what stands beside the scales, group
COMMON = [(4, AFFINE, 0, 128), (4, AFFINE, 1, 32), (8, AFFINE, 0, 0)]
OTHERS = [
    (4, AFFINE, 1, 128), (4, AFFINE, 2, 64), (4, packed.E2M1.value, 0, 32), (4, BOOK, 0, 64),
    (2, AFFINE, 0, 64), (2, AFFINE, 1, 32), (8, packed.E4M3.value, 0, 0), (8, AFFINE, 2, 32),
]  # fmt: skip


def constants(bits, kind, beside, group):
    return {
        "BITS": bits, "KIND": kind, "BESIDE": beside, "MIDDLE": 2 ** (bits - 1), "FACTOR": 1.0,
        "GROUP": group,
    }  # fmt: skip


def one_row(weight, capability, x="bf16"):
    tile = launch.tiles("packed_one_row", GPUS[capability])[0]
    return compile_for(
        packed.one_row, {"x": f"*{x}", "y": f"*{x}", **WEIGHT},
        {**constants(*weight), "WIDTH": tile.columns, "DEPTH": tile.depth, "WHOLE": True},
        capability=capability, num_warps=tile.warps,
    )  # fmt: skip


def few_rows(weight, capability, tile, x="bf16", **options):
    half = tl.bfloat16 if x == "bf16" else tl.float16
    return compile_for(
        packed.few_rows,
        {"x": f"*{x}", "out": "*fp32", "M": "i32", "SPLITS": "i32", **WEIGHT},
        {**constants(*weight), "HALF": half, "ROWS": tile.rows, "WIDTH": tile.columns, "WHOLE": True},
        capability=capability, num_warps=warps(tile, weight[0]),
        num_stages=1 if weight[1] == BOOK else tile.stages, **options,
    )  # fmt: skip


def spread(weight, capability):
    return compile_for(
        packed.spread, {"out": "*bf16", **WEIGHT}, {**constants(*weight), "HALF": tl.bfloat16},
        capability=capability, num_stages=1,
    )  # fmt: skip


def product(capability, tile):
    final = tile.most_rows > int8.SPLIT_ROWS
    signature = {
        "codes": "*i8", "weight": "*i8", "steps": "*fp32", "scales": "*bf16", "M": "i32",
        "out": "*bf16" if final else "*i32", "N": "i32:16", "PADDED": "i32:16", "SPLITS": "i32",
    }  # fmt: skip
    sizes = {"ROWS": tile.rows, "WIDTH": tile.columns, "DEPTH": tile.depth}
    return compile_for(
        int8.product, signature, {**sizes, "WHOLE": True, "FINAL": final}, capability=capability,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def complaints(compiled, *, wide, narrow, dense):
    """What is wrong: fewer 16-byte loads than `wide`, more below 8 bytes than `narrow`, spills."""
    loads = vector_loads(compiled.ptx)
    found = []
    if loads.sixteen < wide:
        found.append(f"{loads.sixteen} loads of 16 bytes, not {wide}")
    if loads.four + loads.smaller > narrow:
        found.append(f"{loads.four + loads.smaller} narrow loads, more than {narrow}")
    if spills(compiled):
        found.append(f"{spills(compiled)} bytes spilled")
    if dense and not tensor_cores(compiled.ptx):
        found.append("no tensor cores")
    return found


def narrow_loads(weight, rows=16):
    """Loads that may be narrow: look-ups in a code book, and scales where tensor cores want them."""
    bits, kind, beside, group = weight
    lookups = 300 if kind == BOOK else 0
    a_group = 1 + (beside != 0)
    groups = max(1, 512 // bits // group) if group else 1
    return lookups + 8 * a_group * groups


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("weight", COMMON, ids=str)
def test_few_rows(weight, capability):
    for tile in launch.tiles("packed_few_rows", GPUS[capability])[:2]:
        compiled = few_rows(weight, capability, tile)
        # Four times two loads of words, and x by asynchronous copies.
        assert not complaints(compiled, wide=8, narrow=narrow_loads(weight), dense=True)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("weight", [COMMON[0], COMMON[2]], ids=str)
def test_one_row(weight, capability):
    # x is 16 loads of 2 bytes (two rows of words a lane), shared by 8 outputs.
    assert not complaints(one_row(weight, capability), wide=4, narrow=16, dense=False)


@pytest.mark.parametrize("capability", GPUS)
def test_spread(capability):
    assert not complaints(spread(COMMON[0], capability), wide=2, narrow=0, dense=False)


@pytest.mark.parametrize("capability", GPUS)
def test_int8(capability):
    table = launch.tiles("int8_product", GPUS[capability])
    for tile in (table[0], table[-1]):
        # Copies of codes in 16 bytes; scales and steps come once a program, at its end.
        assert not complaints(product(capability, tile), wide=16, narrow=20, dense=True)
    compiled = compile_for(
        int8.round_rows, {"x": "*bf16", "codes": "*i8", "steps": "*fp32", "K": "i32:16",
        "PADDED": "i32:16"}, {"BLOCK": 4096, "ONCE": True}, capability=capability, num_warps=8,
    )  # fmt: skip
    assert not complaints(compiled, wide=2, narrow=0, dense=False)


def test_many_rows_reach_the_hopper_instruction():
    big = launch.tiles("int8_product", GPUS[90])[-1]
    assert "wgmma.mma_async" in product(90, big).ptx
    assert "wgmma.mma_async" not in product(80, launch.tiles("int8_product", GPUS[80])[-1]).ptx


def as_constants(fn, signature, constexprs, ones):
    """Compile as a launch does when these arguments are 1: it makes constants of them."""
    rest = {name: kind for name, kind in signature.items() if name not in ones}
    return compile_for(fn, rest, {**constexprs, **dict.fromkeys(ones, 1)}, capability=90)


def test_arguments_of_one_become_constants():
    weight = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "M": "i32", "SPLITS": "i32", **WEIGHT}
    for beside, group in ((2, 128), (0, 0)):
        given = constants(4, AFFINE, beside, group)
        row = {name: weight[name] for name in packed.one_row.arg_names if name in weight}
        few = {name: weight[name] for name in packed.few_rows.arg_names if name in weight}
        dense = {name: weight[name] for name in packed.spread.arg_names if name in weight}
        ones = ("N", "K", "GROUPS")
        as_constants(packed.one_row, row, {**given, "WIDTH": 16, "DEPTH": 64, "WHOLE": False}, ones)
        given["HALF"] = tl.bfloat16
        as_constants(packed.spread, dense, given, ones)
        as_constants(
            packed.few_rows, few, {**given, "ROWS": 16, "WIDTH": 32, "WHOLE": False},
            (*ones, "M", "SPLITS"),
        )  # fmt: skip
    as_constants(
        int8.product, {"codes": "*i8", "weight": "*i8", "steps": "*fp32", "scales": "*bf16",
        "out": "*bf16", "PADDED": "i32:16"},
        {"ROWS": 16, "WIDTH": 64, "DEPTH": 128, "WHOLE": False, "FINAL": True}, ("M", "N", "SPLITS"),
    )  # fmt: skip
    as_constants(
        int8.round_rows, {"x": "*bf16", "codes": "*i8", "steps": "*fp32", "PADDED": "i32:16"},
        {"BLOCK": 16, "ONCE": True}, ("K",),
    )  # fmt: skip
    as_constants(
        packed.add_up, {"parts": "*fp32", "y": "*bf16"}, {"BLOCK": 1024}, ("size", "SPLITS")
    )
    as_constants(
        int8.add_up, {"parts": "*i32", "steps": "*fp32", "scales": "*bf16", "y": "*bf16"},
        {"BLOCK": 512}, ("M", "N", "SPLITS"),
    )  # fmt: skip


@triton.jit
def naive(x, words, y, K, WIDTH: tl.constexpr):
    """The obvious kernel: every code computes its own address, and loads its word again."""
    n = tl.program_id(0)
    acc = tl.zeros([WIDTH], tl.float32)
    for start in range(0, K, WIDTH):
        k = start + tl.arange(0, WIDTH)
        word = tl.load(words + (n * K + k) // 8)
        code = (word >> (k % 8 * 4)) & 15
        acc += tl.load(x + k).to(tl.float32) * (code - 8).to(tl.float32)
    tl.store(y + n, tl.sum(acc, 0))


def test_a_naive_kernel_is_rejected():
    compiled = compile_for(
        naive, {"x": "*bf16", "words": "*i32", "y": "*fp32", "K": "i32:16"}, {"WIDTH": 2048},
        capability=90,
    )  # fmt: skip
    found = complaints(compiled, wide=4, narrow=narrow_loads(COMMON[0]), dense=True)
    assert any("narrow" in one for one in found)
    assert "no tensor cores" in found


def test_a_kernel_that_spills_is_rejected():
    tile = launch.tiles("packed_few_rows", GPUS[90])[-1]
    compiled = few_rows(COMMON[0], 90, tile, maxnreg=64)
    assert any("spilled" in one for one in complaints(compiled, wide=0, narrow=99, dense=True))


def test_pointers_of_unknown_alignment_cost_the_wide_loads():
    """The checks see what the signature says: aligned pointers are what a launch finds out."""
    tile = launch.tiles("packed_one_row", GPUS[90])[0]
    compiled = compile_for(
        packed.one_row, {"x": "*bf16", "y": "*bf16", **WEIGHT, "words": "*i32:1"},
        {**constants(*COMMON[0]), "WIDTH": tile.columns, "DEPTH": tile.depth, "WHOLE": True},
        capability=90, num_warps=tile.warps,
    )  # fmt: skip
    assert complaints(compiled, wide=4, narrow=16, dense=False)


@pytest.mark.grid
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("weight", COMMON + OTHERS, ids=str)
def test_the_whole_grid(weight, capability):
    for x, tile in itertools.product(
        ("bf16", "fp16"), launch.tiles("packed_few_rows", GPUS[capability])
    ):
        allowed = 8 * narrow_loads(weight)  # the warps of a larger tile load scales side by side
        wide = 4 if weight[0] == 2 else 8  # twice the warps share the same words
        compiled = few_rows(weight, capability, tile, x)
        found = complaints(compiled, wide=wide, narrow=allowed, dense=True)
        assert not found, (x, tile)
    for x in ("bf16", "fp32"):
        found = complaints(one_row(weight, capability, x), wide=4, narrow=350, dense=False)
        assert not found, x
    assert not complaints(spread(weight, capability), wide=2, narrow=300, dense=False)


@pytest.mark.grid
@pytest.mark.parametrize("capability", GPUS)
def test_the_whole_grid_of_int8(capability):
    for tile in launch.tiles("int8_product", GPUS[capability]):
        assert not complaints(product(capability, tile), wide=16, narrow=20, dense=True), tile
