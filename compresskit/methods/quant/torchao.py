"""Any configuration of torchao, by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from pydantic import Field, JsonValue
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compresskit.errors import MissingExtra, SpecError, UnknownName
from compresskit.methods.quant._base import AbstractQuant
from compresskit.methods.quant._foreign import (
    Converted,
    Unfit,
    copied_bias,
    leaves,
    replace_linears,
)

if TYPE_CHECKING:
    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.system import System

OP = "quant/torchao"

SLOWER = {
    "Int8WeightOnlyConfig": 0.39,
    "Int8DynamicActivationInt8WeightConfig": 0.22,
    "IntxWeightOnlyConfig": 0.11,
    "Int8DynamicActivationIntxWeightConfig": 0.09,
    "Float8WeightOnlyConfig": 0.02,
}
"""Rate of one row through 2048x2048 over that of dense bfloat16, eager, one CPU thread; measured with
torchao 0.18 and torch 2.15. They turn codes back into floats in every call."""

REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What torchao raises where something cannot work here (`NotImplementedError` is a `RuntimeError`)."""


@final
class TorchAO(AbstractQuant):
    """Quantise the linear layers with a configuration of torchao.

    `config` is a class of `torchao.quantization`, or the whole path of one elsewhere in torchao
    ("torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig"). `options` are its fields:
    numbers and booleans as they are, types and granularities by name ("int4", "PerGroup(32)"), and
    members of an enumeration by value or name. Every layer is tried once at load, so a
    configuration that cannot work here is skipped with torchao's own reason.

    Eager, its stock configurations are slower than dense layers on a CPU (a warning in the record
    says how much); they are made for `torch.compile`. Bytes are those really held: codes of a few
    bits in whole bytes count as whole bytes.

    Paper: Or et al. 2025, TorchAO: PyTorch-Native Training-to-Serving Model Optimization, arXiv 2507.16099.
    Differs: not ours; one configuration for all layers (not `FqnToConfig`), no `embeddings`, and
    inductor's settings stay as they are unless `set_inductor_config` is given.
    Cost: that of the configuration; none that needs calibration data.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {}

    config: str = "Int8WeightOnlyConfig"
    """Class of the configuration: a name in torchao.quantization, or a whole path in torchao."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the configuration that differ from their defaults."""

    def apply(self, system: System, ctx: Context) -> System:
        """Replace the linear layers in place."""
        if find_spec("torchao") is None:
            raise MissingExtra("torchao", extra="torchao")
        cls = find_config(self.config)
        config = build(cls, self.options)
        warned: tuple[str, ...] = ()
        if system.device.kind == "cpu" and cls.__name__ in SLOWER:
            warned = (
                f"torchao's {cls.__name__} is slower than dense on a CPU outside torch.compile: "
                f"{SLOWER[cls.__name__]} times the rate of bfloat16 at 2048x2048, one row.",
            )

        def convert(site: Site) -> Converted:
            return _convert(site, config)

        return replace_linears(self, system, ctx, convert, op=OP, warned=warned)


def find_config(name: str) -> Any:
    """The configuration class `name`.

    Raises:
        UnknownName: there is none of that name.
        SpecError: a path outside torchao.
    """
    base = import_module("torchao.core.config").AOBaseConfig
    path, _, last = name.rpartition(".")
    if path and path.partition(".")[0] != "torchao":
        raise SpecError(f"quant/torchao: config {name!r} is no path in torchao.")
    try:
        module = import_module(path or "torchao.quantization")
    except ImportError as error:
        raise SpecError(f"quant/torchao: config {name!r} cannot be imported: {error}.") from None
    known = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and dataclasses.is_dataclass(value)
    }
    if last not in known:
        raise UnknownName("configuration of torchao", name, known)
    return known[last]


def build(cls: Any, options: Mapping[str, JsonValue]) -> Any:
    """A configuration of class `cls` with `options` turned into what its fields want.

    Raises:
        UnknownName: it has no such field.
        SpecError: torchao refuses a value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in options:
        if key not in fields:
            raise UnknownName(f"option of torchao's {cls.__name__}", key, fields)
    # On by default, it would change settings of the compiler for the whole process.
    quiet = {"set_inductor_config": False} if "set_inductor_config" in fields else {}
    try:
        given = {key: _value(fields[key], value) for key, value in options.items()}
        return cls(**{**quiet, **given})
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SpecError(f"quant/torchao: {cls.__name__}: {_line(error)}") from None


def _value(field: dataclasses.Field[Any], value: JsonValue) -> Any:
    """`value` as the field wants it: an enumeration, a granularity, a type, or as it is."""
    if not isinstance(value, str):
        return value
    if isinstance(field.default, Enum):
        kind = type(field.default)
        return kind[value] if value in kind.__members__ else kind(value)
    named = re.fullmatch(r"(Per\w+)(?:\((.*)\))?", value)
    if named is not None:
        granularity = getattr(import_module("torchao.quantization.granularity"), named[1])
        numbers = [int(part) for part in (named[2] or "").split(",") if part.strip()]
        return granularity(*numbers)
    dtype = getattr(torch, value.removeprefix("torch."), None)
    return dtype if "dtype" in field.name and isinstance(dtype, torch.dtype) else value


def _convert(site: Site, config: Any) -> Converted:
    weight = site.weight()
    rows, width = weight.shape
    layer = nn.Linear(width, rows, bias=False, device="meta").eval()
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.bias = copied_bias(site)  # type: ignore[assignment]
    # Some configurations change the layer's weight, others replace the layer: hold it by a parent.
    parent = nn.Sequential(layer)
    try:
        import_module("torchao.quantization").quantize_(parent, config, lambda one, _: one is layer)
        made = parent[0]
        for count in (1, 3):  # as while decoding, and as in a prompt
            x = torch.ones(count, width, dtype=weight.dtype, device=weight.device)
            with torch.inference_mode():
                made(x)
    except REFUSALS as error:
        raise Unfit(f"{type(config).__name__} cannot work here: {_line(error)}") from error
    inner = getattr(made, "weight", None)
    if made is layer and not is_traceable_wrapper_subclass(inner):
        raise Unfit(f"{type(config).__name__} leaves this layer as it is.")
    kind = type(made if inner is None else inner).__name__
    return Converted(made, _tensors, _rounded(made, weight), f"torchao: {kind}", bits=8)


def _tensors(layer: nn.Module) -> dict[str, list[torch.Tensor]]:
    held: dict[str, list[torch.Tensor]] = {}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        for inner, plain in leaves(name, tensor):
            held.setdefault(_role(inner), []).append(plain)
    return held


def _role(name: str) -> str:
    if "scale" in name:
        return "scales"
    if "zero" in name:
        return "zero_points"
    return "bias" if name.endswith("bias") else "packed"


def _rounded(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """What the weight became: asked of the tensor, or else of the layer, unit vector by unit vector.

    The latter comes in the type of the model, and as an A8 product sees it.
    """
    try:
        rounded: torch.Tensor = layer.weight.dequantize()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        rows, width = weight.shape
        rounded = torch.empty(rows, width, device=weight.device)
        bias = getattr(layer, "bias", None)
        with torch.inference_mode():
            for start in range(0, width, 256):
                stop = min(start + 256, width)
                units = torch.zeros(stop - start, width, dtype=weight.dtype, device=weight.device)
                units[:, start:stop].fill_diagonal_(1)
                y = layer(units)
                rounded[:, start:stop] = (y if bias is None else y - bias).T
    return rounded


def _line(error: Exception) -> str:
    """The first line of what a library has to say."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
