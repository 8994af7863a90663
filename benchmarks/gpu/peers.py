"""The same products by other libraries; one that is not installed or cannot run says so.

Written against gemlite 0.6, torchao 0.18, bitsandbytes 0.50 and torch 2.11 to 2.13. What a peer
quantises by itself (bitsandbytes, torchao) has weights of its own and is not checked.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.arms import Absent, Arm

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[int], Any]

LIMIT = 1e-2


def need(x: torch.Tensor, package: str = "torch") -> None:
    """Raise `Absent` unless x is on a CUDA device and the package is there."""
    if not x.is_cuda:
        raise Absent("needs a CUDA device")
    if find_spec(package) is None:
        raise Absent(f"{package} is not installed")


def _arm(
    name: str,
    moved: int,
    x: torch.Tensor,
    make: Make,
    prepare: Callable[[Any], Callable[[], Any]],
    *,
    package: str = "torch",
    limit: float | None = LIMIT,
    note: str = "",
) -> Arm:
    """An arm that prepares each copy's weight by `prepare`."""

    def build(copies: int) -> list[Callable[[], Any]]:
        need(x, package)
        return [prepare(make(i)) for i in range(copies)]

    return Arm(name, build, moved, limit, note)


def tinygemm(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """torch's own W4A16 kernel; its bytes hold the even input's code in the high nibble."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        codes = weight.codes()
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        grid = torch.stack((weight.scales, weight.offsets), dim=-1).transpose(0, 1)
        grid = grid.to(torch.bfloat16).contiguous()
        return partial(torch.ops.aten._weight_int4pack_mm, x, packed, weight.group, grid)

    return _arm("torch tinygemm", moved, x, make, prepare)


def gemlite(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """gemlite's W4A16; it tunes itself on first use, which is not timed."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

        rows, width = weight.shape
        kind = TORCH_TO_DTYPE[x.dtype]
        layer = GemLiteLinearTriton(
            4, group_size=weight.group, in_features=width, out_features=rows, input_dtype=kind,
            output_dtype=kind,
        )  # fmt: skip
        zeros = 8 - weight.offsets.float() / weight.scales.float()
        scales = weight.scales.to(x.dtype).reshape(-1, 1)
        layer.pack(weight.codes(), scales, zeros.to(x.dtype).reshape(-1, 1), None)
        return partial(layer.forward, x)

    return _arm("gemlite A16W4", moved, x, make, prepare, package="gemlite", limit=3e-2,
                note="zero points rounded to bfloat16")  # fmt: skip


def bitsandbytes_nf4(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """bitsandbytes' nf4 in blocks of 64."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.dequantise().to(x.dtype), blocksize=64, quant_type="nf4"
        )
        return partial(bitsandbytes.matmul_4bit, x, packed.t(), quant_state=state)

    return _arm("bitsandbytes nf4", moved, x, make, prepare, package="bitsandbytes", limit=None,
                note="its own weights")  # fmt: skip


def torchao(x: torch.Tensor, make: Make, moved: int, config: str, **options: Any) -> Arm:
    """A layer quantised by torchao, eager."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        from torchao import quantization

        dense = weight.dequantise().to(x.dtype)
        layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(dense, requires_grad=False)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        return partial(layer, x)

    return _arm(f"torchao {config.removesuffix('Config')}", moved, x, make, prepare,
                package="torchao", limit=None, note="its own weights, eager")  # fmt: skip


def int8pack(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """torch's W8A16 kernel."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        return partial(
            torch.ops.aten._weight_int8pack_mm, x, weight.codes, weight.scales.to(x.dtype)
        )

    return _arm("torch int8pack", moved, x, make, prepare)


def int_mm(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """cuBLAS' int8 product by itself: nothing is rounded before it or scaled after it."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        if x.shape[0] <= 16:
            raise Absent("torch._int_mm needs more than 16 rows on CUDA")
        codes = (x.float() * 40).clamp(-127, 127).to(torch.int8)
        return partial(torch._int_mm, codes, weight.codes.t())

    return _arm("torch._int_mm", moved, x, make, prepare, limit=None, note="product alone")


def scaled_mm(x: torch.Tensor, make: Make, moved: int) -> Arm:
    """torch's row-wise fp8 product by itself: activations are rounded beforehand."""

    def prepare(weight: Any) -> Callable[[], torch.Tensor]:
        if torch.cuda.get_device_capability(x.device) < (8, 9):
            raise Absent("fp8 needs compute capability 8.9")
        codes = weight.dequantise().clamp(-448, 448).to(torch.float8_e4m3fn)
        ones = torch.ones(codes.shape[0], 1, device=x.device)
        steps = torch.ones(x.shape[0], 1, device=x.device)
        return partial(
            torch._scaled_mm, x.to(torch.float8_e4m3fn), codes.t(), steps, ones.t(),
            out_dtype=x.dtype,
        )  # fmt: skip

    return _arm("torch._scaled_mm fp8", moved, x, make, prepare, limit=None, note="product alone")
