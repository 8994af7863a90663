"""The Triton products: numbers in the interpreter, everything around them as it is.

Triton interprets or compiles, as it was imported; so this file runs itself once more, in a process
that interprets, and defines other tests there. Tensor-core products in bfloat16 are left to
`tests/gpu`: the interpreter multiplies bfloat16 wrongly.
"""

import dataclasses
import importlib.util
import json
import math

import pytest
import torch
from compresskit_kernels import (
    dispatch,
    fp8_matmul,
    grouped_matmul,
    int8_dynamic_matmul,
    int8_matmul,
    launch,
    testing,
)
from compresskit_kernels.activations import round_rows
from compresskit_kernels.packed import tiles
from compresskit_kernels.packing import pack

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*E2M1, *(-level for level in E2M1))
BOOK = tuple(torch.linspace(-1, 1, 16).bfloat16().tolist())
KINDS = ("symmetric", "offsets", "zeros", "book", "e2m1")


def grouped(n, k, bits=4, group=64, kind="symmetric", gain=1.0):
    """A random weight, and what it stands for in float64 by the contract's own formula."""
    draw = torch.Generator().manual_seed(n * 1000 + k)
    groups = -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw)
    scales = torch.rand(n, groups, generator=draw).add(0.1).bfloat16()
    index = torch.arange(k) // group
    beside = {}
    level = codes.double() - 2 ** (bits - 1)
    if kind == "offsets":
        beside["offsets"] = torch.randn(n, groups, generator=draw).bfloat16()
    elif kind == "zeros":
        zeros = torch.randint(0, 2**bits, (n, groups), generator=draw, dtype=torch.uint8)
        beside["zeros"] = zeros
        level = codes.double() - zeros.double()[:, index]
    elif kind in ("book", "e2m1"):
        beside["table"] = BOOK if kind == "book" else E2M1
        level = torch.tensor(beside["table"], dtype=torch.float64)[codes]
    dense = gain * level * scales.double()[:, index]
    if kind == "offsets":
        dense += beside["offsets"].double()[:, index]
    weight = grouped_matmul.GroupedWeight(
        pack(codes, bits), scales, k, group, bits, gain=gain, **beside
    )
    return weight, dense


def int8_weight(n, k):
    draw = torch.Generator().manual_seed(n * 1000 + k)
    codes = torch.randint(-127, 128, (n, k), generator=draw, dtype=torch.int8)
    weight = int8_matmul.Int8Weight(codes, torch.rand(n, generator=draw).add(0.1).bfloat16())
    return weight, codes.double() * weight.scales.double()[:, None]


def fp8_weight(n, k):
    draw = torch.Generator().manual_seed(n * 1000 + k)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]  # every number but NaN, subnormals too
    codes = codes[torch.randint(0, len(codes), (n, k), generator=draw)].view(torch.float8_e4m3fn)
    weight = fp8_matmul.Fp8Weight(codes, torch.rand(n, generator=draw).add(0.1).bfloat16())
    return weight, codes.float().double() * weight.scales.double()[:, None]


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


if launch.INTERPRETED:
    # What a float32 sum costs where zero points cancel most of it; float16 results are rounded.
    LIMIT = {torch.float32: 3e-6, torch.float16: 6e-4}
    SHAPES = ((1, 70, 300), (3, 33, 17), (65, 41, 401), (1, 1, 5), (20, 65, 256))

    def prepare(op, weight):
        return dispatch.choose(op, torch.empty(1, weight.shape[1]), weight, "triton").prepare(
            weight
        )

    def check(op, weight, dense, x):
        product = prepare(op, weight)
        got = product(x)
        assert got.dtype == x.dtype
        assert got.shape == (*x.shape[:-1], dense.shape[0])
        assert relative(got, x.double() @ dense.T) < LIMIT[x.dtype]
        index = torch.tensor([[0, dense.shape[0] - 1]])
        assert relative(product.rows(index), dense[index]) < 1e-6

    @pytest.fixture(autouse=True)
    def clean_record():
        torch.manual_seed(0)
        dispatch.reset()
        yield
        dispatch.reset()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_grouped_kinds(kind, shape):
        m, n, k = shape
        weight, dense = grouped(n, k, kind=kind)
        for dtype in LIMIT:
            check(grouped_matmul.OP, weight, dense, torch.randn(m, k).to(dtype))

    @pytest.mark.parametrize("group", [32, 128, 256, 1 << 20])
    @pytest.mark.parametrize("kind", ["symmetric", "offsets", "zeros"])
    def test_groups_of_every_size(kind, group):
        weight, dense = grouped(66, 260, group=group, kind=kind)
        for x in (torch.randn(1, 260), torch.randn(4, 260).half(), torch.randn(70, 260)):
            check(grouped_matmul.OP, weight, dense, x)

    @pytest.mark.parametrize("bits", [2, 3, 5, 8])
    @pytest.mark.parametrize("kind", ["symmetric", "zeros"])
    def test_other_widths(kind, bits):
        weight, dense = grouped(66, 260, bits=bits, group=64, kind=kind)
        for x in (torch.randn(1, 260), torch.randn(4, 260).half(), torch.randn(70, 260)):
            check(grouped_matmul.OP, weight, dense, x)

    @pytest.mark.parametrize("kind", ["symmetric", "offsets", "e2m1"])
    def test_the_gain_leaves_offsets_alone(kind):
        weight, dense = grouped(33, 192, kind=kind, gain=0.25)
        for rows in (1, 4, 70):
            check(grouped_matmul.OP, weight, dense, torch.randn(rows, 192))

    @pytest.mark.parametrize("dtype", LIMIT, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_eight_bits_a_row(shape, dtype):
        m, n, k = shape
        x = torch.randn(m, k).to(dtype)
        check(int8_matmul.OP, *int8_weight(n, k), x)
        check(fp8_matmul.OP, *fp8_weight(n, k), x.mul(0.1))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_levels_are_exact_in_bfloat16_too(bits, monkeypatch):
        """The tensor-core path for bfloat16 makes its levels by other constants."""
        from compresskit_kernels.packed import product, triton as kernels

        monkeypatch.setattr(product, "_half", lambda _: kernels.BFLOAT16)
        for kind in ("symmetric", "zeros", *(("book", "e2m1") if bits == 4 else ())):
            weight, dense = grouped(65, 260, bits=bits, kind=kind)
            for rows in (3, 70):
                check(grouped_matmul.OP, weight, dense, torch.randn(rows, 260))
        check(fp8_matmul.OP, *fp8_weight(65, 140), torch.randn(2, 140))

    @pytest.mark.parametrize("multiprocessors", [1, 4, 500])
    def test_split_inputs_add_up(multiprocessors, monkeypatch):
        monkeypatch.setattr(launch, "multiprocessors", lambda _: multiprocessors)
        weight, dense = grouped(70, 1100, group=128, kind="offsets")
        check(grouped_matmul.OP, weight, dense, torch.randn(3, 1100))
        check_int8(*int8_weight(70, 1100), torch.randn(3, 1100))

    def test_strided_and_batched_inputs():
        weight, dense = grouped(48, 128)
        for rows in (1, 5, 70):
            check(grouped_matmul.OP, weight, dense, torch.randn(3, rows, 256)[..., ::2])
            check(grouped_matmul.OP, weight, dense, torch.randn(3, 128, rows).transpose(1, 2))
        check(grouped_matmul.OP, weight, dense, torch.randn(128))
        assert prepare(grouped_matmul.OP, weight)(torch.empty(2, 0, 128)).shape == (2, 0, 48)

    def check_int8(weight, dense, x):
        product = prepare(int8_dynamic_matmul.OP, weight)
        rounded = round_rows(x)
        codes, steps = product.round(x)
        width = x.shape[1]
        assert torch.equal(codes[:, :width], rounded.codes)
        assert not codes[:, width:].any()
        assert torch.equal(steps, rounded.steps[:, 0])
        want = rounded.codes.double() * rounded.steps.double() @ dense.T
        assert relative(product(x), want) < LIMIT.get(x.dtype, 5e-3)
        index = torch.tensor([0, dense.shape[0] - 1])
        assert relative(product.rows(index), dense[index]) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(1, 70, 300), (17, 33, 17), (70, 66, 130)], ids=str)
    def test_int8_activations(shape, dtype):
        m, n, k = shape
        x = torch.randn(m, k).to(dtype)
        if m > 1:
            x[0] = 0  # a token of zeros has step 0
        check_int8(*int8_weight(n, k), x)

    def test_int8_ties_go_to_even_and_long_rows_are_read_twice(monkeypatch):
        from compresskit_kernels.int8_dynamic_matmul import triton as kernels

        x = torch.arange(-254, 255).float().div(2)[None]  # step 1: halves are ties
        check_int8(*int8_weight(8, 509), x)
        monkeypatch.setattr(kernels, "LONGEST_BLOCK", 64)
        check_int8(*int8_weight(8, 509), x)

    def test_int8_sums_are_exact():
        """Largest codes everywhere: any rounding of the sum would show in its last digit."""
        weight = int8_matmul.Int8Weight(torch.full((3, 999), 127, dtype=torch.int8), torch.ones(3))
        got = prepare(int8_dynamic_matmul.OP, weight)(torch.full((2, 999), 127.0))
        assert torch.equal(got, torch.full((2, 3), 127.0 * 127 * 999))

    def test_a_row_does_not_depend_on_the_others():
        for op, weight in (
            (grouped_matmul.OP, grouped(66, 192)[0]),
            (int8_dynamic_matmul.OP, int8_weight(66, 192)[0]),
        ):
            product = prepare(op, weight)
            x = torch.randn(5, 192).half()
            louder = x.clone()
            louder[3] *= 8
            assert torch.equal(product(louder)[0], product(x)[0])

    def test_the_record_names_what_ran():
        weight, _ = grouped(33, 128)
        for rows in (1, 2, 65):
            grouped_matmul.grouped_matmul(torch.randn(rows, 128), weight, impl="triton")
        assert dispatch.used() == {
            "grouped_matmul": (
                "triton: packed codes x few rows, tensor cores",
                "triton: packed codes x one row",
                "triton: spread packed codes + matmul",
            )
        }

    def test_the_interpreter_is_never_chosen_by_itself():
        weight, _ = grouped(33, 40, group=16)
        x = torch.randn(1, 40)
        assert dispatch.choose(grouped_matmul.OP, x, weight).name != "triton"
        grouped_matmul.grouped_matmul(x, weight)
        assert not any("triton" in name for name in dispatch.used()["grouped_matmul"])

    @pytest.mark.parametrize("rows", [1, 5, 70])
    def test_compiled_code_calls_the_very_products(rows):
        """One graph without a break, which calls operators: neither the launch nor its table is traced."""
        weight, _ = grouped(40, 128)
        codes = torch.randint(-127, 128, (40, 128), dtype=torch.int8)
        eight = int8_matmul.Int8Weight(codes, torch.rand(40).add(0.1).bfloat16())
        products = [
            prepare(grouped_matmul.OP, weight),
            prepare(int8_matmul.OP, eight),
            prepare(int8_dynamic_matmul.OP, eight),
        ]
        x, index = torch.randn(rows, 128), torch.tensor([3, 0])

        def step(x):
            return [product(x) for product in products], [one.rows(index) for one in products]

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
        dispatch.reset()
        with torch.inference_mode():
            (got, looked_up), noted = compiled(x), dispatch.used()
            dispatch.reset()
            (want, found) = step(x)
        assert noted == dispatch.used()
        for one, other in zip((*got, *looked_up), (*want, *found), strict=True):
            assert torch.equal(one, other)
        # Nothing of the first input was made a constant of the graph.
        assert not torch.equal(compiled(x + 1)[0][0], got[0])

    @pytest.mark.parametrize("kind", ["symmetric", "zeros"])
    def test_a_wrong_weight_is_noticed(kind):
        """Negative controls: shuffled scales, a zero point off by one, neighbouring codes swapped."""
        weight, dense = grouped(64, 256, kind=kind)
        wrong = [
            dataclasses.replace(weight, scales=weight.scales.roll(1, 1)),
            dataclasses.replace(weight, packed=weight.packed << 4 | weight.packed >> 4),
        ]
        if weight.zeros is not None:
            off = weight.zeros.clone()
            off[:, 1] ^= 1
            wrong.append(dataclasses.replace(weight, zeros=off))
        for rows in (1, 3, 70):
            x = torch.randn(rows, 256)
            for bad in wrong:
                got = prepare(grouped_matmul.OP, bad)(x)
                assert relative(got, x.double() @ dense.T) > 1e3 * LIMIT[x.dtype]

else:

    @needs_triton
    def test_in_the_interpreter():
        # Triton 3.6's interpreter does what numpy warns of.
        quiet = "ignore:Conversion of an array with ndim:DeprecationWarning"
        run = testing.interpreted(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", quiet, __file__
        )
        assert run.returncode == 0, run.stdout[-6000:]
        assert " passed" in run.stdout

    def test_triton_is_not_for_a_cpu():
        weight, _ = grouped(8, 64)
        x = torch.ones(1, 64)
        assert dispatch.choose(grouped_matmul.OP, x, weight).name != "triton"
        for op, stored in (
            (grouped_matmul.OP, weight),
            (int8_matmul.OP, int8_weight(8, 64)[0]),
            (fp8_matmul.OP, fp8_weight(8, 64)[0]),
            (int8_dynamic_matmul.OP, int8_weight(8, 64)[0]),
        ):
            with pytest.raises(ValueError, match=r"'triton' cannot take .* CUDA device .* 'auto'"):
                dispatch.choose(op, x, stored, "triton")

    def test_without_triton_there_is_nothing_to_choose(monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        launch.installed.cache_clear()
        try:
            assert not launch.installed()
            weight, _ = grouped(8, 64)
            assert dispatch.choose(grouped_matmul.OP, torch.ones(1, 64), weight).name != "triton"
        finally:
            launch.installed.cache_clear()

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("shape", [(1, 1), (70, 577), (64, 256), (130, 41)], ids=str)
    def test_words_follow_the_formula(shape, bits):
        n, k = shape
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        words = tiles.lay_out(codes, bits)
        step = 32 * 16 // bits
        assert words.shape == (-(-n // 64), 16 * -(-k // step), 64)
        for column in {0, k // 3, k - 1}:
            s, rest = divmod(column, step)
            i, rest = divmod(rest, 32)
            r, h = divmod(rest, 2)
            for row in {0, n - 1}:
                word = int(words[row // 64, 16 * s + r, row % 64])
                assert word >> (bits * i + 16 * h) & 2**bits - 1 == codes[row, column]
        order = torch.randperm(n)
        assert torch.equal(tiles.take(words, bits, k, order), codes[order])

    def test_groups_that_a_shift_can_hold():
        assert all(tiles.fits_group(group, 4096, 4) for group in (32, 64, 128, 256, 4096))
        assert not any(tiles.fits_group(group, 4096, 4) for group in (16, 48, 96, 192))
        assert tiles.fits_group(96, 64, 4)  # one group a row, of any size

    @needs_triton
    def test_held_bytes_count_padding():
        from compresskit_kernels.grouped_matmul import triton as ours

        weight, _ = grouped(65, 300, group=64, kind="zeros")
        assert ours.prepare(weight).held_bytes() == {
            "packed": 128 * 384 // 2,  # rows to 64, inputs to 128
            "scales": 128 * 5 * 2,
            "zero_points": 128 * 5,
        }

    @pytest.mark.parametrize(
        "path", sorted((launch.resources.files("compresskit_kernels") / "tuned").iterdir()), ids=str
    )
    def test_tables_of_tile_sizes_are_sound(path):
        table = json.loads(path.read_text("utf-8"))
        default = launch.tiles("packed_few_rows", "a GPU of no table")
        assert launch.tiles("packed_few_rows", path.name.removesuffix(".json"))
        assert default[-1].most_rows >= 64
        for kind, entries in table.items():
            limits = [entry["most_rows"] for entry in entries]
            assert limits == sorted(limits)
            for entry in entries:
                tile = launch.Tile(**entry)
                sizes = (tile.rows, tile.columns, tile.depth, tile.warps)
                assert all(math.log2(size).is_integer() for size in sizes)
                assert kind == "int8_product" or tile.columns <= tiles.COLUMNS

    def test_splits_fill_the_gpu_and_leave_no_part_empty():
        cpu = torch.device("cpu")
        assert launch.splits(1000, 32, 2, cpu) == 1
        assert launch.splits(1, 32, 3, cpu) == 6  # the interpreter's two multiprocessors, thrice
        assert launch.splits(1, 2, 3, cpu) == 2
