"""LLM.int8() layers of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.methods.quant._base import AbstractQuant
from compresskit.methods.quant._foreign import (
    Converted,
    bitsandbytes,
    copied_bias,
    replace_linears,
)
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.system import System

OP = "quant/llm_int8"
SLOW = (
    "LLM.int8() has no kernel of its own on a CPU: activations are rounded and outliers picked by "
    "plain torch in every call, so decoding is usually slower than with dense layers."
)


@final
class LLMInt8(AbstractQuant):
    """Put bitsandbytes' LLM.int8() layers in place of the linear ones (W8A8 with outliers in 16 bits).

    Weights are int8 per output row, activations are rounded to int8 per token, and input columns in
    which any token of the batch reaches `threshold` are multiplied in 16 bits instead. So with a
    threshold a row's result depends on the rows beside it. Inputs go through float16 whatever the
    model computes in.

    Paper: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339.
    Differs: not ours; no `embeddings`. `quant/int8_dynamic` is our W8A8, without outliers.
    Cost: one float pass over the weights at load, no calibration. On a CPU usually slower than
    dense layers (1.4 times on SmolLM2-135M with AVX-512, many times without), which a warning says.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    threshold: Annotated[float, Field(ge=0)] = 6.0
    """Magnitude from which an input column counts as an outlier; 0 rounds everything."""

    def effects(self) -> Effects:
        """Like every quantiser; outliers are found for a whole batch at once."""
        plain = super().effects()
        alone = {Trait.PADDED_BATCH} if self.threshold else set()
        return plain.model_copy(update={"removes": plain.removes | alone})

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        library = bitsandbytes()
        warned = (SLOW,) if system.device.kind == "cpu" else ()

        def convert(site: Site) -> Converted:
            return _convert(library, site, self.threshold)

        return replace_linears(self, system, ctx, convert, op=OP, warned=warned)


def _convert(library: Any, site: Site, threshold: float) -> Converted:
    weight = site.weight()
    rows, width = weight.shape
    layer = library.nn.Linear8bitLt(
        width, rows, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
    ).eval()
    # It quantises a weight that leaves the CPU, and only that.
    source = weight.cpu().contiguous()
    layer.weight = library.nn.Int8Params(source, requires_grad=False, has_fp16_weights=False).to(
        weight.device
    )
    layer.bias = copied_bias(site)
    with torch.no_grad():  # moves codes and scales to where they stay
        layer(torch.ones(1, width, dtype=weight.dtype, device=weight.device))
    layer.register_forward_hook(_forget_outliers)
    rounded = layer.state.CB.float() * (layer.state.SCB.float() / 127).unsqueeze(1)
    device = weight.device.type
    routine = f"bitsandbytes: int8_linear_matmul ({device}), outliers from {threshold:g}"
    return Converted(layer, _tensors, rounded, routine, bits=8)


def _forget_outliers(layer: Any, *_: object) -> None:
    """Drop the columns of the last call, which only training would need."""
    layer.state.idx = None


def _tensors(layer: Any) -> dict[str, list[torch.Tensor]]:
    held = {"codes": [layer.state.CB], "scales": [layer.state.SCB]}
    return held if layer.bias is None else {**held, "bias": [layer.bias]}
