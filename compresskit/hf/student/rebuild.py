"""Put the weights that are left into a model built afresh from the student's config.

    changed    a copy of a config with other fields, checked as transformers checks them
    skeleton   the model that a config describes, without memory for its weights
    rebuilt    that model with weights: every tensor has to find its place and every place a tensor

A student made so shares no module with its teacher, and what loads it again from disk builds it the
same way. A config and weights that do not agree are found here, not after hours of training.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from compresskit.errors import Conflict, SpecError
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Mapping


def changed(config: Any, *, where: str, **fields: Any) -> Any:
    """Return a copy of `config` in which `fields`, by transformers' common names, are set.

    Raises:
        SpecError: a field does not take such a value; `where` says who asked.
    """
    copied = copy.deepcopy(config)
    try:
        for name, value in fields.items():
            setattr(copied, name, value)
        copied.validate()
    except (TypeError, ValueError, StrictDataclassError) as error:
        # The check is named on the first lines, the reason with its type on the last one.
        reason = str(error).strip().splitlines()[-1].strip()
        reason = reason.removeprefix("ValueError: ").removeprefix("TypeError: ")
        raise SpecError(f"{where}: {config.model_type} does not take it: {reason}") from None
    return copied


def check_plain(config: Any, *, where: str) -> None:
    """Refuse configs that describe more, or something else, than one dense-weight language model.

    Raises:
        SpecError: the language model is a part of a larger one, its blocks differ in size, or its
            weights are quantised.
    """
    if config.get_text_config() is not config:
        raise SpecError(
            f"{where}: {config.model_type} is a language model inside a larger one. Save the language "
            "model by itself and name that as the teacher."
        )
    if getattr(config, "_heterogeneity_spec", None):
        raise SpecError(
            f"{where}: the blocks of this {config.model_type} differ in size, and a student's are all "
            "alike. Name another teacher."
        )
    if getattr(config, "quantization_config", None):
        raise SpecError(
            f"{where}: the teacher's checkpoint is quantised, and a student is cut from float "
            "weights. Name the checkpoint that it was quantised from."
        )


def skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of `config` on the meta device: shapes and types, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype})
        ).eval()


def rebuilt(model: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return a model of `config` that holds `tensors`, in type, place and habits like `model`.

    Raises:
        Conflict: its names and shapes are not those of `tensors`.
    """
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten at once
        fresh = built(model, config)
    try:
        fresh.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise Conflict(
            f"{type(model).__name__} keeps more than its config says, so it cannot be cut: {reason}. "
            "Make the student by scratch."
        ) from None
    return fresh


def built(model: Any, config: Any) -> Any:
    """A model of `config` with weights as transformers draws them, in type and place like `model`."""
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=model.dtype)
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.to(model.device).eval()


def float_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The state of `model` by name.

    Raises:
        Conflict: some layers are packed.
    """
    packed = [name for name, m in model.named_modules() if isinstance(m, modules.HoldsBytes)]
    if packed:
        raise Conflict(
            f"a student is cut from float weights, and {packed[0]} is packed. Load the teacher dense."
        )
    state: dict[str, torch.Tensor] = model.state_dict()
    return state
