"""Weights out of thin air: draw a model of a given config on the device it will run on.

    config.json with a mark  ->  empty modules on the device  ->  every matrix normal, seeded

Nothing goes by way of the disk or the host's memory, so a model of sixteen gigabytes stands after
seconds on a GPU. Matrices are drawn one after the other from one generator with the deviation that the
config names (0.02 in all known shapes); gains stay at one and biases at zero, as in a fresh model. Zeros
would not do: they draw less power and let products run faster.

CPU and GPU draw different numbers from one seed, and torch promises no sequence for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compresskit.hf import placement
from compresskit.hf.sources.random import MARK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WHAT = "synthetic weights"
"""What is made up about the output, as `System.synthetic` says it."""


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether the weights under this config.json were drawn, or are to be: it stays in what is saved."""
    return MARK in config


def draws(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the weights of the folder `path` are to be drawn: marked, and none were saved there."""
    return is_marked(config) and not any(path.glob("*.safetensors"))


def stored_bytes(path: Path, config: Mapping[str, Any]) -> int:
    """Bytes of the weights of the model in `path`: of its files, or of those that will be drawn."""
    if draws(path, config):
        kind: torch.dtype = getattr(torch, config["dtype"])
        return int(config[MARK]["parameters"]) * kind.itemsize
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def build(path: Path, dtype: torch.dtype, device: str) -> Any:
    """Draw the model that the marked config in `path` describes.

    Args:
        path: folder with config.json and generation_config.json.
        dtype: of the weights.
        device: where they are drawn and stay, as torch names it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    seed = getattr(config, MARK)["seed"]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw(model, seed, std=config.initializer_range)
    model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


@torch.no_grad()
def draw(model: torch.nn.Module, seed: int, *, std: float) -> None:
    """Fill every matrix of `model` with normal numbers, in the order of its parameters.

    Each is drawn in its own type from one generator on its own device; a tied one is drawn once.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        parameter.normal_(0.0, std, generator=_dice(generators, parameter.device, seed))


def _dice(
    generators: dict[torch.device, torch.Generator], where: torch.device, seed: int
) -> torch.Generator:
    """The generator of a device; on GPUs of one kind equal seeds would give equal blocks."""
    if where not in generators:
        generators[where] = torch.Generator(where).manual_seed(seed + (where.index or 0))
    return generators[where]


@torch.no_grad()
def spread(path: Path, dtype: torch.dtype, limits: Mapping[int | str, int], folder: Path) -> Any:
    """Draw the model that the marked config in `path` describes where its weights are to lie.

    Each is drawn by itself on the device that it stays on, and one that is to lie on disk on the CPU, so
    no device ever holds more than its share. On CPU and disk the numbers are those of `build`.

    Args:
        path: folder with config.json and generation_config.json.
        dtype: of the weights.
        limits: most bytes by place, as `placement.limits` gives them.
        folder: for the weights that are to lie on disk; has to outlive the model.
    """
    from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
    from accelerate.utils import get_balanced_memory
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    seed = getattr(config, MARK)["seed"]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()  # each weight that was made empty was made anew
    whole = {"no_split_module_classes": list(model._no_split_modules or ()), "dtype": dtype}
    room = get_balanced_memory(model, max_memory=dict(limits), **whole)
    places = infer_auto_device_map(model, max_memory=room, **whole)
    model.hf_device_map = places
    on_disk = _draw_empty(model, seed, config.initializer_range, folder)
    model.tie_weights()
    if len(set(places.values())) > 1 or "disk" in places.values():
        skip = getattr(model, "_skip_keys_device_placement", None)
        dispatch_model(model, places, offload_index=on_disk or None, skip_keys=skip)
    model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _draw_empty(model: Any, seed: int, std: float, folder: Path) -> dict[str, dict[str, str]]:
    """Give the empty parameters of `model` numbers at home; return accelerate's index of those on disk."""
    from accelerate.utils import set_module_tensor_to_device
    from safetensors.torch import save_file

    generators: dict[torch.device, torch.Generator] = {}
    index: dict[str, dict[str, str]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in list(model.named_parameters()):
        place = placement.home(model, name) or "cpu"
        at = torch.device("cpu" if place == "disk" else place)
        if parameter.dim() > 1:
            value = torch.empty_like(parameter, device=at)
            value.normal_(0.0, std, generator=_dice(generators, at, seed))
        else:  # as in a fresh model
            value = torch.full_like(parameter, float(not name.endswith("bias")), device=at)
        if place != "disk":
            set_module_tensor_to_device(model, name, at, value=value)
            continue
        file = folder / f"{name}.safetensors"
        save_file({name: value}, file)
        kind = str(value.dtype).removeprefix("torch.")
        entry = {"safetensors_file": str(file), "weight_name": name, "dtype": kind}
        index |= dict.fromkeys(names[id(parameter)], entry)
    return index
