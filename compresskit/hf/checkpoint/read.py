"""Load a compressed-tensors checkpoint into our packed layers: what is stored is what runs.

transformers would unpack it into dense weights at the first forward pass; here the codes stay
packed and go through the products of `compresskit_kernels`, as if the method had just been applied.

    config.json  --`groups`------->  a form for every layer that holds scales, or a reason why not
    safetensors  --------------->  dense tensors, and a stand-in without storage for packed weights
    transformers builds the model, the stand-ins are replaced by packed layers

Where the checkpoint holds something that no product of ours takes (static activations, fp4 codes,
fused experts) the caller falls back on transformers.
"""

from __future__ import annotations

import re
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels import fp8_dynamic_matmul, int8_matmul
from compresskit_kernels.dispatch import choose
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.int8_matmul import Int8Weight

from compresskit.errors import ModelError
from compresskit.hf import modules
from compresskit.hf.checkpoint.form import weight_of
from compresskit.hf.checkpoint.groups import Unread, layer_forms, operation
from compresskit.hf.packed import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic import JsonValue

    from compresskit.hf.checkpoint.form import Form, Stored

SCALE = ".weight_scale"
ROLES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")
"""Tensors of a packed layer that `weight_of` knows; any other role sends the checkpoint elsewhere."""


class Packed(NamedTuple):
    """A model on packed layers."""

    model: Any
    kernels: dict[str, str]
    """Operation -> implementation that was chosen for it."""
    forms: dict[str, Form]

    def facts(self) -> dict[str, JsonValue]:
        """What a record says about it."""
        counts: dict[str, int] = {}
        for form in self.forms.values():
            counts[form.name()] = counts.get(form.name(), 0) + 1
        layers = ", ".join(f"{count} layers {name}" for name, count in counts.items())
        return {
            "checkpoint": f"compressed-tensors: {layers}",
            "effective_bits_per_parameter": 8
            * modules.weight_bytes(self.model)
            / modules.parameter_count(self.model),
            "left_dense": dict(modules.left_dense(self.model)),
        }

    def simulated(self) -> tuple[str, ...]:
        """A name if 8-bit floats are multiplied on wider units here, which has no speed to show."""
        ran = self.kernels.get(fp8_dynamic_matmul.OP.name, fp8_dynamic_matmul.REAL)
        return () if ran == fp8_dynamic_matmul.REAL else ("fp8 checkpoint",)


def load(path: Path, quantization: Mapping[str, Any], dtype: torch.dtype, device: str) -> Packed:
    """Load the checkpoint in the folder `path`, whose config has the entry `quantization`.

    Scales that bfloat16 cannot hold are rounded to it by some products.

    Raises:
        Unread: it holds something that no product of ours takes.
        ModelError: a file is damaged.
    """
    tensors = _tensors(path)
    packed = sorted(name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE))
    forms = layer_forms(quantization, packed)
    held = {
        name: {role: tensors.pop(f"{name}.{role}") for role in ROLES if f"{name}.{role}" in tensors}
        for name in packed
    }
    beside = [name for name in tensors if re.search(r"\.(weight|input|output)_[a-z_]+$", name)]
    if beside:
        raise Unread(f"it also holds {beside[0]}")
    stored: dict[str, Stored] = {}
    for name, form in forms.items():
        try:
            stored[name] = _plain(form, weight_of(form, held.pop(name)))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: the tensors of {name} do not fit ({error}).") from None
        rows, width = stored[name].shape
        tensors[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(rows, width)
    model = _build(path, tensors, dtype)
    kernels = _replace(model, forms, stored, dtype, device)
    return Packed(model if device == "cpu" else model.to(device), kernels, forms)


def unpack(model: Any) -> None:
    """Unpack a model that transformers loaded in the compressed layout.

    It would do so in the first forward pass; done now, the bytes are those that will be held.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if hasattr(model, "ct_decompress_hook") and quantizer is not None:
        with redirect_stderr(StringIO()):  # its progress bars
            quantizer.compressor.decompress_model(model)
        for module in model.modules():
            for role in ("weight_scale", "weight_zero_point", "weight_shape"):
                module._parameters.pop(role, None)  # what the weight was made of


def _plain(form: Form, weight: Stored) -> Stored:
    """Eight packed bits with one scale a row are plain int8."""
    if operation(form) is int8_matmul.OP and isinstance(weight, GroupedWeight):
        codes = (weight.codes().to(torch.int16) - 128).to(torch.int8)
        return Int8Weight(codes, weight.scales.reshape(-1))
    return weight


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights cannot be read ({error}).") from None


def _build(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Let transformers build the model of the folder `path` around `tensors`."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unread("its architecture is not one of transformers' own")
    del config.quantization_config
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, attn_implementation="sdpa"
    )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _replace(
    model: Any,
    forms: Mapping[str, Form],
    stored: dict[str, Stored],
    dtype: torch.dtype,
    device: str,
) -> dict[str, str]:
    """Put packed layers in place of the stand-ins; return operation -> implementations."""
    sites = {site.name: site for site in modules.linears(model)}
    strange = sorted(stored.keys() - sites.keys())
    if strange:
        raise Unread(f"{strange[0]} is no linear layer of the model")
    chosen: dict[str, set[str]] = {}
    for name in list(stored):
        weight, site = _to(stored.pop(name), device), sites[name]
        op = operation(forms[name])
        rows, width = weight.shape
        way = choose(op, torch.empty(1, width, dtype=dtype, device=device), weight)
        chosen.setdefault(op.name, set()).add(way.detail)
        bias = site.bias()
        layer = PackedLinear(
            way.prepare(weight), None if bias is None else bias.to(device), (rows, width)
        )
        site.replace(layer)
    if device == "cpu":
        # Most of the mapped file serves nobody any more.
        modules.leave_checkpoint(model)
        modules.release_freed()
    return {op: "; ".join(sorted(ways)) for op, ways in chosen.items()}


def _to(weight: Stored, device: str) -> Stored:
    """The same weight on `device`."""
    if device == "cpu":
        return weight
    if isinstance(weight, GroupedWeight):
        return GroupedWeight(
            packed=weight.packed.to(device),
            scales=weight.scales.to(device),
            width=weight.width,
            group=weight.group,
            bits=weight.bits,
            zeros=None if weight.zeros is None else weight.zeros.to(device),
        )
    return type(weight)(weight.codes.to(device), weight.scales.to(device))
