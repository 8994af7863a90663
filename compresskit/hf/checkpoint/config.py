"""config.json of a written checkpoint: the base model's, with what was done to its layers.

One form for all packed layers: one group that targets the class `Linear` and ignores what stayed
dense. Several forms (mixed precision): every group names its layers. Names are exact there because
vLLM would let a fused layer match the class before it looks at the parts, and where a model holds
experts, which vLLM counts as `Linear` too. An output head is always named: it is no `Linear` in
vLLM.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.hf.checkpoint.form import Form

MIXED = "mixed-precision"
OLDEST = "0.15.0"
"""First version of compressed-tensors that transformers 5 takes."""


def quantization_config(
    forms: Mapping[str, Form], dense: Sequence[str], *, head: str | None, experts: bool
) -> dict[str, Any]:
    """The entry `quantization_config`.

    Args:
        forms: form of each packed layer, by its name.
        dense: names of the linear layers that stayed dense.
        head: name of the output head, if the model has one.
        experts: the model holds routed experts.
    """
    by_form: dict[Form, list[str]] = {}
    for name, form in forms.items():
        by_form.setdefault(form, []).append(name)
    if len(by_form) == 1 and not experts:
        only = next(iter(by_form))
        by_form[only] = [*([head] if head is not None and head in forms else []), "Linear"]
    formats = {form.format for form in by_form}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": form.document(targets)
            for index, (form, targets) in enumerate(by_form.items())
        },
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _version(),
    }


def written_config(
    base: Mapping[str, Any], quantization: Mapping[str, Any], *, dtype: str, untie: bool
) -> dict[str, Any]:
    """The base model's config with the entry of `quantization_config`.

    `untie`: the output head has a packed weight of its own now, beside a dense embedding.
    """
    config = {key: value for key, value in base.items() if key != "torch_dtype"}
    for part in (config, config.get("text_config")):
        if part is config or (isinstance(part, dict) and "dtype" in part):
            part["dtype"] = dtype
        if untie and isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    config["quantization_config"] = dict(quantization)
    return config


def _version() -> str:
    try:
        return version("compressed-tensors")
    except PackageNotFoundError:
        return OLDEST
