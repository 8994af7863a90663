"""Check a model folder before anything loads it: config, weights, and what must not be run.

Every source ends here, so a folder from the hub, from the cache or from the user is held to the
same rules:

- `config.json` is there and is JSON;
- weights are safetensors: `model.safetensors`, or the shards that `model.safetensors.index.json`
  names; each header can be read, each file is as long as its header says, each tensor of the
  index is in the shard it is said to be in;
- pickle files (`*.bin`, `*.pt`, ...) run code when they are opened, so they are weights only
  with `allow_pickle`; beside safetensors they are never read and do no harm;
- `auto_map` in a config names Python code shipped with the model, refused unless
  `trust_remote_code`.

A safetensors file is `length u64 | JSON header | tensor bytes`; the header holds each tensor's
`data_offsets` counted from its own end, which is all that is needed to see a cut-off download.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_PICKLED_WEIGHTS = "pytorch_model"  # the only pickles that transformers looks for
_WITH_CODE = ("config.json", "tokenizer_config.json")
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
_NO_HEADER = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
_LFS_POINTER = b"version https://git-lfs"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Checked:
    """A folder that passed."""

    weights: tuple[Path, ...]
    """Files that hold the weights, sorted; they pin the model."""
    remarks: tuple[str, ...]
    """What a user should know before trusting numbers."""


def check(folder: Path, *, allow_pickle: bool, trust_remote_code: bool) -> Checked:
    """Check a model folder without loading it.

    Raises:
        ModelError: a file is missing, cut off or corrupt, or would run code nobody allowed.
    """
    config = _json(folder / "config.json")
    if not trust_remote_code:
        _refuse_code(folder)
    remarks = []
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method", "unnamed") if isinstance(method, dict) else "unnamed"
        remarks.append(
            f"The weights are already quantised ({method}): an uncompressed run of this model "
            "is not a full-precision baseline."
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        remarks.append("The folder holds no tokenizer.")
    return Checked(_weights(folder, allow_pickle=allow_pickle), tuple(remarks))


def pickle_refusal(path: Path) -> ModelError:
    """Explain why a pickle file is not opened, and both ways out."""
    return ModelError(
        f"{path} is a pickle file, which can run any code when it is opened. Convert the model "
        "once where you trust it (load it with transformers, then "
        "model.save_pretrained(FOLDER), which writes safetensors), or allow it with --allow-pickle."
    )


def _weights(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    # The same order of preference as transformers, so what is checked is what is loaded.
    if (folder / WEIGHTS).exists():
        tensors_in(folder / WEIGHTS)
        return (folder / WEIGHTS,)
    if (folder / INDEX).exists():
        return _shards(folder)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles and not allow_pickle:
        raise pickle_refusal(pickles[0])
    pickled = tuple(path for path in pickles if path.name.startswith(_PICKLED_WEIGHTS))
    if pickled:
        return pickled
    others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
    found = f" It holds {others}: rename or merge." if others else ""
    raise ModelError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.{found}")


def _shards(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} has no 'weight_map'. Download the model again.")
    held: dict[str, frozenset[str]] = {}
    for name in sorted({str(shard) for shard in places.values()}):
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file of this folder.")
        if not (folder / name).exists():
            raise ModelError(
                f"{folder / name} is missing, but {INDEX} lists it. Download it again."
            )
        held[name] = tensors_in(folder / name)
    for tensor, shard in places.items():
        if tensor not in held[shard]:
            raise ModelError(
                f"{folder / shard} lacks the tensor {tensor!r} that {INDEX} places there."
            )
    return tuple(folder / name for name in held)


def tensors_in(path: Path) -> frozenset[str]:
    """Read the names of the tensors in a safetensors file and check the file's length.

    Raises:
        ModelError: no safetensors header, or the file is shorter or longer than its header says.
    """
    try:
        return frozenset(_header(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def numbers_in(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds, from its header alone.

    Raises:
        ModelError: as `tensors_in`.
    """
    try:
        return {name: math.prod(tensor["shape"]) for name, tensor in _header(path).items()}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except _NO_HEADER as error:
        raise ModelError(f"{path} is corrupt: its header names no shapes ({error}).") from error


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if _LFS_POINTER.startswith(start) and len(start) == 8:
            raise ModelError(f"{path} is a git-lfs pointer, not the weights. Run 'git lfs pull'.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_LONGEST_HEADER, size - 8):
            raise ModelError(f"{path} is truncated or not a safetensors file ({size} bytes).")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            expected = 8 + length + int(end)
        except _NO_HEADER as error:
            raise ModelError(f"{path} is corrupt: its header cannot be read ({error}).") from error
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise ModelError(
            f"{path} is {state}: it has {size} bytes, its header says {expected}. "
            "Download or copy it again."
        )
    return header


def _refuse_code(folder: Path) -> None:
    for name in _WITH_CODE:
        path = folder / name
        if path.is_file() and "auto_map" in _json(path):
            raise ModelError(
                f"{path} asks for Python code shipped with the model ('auto_map'), which would "
                "run on this machine. Read that code, then allow it with --trust-remote-code."
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: {path.parent} is not a model folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.")
    return value
