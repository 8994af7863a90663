"""Load a model directory: config, weights in the wanted type, tokenizer.

no quantization_config       transformers loads dense weights
marked as random             drawn on the device (`synthetic`)
placed on several devices    the same, by accelerate's map (`placement`) or a share of it (`parallel`)
compressed-tensors           packed layers of ours (`checkpoint.read`); what they cannot hold is
                             unpacked by transformers, and a fact says so
bitsandbytes, GPTQ, AWQ ...  the layers of that library, which then account for their bytes
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from compresskit.errors import ModelError, RunError
from compresskit.hf import parallel, synthetic
from compresskit.hf.tokenizer import HFTokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic import JsonValue

    from compresskit.device import Device
    from compresskit.spec import ModelSpec


class Loaded(NamedTuple):
    """A model in eval mode with its tokenizer and its longest context in tokens."""

    model: Any
    tokenizer: HFTokenizer
    context: int
    kernels: Mapping[str, str] = MappingProxyType({})
    """Operation -> implementation, of a checkpoint that came packed."""
    facts: Mapping[str, JsonValue] = MappingProxyType({})
    """What there is to say about a checkpoint that came quantised."""
    simulated: tuple[str, ...] = ()
    """Not empty if what the checkpoint asks for is computed on wider units here."""
    synthetic: str | None = None
    """What about the output is made up, if anything."""


class Spread(NamedTuple):
    """What spreading a model needs to know."""

    limits: Mapping[int | str, int]
    """Most bytes by place (`placement.limits`)."""
    folder: Path
    """For weights that are to lie on disk and are in no file of the model as they are used."""

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is told."""
        return {
            "device_map": "auto",
            "max_memory": dict(self.limits),
            "offload_folder": str(self.folder),
        }


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


def load_config(path: Path, spec: ModelSpec) -> Any:
    """Return the config as transformers understands it; no weights are touched."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot read its config ({error}).") from None


def has_experts(config: dict[str, Any]) -> bool:
    """Tell whether the config describes routed experts."""
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def has_recurrent_state(config: dict[str, Any]) -> bool:
    """Tell whether some layers keep a state instead of keys and values (Mamba, linear attention)."""
    kinds = config.get("layer_types") or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def has_windows(config: dict[str, Any]) -> bool:
    """Tell whether some layers attend to the newest tokens only (sliding or chunked windows)."""
    text = config.get("text_config") or config
    kinds = text.get("layer_types")
    if kinds is not None:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    # Mistral's way: a window for all layers. Qwen 2 has the number and a switch beside it.
    return bool(text.get("sliding_window")) and text.get("use_sliding_window", True)


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The type the weights were saved in; float32 where the config does not say."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def load_model(
    path: Path, spec: ModelSpec, device: Device, placed: Spread | Literal["shared"] | None = None
) -> Loaded:
    """Load the model in `path` onto `device`, or onto several as `placed` says.

    `shared`: this process takes its share (`parallel`).

    Raises:
        ModelError: no causal language model can be built from the files.
        RunError: it does not fit into memory.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_config(path)
    wanted = checkpoint_dtype(config) if spec.dtype == "auto" else spec.dtype
    quantization = config.get("quantization_config")
    try:
        if synthetic.draws(path, config):
            kind = getattr(torch, wanted)
            loaded = _Weights(
                synthetic.build(path, kind, device.kind)
                if not isinstance(placed, Spread)
                else synthetic.spread(path, kind, placed.limits, placed.folder)
            )
        elif quantization is None:
            loaded = _Weights(_from_transformers(path, spec, wanted, device, placed))
        else:
            loaded = _quantised(path, spec, wanted, device, quantization)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: cannot be loaded as a causal language model ({error})."
        ) from None
    except torch.cuda.OutOfMemoryError as error:
        raise RunError(
            f"{path}: the weights do not fit on {device.name} ({error}). Use a smaller dtype."
        ) from None
    model = loaded.model
    model.eval().requires_grad_(False)
    eos = getattr(model.generation_config, "eos_token_id", None)
    tokenizer = load_tokenizer(path, eos, trust_remote_code=spec.trust_remote_code)
    context = context_of(model.config.to_dict())
    made_up = synthetic.WHAT if synthetic.is_marked(config) else None
    return Loaded(
        model, tokenizer, context, loaded.kernels, loaded.facts, loaded.simulated, made_up
    )


class _Weights(NamedTuple):
    model: Any
    kernels: Mapping[str, str] = MappingProxyType({})
    facts: Mapping[str, JsonValue] = MappingProxyType({})
    simulated: tuple[str, ...] = ()


def _from_transformers(
    path: Path,
    spec: ModelSpec,
    wanted: str,
    device: Device,
    placed: Spread | Literal["shared"] | None = None,
) -> Any:
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {} if device.kind == "cpu" else {"device_map": device.kind}
    if placed is not None:
        where = parallel.options() if placed == "shared" else placed.options()
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, wanted),
        local_files_only=True,
        use_safetensors=None if spec.allow_pickle else True,
        trust_remote_code=spec.trust_remote_code,
        attn_implementation="sdpa",
        **where,
    )


def _quantised(
    path: Path, spec: ModelSpec, wanted: str, device: Device, quantization: object
) -> _Weights:
    """Load a checkpoint that comes quantised.

    Raises:
        ModelError: it cannot be run here; names the package or the device it wants.
    """
    from compresskit.hf import foreign
    from compresskit.hf.checkpoint import groups, read

    if not isinstance(quantization, dict) or not quantization.get("quant_method"):
        raise ModelError(f"{path / 'config.json'}: quantization_config names no quant_method.")
    method = str(quantization["quant_method"])
    unpacked: dict[str, JsonValue] = {}
    if method == "compressed-tensors":
        try:
            packed = read.load(path, quantization, getattr(torch, wanted), device.kind)
            return _Weights(packed.model, packed.kernels, packed.facts(), packed.simulated())
        except groups.Unread as reason:
            unpacked = {"warnings": [f"unpacked to dense weights at load: {reason}"]}
    foreign.quiet()
    try:
        model = _from_transformers(path, spec, wanted, device)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelError(
            f"{path}: transformers cannot load this {method} checkpoint here: "
            f"{_first_line(error)}{_install(method)}"
        ) from None
    if unpacked:
        read.unpack(model)
    layers = ", ".join(f"{count} x {name}" for name, count in foreign.account(model).items())
    kernels = {"checkpoint_linear": f"{method}: {layers}"} if layers else {}
    return _Weights(model, kernels, {"checkpoint": method, **unpacked})


_PACKAGES = MappingProxyType(
    {
        "awq": "'compresskit[gptq]'",
        "gptq": "'compresskit[gptq]'",
        "bitsandbytes": "bitsandbytes",
        "compressed-tensors": "compressed-tensors",
        "hqq": "hqq",
        "quanto": "optimum-quanto",
        "torchao": "torchao",
    }
)
"""What transformers needs for a kind of checkpoint, as pip knows it."""


def _install(method: str) -> str:
    packages = _PACKAGES.get(method)
    return f" It needs: pip install {packages}" if packages else ""


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."


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
