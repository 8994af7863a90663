"""A known shape filled with random weights: for speed, memory and energy, never for quality.

    random:llama-3.1-8b                       the whole shape, seed 0
    random:qwen3-30b-a3b:layers=12,seed=3     cut to twelve layers
    random:llama-3.2-1b:layers=1,divide=16,vocabulary=512      small enough for a trial run

The folder in the cache holds a config, the tokenizer of `tiny` (whose ids every shape has) and no
weights: they are drawn on the device when the model is loaded (`compresskit.hf.synthetic`), so nothing
large is written. The revision is a digest of the config, seed included. Every record of such a model
says `synthetic weights`, and whatever would judge its output refuses.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from pydantic import Field

from compresskit.errors import SpecError, UnknownName
from compresskit.hf.sources.cache import Entry, ensure
from compresskit.hf.sources.digest import revision
from compresskit.hf.sources.model import KnownModel, ResolvedModel
from compresskit.hf.sources.shapes import SHAPES, divided, parameters
from compresskit.spec import Frozen, parse_call

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.hf.sources.model import Progress

PREFIX = "random:"
MARK = "compresskit_random"
"""Key of config.json that tells how the weights are drawn: seed and number of parameters."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALLEST_VOCABULARY = 512


class Changes(Frozen):
    """What may follow the name of a shape."""

    layers: int | None = Field(None, ge=1)
    """Layers to keep; all by default."""
    divide: int = Field(1, ge=1)
    """Divide widths and heads by this."""
    vocabulary: int | None = Field(None, ge=_SMALLEST_VOCABULARY)
    """Rows of the embedding; at least those of the tokenizer."""
    seed: int = Field(0, ge=0)
    """Fixes the weights, for one kind of device and one version of torch."""


def resolve(name: str, *, cache: Path, progress: Progress) -> ResolvedModel:
    """Write the config of the shape called `name`, which begins with `PREFIX`, into the cache.

    Raises:
        UnknownName: no such shape.
        SpecError: what follows the name cannot be done.
        RunError: the cache cannot be written.
    """
    config = describe(name)
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    sha = hashlib.sha256(text.encode()).hexdigest()
    entry = Entry(
        path=cache / "random" / sha[:16],
        label=f"describing {name}",
        needs_bytes=1_000_000,
        facts={"config_sha256": sha, "baseline": "random"},
    )

    def build(folder: Path) -> None:
        from compresskit.assets import tiny_path

        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(_SPECIAL), encoding="utf-8")
        for file in _TOKENIZER:
            shutil.copyfile(tiny_path("target") / file, folder / file)

    return ResolvedModel(
        name=name,
        path=ensure(entry, build, progress),
        kind="random",
        revision=revision(sha),
        baseline="random",
        notice="The weights are random: speed and memory are the shape's, the answers mean nothing.",
    )


def describe(name: str) -> dict[str, Any]:
    """The config of the shape called `name`, with the mark that its weights are to be drawn.

    Raises:
        UnknownName: no such shape.
        SpecError: what follows the name cannot be done.
    """
    shape, params = parse_call(name.removeprefix(PREFIX), option="model")
    if shape not in SHAPES:
        raise UnknownName("model", name, [PREFIX + known for known in SHAPES])
    changes = Changes.decode(params, where=name)
    try:
        config = divided(SHAPES[shape], changes.divide)
    except ValueError as error:
        raise SpecError(f"{name}: cannot divide by {changes.divide}: {error}.") from None
    if changes.layers is not None:
        if changes.layers > config["num_hidden_layers"]:
            raise SpecError(
                f"{name}: {shape} has {config['num_hidden_layers']} layers. Ask for at most as many."
            )
        config["num_hidden_layers"] = changes.layers
    config["vocab_size"] = changes.vocabulary or config["vocab_size"]
    mark = {"seed": changes.seed, "parameters": parameters(config)}
    return {**config, **_SPECIAL, MARK: mark}


def is_marked(folder: Path) -> bool:
    """Whether a checked folder holds a model whose weights were drawn, as far as its config tells."""
    return MARK in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def known() -> tuple[KnownModel, ...]:
    """List the shapes."""
    return tuple(
        KnownModel(
            name=PREFIX + name,
            description=f"random weights in a known shape ({_count(config)} parameters): speed only, no "
            "quality; :layers=N cuts it",
            source="drawn on the device",
            licence="none",
            download_bytes=0,
            cached=True,
        )
        for name, config in SHAPES.items()
    )


def _count(config: Any) -> str:
    return f"{parameters(config) / 1e6:,.0f} M"
