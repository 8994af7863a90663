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
        where = parameter.device
        if where not in generators:
            generators[where] = torch.Generator(where).manual_seed(seed)
        parameter.normal_(0.0, std, generator=generators[where])
