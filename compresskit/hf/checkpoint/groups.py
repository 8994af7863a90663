"""From the config groups of a compressed-tensors checkpoint to the form of each layer.

Group targets are names, patterns (`re:...`) or the class `Linear`, in this order of precedence. What
no product of ours can take ends in `Unread` with the reason.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from compresskit_kernels import (
    fp8_dynamic_matmul,
    fp8_matmul,
    grouped_dynamic_matmul,
    grouped_matmul,
    int8_dynamic_matmul,
    int8_matmul,
)

from compresskit.hf.checkpoint.form import Form, Format, Rounding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compresskit_kernels.dispatch import Op


class Unread(Exception):
    """Why a checkpoint cannot be kept packed; the caller has another way."""


def layer_forms(quantization: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Form]:
    """The form of each of `layers`, by the config groups of `quantization`.

    Raises:
        Unread: a group is of a kind that we do not know, or none targets a layer.
    """
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if quantization.get(key):
            raise Unread(f"it has a {key}")
    groups = list((quantization.get("config_groups") or {}).values())
    if not all(isinstance(group, dict) for group in groups):
        raise Unread("a config group is the name of a preset")
    found = {}
    for layer in layers:
        group = next(
            (g for exact in (True, False) for g in groups if _targets(g, layer, exact)), None
        )
        if group is None:
            raise Unread(f"no config group targets {layer}")
        found[layer] = _form(group, str(group.get("format") or quantization.get("format")))
    return found


def _targets(group: Mapping[str, Any], layer: str, exact: bool) -> bool:
    """Whether a group names the layer, by name or pattern (`exact`), or by its class."""
    for target in group.get("targets") or ():
        if not exact:
            if target == "Linear":
                return True
        elif target == layer or (target.startswith("re:") and re.match(target[3:], layer)):
            return True
    return False


_FORMATS: Mapping[str, Format] = {
    "pack-quantized": "pack-quantized",
    "int-quantized": "int-quantized",
    "float-quantized": "float-quantized",
}


def _form(group: Mapping[str, Any], format_name: str) -> Form:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or group.get("output_activations"):
        raise Unread("a config group rounds something other than weights and inputs")
    kind = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    named = kind if format_name == "naive-quantized" else format_name
    if named not in _FORMATS:
        raise Unread(f"its format is {format_name}")
    form = Form(_FORMATS[named], _rounding(weights), inputs and _rounding(inputs))
    operation(form)
    return form


def _rounding(document: Mapping[str, Any]) -> Rounding:
    strategy, kind = document.get("strategy"), document.get("type", "int")
    if strategy == "tensor" and not document.get("dynamic"):
        strategy = "channel"  # one scale for all rows is one a row, repeated
    known: tuple[Literal["group", "channel", "token"], ...] = ("group", "channel", "token")
    if strategy not in known or kind not in ("int", "float"):
        raise Unread(f"it rounds {kind} numbers by {strategy}")
    if document.get("actorder") in ("group", "dynamic") or document.get("block_structure"):
        raise Unread("its columns are reordered or in blocks")
    return Rounding(
        bits=int(document.get("num_bits", 8)),
        kind=kind,
        strategy=strategy,
        group=document.get("group_size") if strategy == "group" else None,
        symmetric=bool(document.get("symmetric", True)),
        dynamic=bool(document.get("dynamic", False)),
    )


def operation(form: Form) -> Op[Any]:
    """What multiplies by a weight of this form."""
    weights, inputs = form.weights, form.activations
    by_row = weights.strategy == "channel" and weights.symmetric and weights.bits == 8
    per_token = inputs is not None and inputs.dynamic and inputs.symmetric and inputs.bits == 8
    if inputs is not None and not (per_token and inputs.kind == weights.kind):
        raise Unread("its activations are not rounded to 8 bits per token or group as they come")
    if form.format == "float-quantized" and by_row:
        if inputs is None:
            return fp8_matmul.OP
        if inputs.strategy == "token":
            return fp8_dynamic_matmul.OP
    elif form.format == "int-quantized" and by_row:
        if inputs is None:
            return int8_matmul.OP
        if inputs.strategy == "token":
            return int8_dynamic_matmul.OP
    elif form.format == "pack-quantized" and weights.kind == "int" and 2 <= weights.bits <= 8:
        if inputs is None:
            return int8_matmul.OP if by_row else grouped_matmul.OP
        together = inputs.group == weights.group and weights.strategy == (
            "channel" if inputs.strategy == "token" else "group"
        )
        if together:
            return grouped_dynamic_matmul.OP
    raise Unread(f"nothing here multiplies by {form.name()} as {form.format}")
