"""Load a model directory: config, weights in the wanted type, tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import ModelError, RunError
from compresskit.hf.tokenizer import HFTokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.device import Device
    from compresskit.spec import ModelSpec


class Loaded(NamedTuple):
    """A model in eval mode with its tokenizer and its longest context in tokens."""

    model: Any
    tokenizer: HFTokenizer
    context: int


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json as it stands; no weights are touched."""
    file = path / "config.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file}: not readable ({error}). The model folder needs a config.json."
        ) from None
    if not isinstance(document, dict):
        raise ModelError(f"{file}: expected a JSON object.")
    return document


def has_experts(config: dict[str, Any]) -> bool:
    """Tell whether the config describes routed experts."""
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def has_recurrent_state(config: dict[str, Any]) -> bool:
    """Tell whether some layers keep a state instead of keys and values (Mamba, linear attention)."""
    kinds = config.get("layer_types") or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The type the weights were saved in; float32 where the config does not say."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def load_model(path: Path, spec: ModelSpec, device: Device) -> Loaded:
    """Load the model in `path` onto `device`.

    Raises:
        ModelError: no causal language model can be built from the files.
        RunError: it does not fit into memory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = checkpoint_dtype(read_config(path)) if spec.dtype == "auto" else spec.dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, wanted),
            local_files_only=True,
            use_safetensors=None if spec.allow_pickle else True,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation="sdpa",
            **({} if device.kind == "cpu" else {"device_map": device.kind}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: cannot be loaded as a causal language model ({error})."
        ) from None
    except torch.cuda.OutOfMemoryError as error:
        raise RunError(
            f"{path}: the weights do not fit on {device.name} ({error}). Use a smaller dtype."
        ) from None
    model.eval().requires_grad_(False)
    eos = getattr(model.generation_config, "eos_token_id", None)
    tokenizer = load_tokenizer(path, eos, trust_remote_code=spec.trust_remote_code)
    return Loaded(model, tokenizer, context_of(model.config.to_dict()))


def context_of(config: dict[str, Any]) -> int:
    """Longest context in tokens; 2**31 where the architecture has no bound of its own."""
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return 2**31


def dtype_name(model: Any) -> str:
    """Name of the model's floating-point type, such as bfloat16."""
    return str(model.dtype).removeprefix("torch.")
