"""Layers that hold a prepared weight in place of a dense one; inference only.

Their tensors are in plain attributes, not in buffers: quicker to reach, never cast by
`model.to(dtype)`, and not in the state dict (a packed layout follows the machine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import torch
    from compresskit_kernels.dispatch import Prepared


class PackedLinear(nn.Module):
    """A linear layer on a prepared weight.

    `input_scale` `[K]` multiplies the activations first: what a method has moved from them into
    the weight (AWQ, SmoothQuant) and could not fold into the layer before.
    """

    def __init__(
        self,
        weight: Prepared,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        input_scale: torch.Tensor | None = None,
    ) -> None:
        """Take a prepared weight of `shape` (N, K)."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.product = weight
        self.bias = bias
        self.input_scale = input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x `[..., K]` times the transposed weight plus the bias."""
        if self.input_scale is not None:
            x = x * self.input_scale
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the codes, the scales, the zero points, the bias and the input scale."""
        held = dict(self.product.held_bytes())
        if self.bias is not None:
            held["bias"] = self.bias.nbytes
        if self.input_scale is not None:
            held["scales"] = held.get("scales", 0) + self.input_scale.nbytes
        return held

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        extra = [t for t in (self.bias, self.input_scale) if t is not None]
        return [*self.product.tensors().values(), *extra]

    def extra_repr(self) -> str:
        """Shape and implementation, for printing a model."""
        kind = type(self.product).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, product={kind}"


class PackedEmbedding(nn.Module):
    """An embedding on a prepared weight: rows are dequantised as they are looked up."""

    def __init__(
        self, weight: Prepared, shape: tuple[int, int], dtype: torch.dtype, *, shared: bool,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Take a prepared weight of `shape` (V, E); `shared`: the output head holds and counts it.

        `factor` multiplies the rows, as some architectures do (Gemma: the root of E).
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.product = weight
        self.dtype = dtype
        self.shared = shared
        self.factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[..., E]` of the token ids `[...]`."""
        rows = self.product.rows(ids).to(self.dtype)
        return rows if self.factor == 1.0 else rows * self.factor

    def held_bytes(self) -> dict[str, int]:
        """Bytes by role; none where the head counts them."""
        return {} if self.shared else self.product.held_bytes()

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors behind `held_bytes`."""
        return [] if self.shared else list(self.product.tensors().values())
