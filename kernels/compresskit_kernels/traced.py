"""Our products as torch operators, for code that is traced (torch.compile).

A tracer cannot look into a call through ctypes, and has no business in the choice of a Triton launch, so
the compiled graph calls an operator instead. It names the weight by a number; the weight lives as long
as the object that registered it. Outside of traced code the direct call is kept: an operator in Python
costs several microseconds. In a CUDA graph it costs nothing, since a replay runs no Python.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch


class Traceable(Protocol):
    """A product that can be called from traced code."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x `[..., K]`: a new tensor `[..., N]` in the type of x."""

    def look_up(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the dequantised weight: a new float32 tensor `[..., K]`."""


_numbers = itertools.count()
_products: weakref.WeakValueDictionary[int, Traceable] = weakref.WeakValueDictionary()

_library: Any = torch.library.Library("compresskit", "DEF")  # type: ignore[no-untyped-call]
_library.define("product(Tensor x, int number, int height) -> Tensor")
_library.define("rows(Tensor index, int number, int width) -> Tensor")


def register(product: Traceable) -> int:
    """Give `product` a number for traced code."""
    number = next(_numbers)
    _products[number] = product
    return number


def _product(x: torch.Tensor, number: int, height: int) -> torch.Tensor:
    return _products[number].multiply(x)


def _rows(index: torch.Tensor, number: int, width: int) -> torch.Tensor:
    return _products[number].look_up(index)


def _product_shape(x: torch.Tensor, number: int, height: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], height))


def _rows_shape(index: torch.Tensor, number: int, width: int) -> torch.Tensor:
    return index.new_empty((*index.shape, width), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    _library.impl("product", _product, _device)
    _library.impl("rows", _rows, _device)
_library._register_fake("product", _product_shape)
_library._register_fake("rows", _rows_shape)


def product(x: torch.Tensor, number: int, height: int) -> torch.Tensor:
    """Return x `[..., K]` times product `number`, `[..., height]`."""
    answer: torch.Tensor = torch.ops.compresskit.product(x, number, height)
    return answer


def rows(index: torch.Tensor, number: int, width: int) -> torch.Tensor:
    """Rows `index` of product `number`, `[..., width]`."""
    answer: torch.Tensor = torch.ops.compresskit.rows(index, number, width)
    return answer
