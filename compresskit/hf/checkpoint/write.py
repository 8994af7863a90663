"""Write a system as a compressed-tensors checkpoint: a folder that other engines load.

    system, packed under forced("reference") --prepare--> tensors, config, what vLLM makes of it
    prepared + base model's folder --write--> config.json, safetensors (in shards), tokenizer files

The folder appears under its name only when it is complete: everything is written to a hidden one
beside it, which is then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from compresskit.errors import RunError, UsageError
from compresskit.hf import modules
from compresskit.hf.checkpoint import vllm
from compresskit.hf.checkpoint.config import quantization_config, written_config
from compresskit.hf.checkpoint.layers import packed_layers
from compresskit.hf.load import dtype_name, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from compresskit.hf.checkpoint.form import Form

SHARD_BYTES = 5_000_000_000
CARRIED = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the base model that go along, as patterns; the weights and the card do not."""


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is not on disk yet."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    forms: dict[str, Form]
    """Form of each packed layer."""
    dense: tuple[str, ...]
    """Linear layers that stayed dense."""
    left_dense: dict[str, int]
    """Bytes of dense parameters by kind."""
    untied: bool
    """The head got a weight of its own beside the embedding it shared before."""
    vllm: vllm.Support

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def counts(self) -> dict[str, int]:
        """Number of layers by form."""
        counts: dict[str, int] = {}
        for form in self.forms.values():
            counts[form.name()] = counts.get(form.name(), 0) + 1
        return counts


def prepare(model: Any, base: Path) -> Prepared:
    """Gather what belongs in the checkpoint of `model`, whose base model lies in the folder `base`.

    Raises:
        Conflict: something was packed that compressed-tensors has no place for, or nothing was.
    """
    layers = packed_layers(model)
    forms = {layer.name: layer.form for layer in layers}
    dense = tuple(site.name for site in modules.linears(model) if _is_linear(site.module))
    before = read_config(base)
    top = modules.head(model)
    head = next((name for name, module in model.named_modules() if module is top), None)
    # A tied head that was packed is no longer the embedding, whatever the config still says.
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    untied = head in forms and tied
    experts = any(p.dim() == 3 for p in model.parameters())
    tensors = _dense_tensors(model)
    for layer in layers:
        tensors.update(layer.tensors)
    quantization = quantization_config(forms, dense, head=head, experts=experts)
    return Prepared(
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        config=written_config(before, quantization, dtype=dtype_name(model), untie=untied),
        forms=forms,
        dense=dense,
        left_dense=modules.left_dense(model),
        untied=untied,
        vllm=vllm.support(forms, dense, head),
    )


def _is_linear(module: Any) -> bool:
    # GPT-2's Conv1D is neither targeted nor ignored by the class `Linear`.
    return type(module).__name__ == "Linear"


def _dense_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, shared ones once, and the buffers that checkpoints keep.

    Under the names of the base model's own checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name in parameters or name not in every
    }
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return reverted


def check_free(out: Path) -> None:
    """Refuse a folder that already holds something, before any work is done.

    Raises:
        UsageError: it exists and is not an empty folder.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists and is no folder. Choose another --out.")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out} already holds files, which are not overwritten. Choose another --out, or "
            "delete it first."
        )


def write(prepared: Prepared, base: Path, out: Path, card: str) -> dict[str, int]:
    """Write the folder `out`; return the bytes of each file. `card` becomes README.md.

    Raises:
        UsageError: `out` already holds something.
        RunError: the disk is full or the folder cannot be written.
    """
    check_free(out)
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        _fill(partial, prepared, base, card)
        partial.chmod(0o755)
        partial.replace(out)
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {error.strerror or error}. Free space or choose another --out."
        ) from None
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}


def _fill(folder: Path, prepared: Prepared, base: Path, card: str) -> None:
    for pattern in CARRIED:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    _text(folder / "config.json", _json(prepared.config))
    _text(folder / "README.md", card)
    _weights(folder, prepared.tensors)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _text(folder / "model.safetensors.index.json", _json(index))


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
