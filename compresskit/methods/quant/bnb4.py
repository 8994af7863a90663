"""4-bit layers of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from pydantic import JsonValue

from compresskit.methods.quant._base import AbstractQuant
from compresskit.methods.quant._foreign import (
    Converted,
    Unfit,
    bitsandbytes,
    copied_bias,
    replace_linears,
)

if TYPE_CHECKING:
    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.system import System

OP = "quant/bnb4"
ROWS = 32
"""Rows of a block in the layout of its CPU product."""


@final
class BitsAndBytes4(AbstractQuant):
    """Put bitsandbytes' own 4-bit layers in place of the linear ones (W4A16, nf4 or fp4).

    The peer of `quant/nf4` and `quant/fp4`, run by the library itself: a GPU kernel on CUDA, and on
    CPUs with AVX-512 BF16 a packed product that lays the weights out at the first call, which is
    made here, at load. That layout knows no double quantisation: the scales are unfolded to
    bfloat16, and `double_quant` then saves nothing; the bytes in the record are those after it.
    Layers that it cannot take (rows not a multiple of 32, inputs not one of the block size) stay
    dense, with a warning.

    Paper: Dettmers et al. 2023, QLoRA, arXiv 2305.14314.
    Differs: not ours; no `embeddings`.
    Cost: one float pass over the weights at load, no calibration.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type."""
    blocksize: Literal[32, 64, 128, 256, 512] = 64
    """Weights that share a scale."""
    double_quant: bool = False
    """Quantise the scales to 8 bits too (`compress_statistics`)."""

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        library = bitsandbytes()

        def convert(site: Site) -> Converted:
            return _convert(library, site, self)

        return replace_linears(self, system, ctx, convert, op=OP)


def _convert(library: Any, site: Site, options: BitsAndBytes4) -> Converted:
    weight = site.weight().contiguous()
    rows, width = weight.shape
    nn, functional = library.nn, library.functional
    # On no device: the constructor would draw random numbers for a weight that is replaced at once.
    layer = nn.Linear4bit(
        width, rows, bias=False, compute_dtype=weight.dtype, quant_type=options.type, device="meta"
    ).eval()
    on_cpu = weight.device.type == "cpu" and layer.support_avx512bf16_for_cpu
    if on_cpu and (rows % ROWS or width % options.blocksize):
        raise Unfit(
            f"bitsandbytes' CPU product wants rows in multiples of {ROWS} and inputs in multiples "
            f"of the block size {options.blocksize}; this layer has {rows} and {width}."
        )
    layer.weight = nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=options.blocksize,
        compress_statistics=options.double_quant,
        quant_type=options.type,
        module=layer,
    ).to(weight.device)
    layer.bias = copied_bias(site)
    rounded = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():  # lays the weight out for good
        layer(torch.ones(1, width, dtype=weight.dtype, device=weight.device))
    return Converted(layer, _tensors, rounded, _routine(library, layer, options.type), bits=4)


def _tensors(layer: Any) -> dict[str, list[torch.Tensor]]:
    state = layer.weight.quant_state
    nested = [] if not state.nested else [state.state2.absmax, state.state2.code]
    found = {
        "packed": [layer.weight.data],
        "scales": [state.absmax, *nested],
        "table": [state.code],
        "zero_points": [state.offset],
        "bias": [layer.bias],
    }
    held = {role: [t for t in tensors if t is not None] for role, tensors in found.items()}
    return {role: tensors for role, tensors in held.items() if tensors}


def _routine(library: Any, layer: Any, kind: str) -> str:
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        return f"bitsandbytes: gemm_4bit {kind}"
    hub = getattr(library.backends.cpu.ops, "gemm_4bit_forward_kernel", None)
    if hub is not None:
        return f"bitsandbytes: gemm_4bit_forward {kind} of kernels-community"
    return f"bitsandbytes: gemv_4bit_inference_cpu_{kind}_bf16"
