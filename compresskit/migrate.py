"""Bring a stored document of an earlier schema to the present one, one version at a time.

Each step is a pure function from a JSON document of version n to one of version n + 1. It moves
and renames what was measured; what the old version did not measure stays absent, never invented.
A step is never edited once its schema was released: records of every version stay readable.

Where a document is not what its version says, a step names the place instead of failing on it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compresskit.errors import RecordError
from compresskit.record import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Document = dict[str, Any]


def upgrade(
    document: Document, steps: Mapping[int, Callable[[Document], Document]] | None = None
) -> Document:
    """Return `document` at schema `SCHEMA`; the argument and its parts are left as they are.

    Raises:
        RecordError: the schema is none that this version knows the way from, or the content is not
            that of the schema it names.
    """
    version = document.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise RecordError(
            f"schema {version!r}; this version reads 1 to {SCHEMA}. Update compresskit."
        )
    known = STEPS if steps is None else steps
    for number in range(version, SCHEMA):
        if number not in known:
            raise RecordError(f"no way from schema {number} to {number + 1} is known.")
        document = {**known[number](document), "schema_version": number + 1}
    return document


def _from_1(document: Document) -> Document:
    """Peaks were one flat dict, the cache one number, energy one window of each kind."""
    blocks = document.get("blocks") or ()
    if not isinstance(blocks, (list, tuple)):
        raise _not_of(1, "blocks")
    return {**document, "blocks": [_block_from_1(block, i) for i, block in enumerate(blocks)]}


def _block_from_1(block: object, index: int) -> Document:
    where = f"blocks.{index}"
    block = _mapping(block, where)
    passes = dict(_mapping(block.get("passes") or {}, f"{where}.passes"))
    if passes.get("memory"):
        passes["memory"] = _memory_from_1(passes["memory"], f"{where}.passes.memory")
    if passes.get("energy"):
        energy = dict(_mapping(passes["energy"], f"{where}.passes.energy"))
        for kind in ("prefill", "generate"):
            energy[kind] = [_mapping(energy.get(kind), f"{where}.passes.energy.{kind}")]
        passes["energy"] = energy
    return {**block, "passes": passes}


def _memory_from_1(memory: object, where: str) -> Document:
    memory = dict(_mapping(memory, where))
    held = memory.get("cache_bytes")
    if type(held) is not int:
        raise _not_of(1, f"{where}.cache_bytes")
    peaks = _mapping(memory.pop("peaks", None) or {}, f"{where}.peaks")
    return {**memory, "cache_bytes": {"held": held}, "phases": _phases(peaks)}


def _phases(peaks: Mapping[str, Any]) -> Document:
    """Sort `counter/window` readings by window; the window `apply` is called compress now."""
    phases: Document = {}
    for key, reading in peaks.items():
        counter, _, window = key.partition("/")
        name = "compress" if window == "apply" else window
        phases.setdefault(name, {"peaks": {}})["peaks"][counter] = reading
    return phases


def _mapping(value: object, where: str) -> Document:
    if not isinstance(value, dict):
        raise _not_of(1, where)
    return value


def _not_of(version: int, where: str) -> RecordError:
    return RecordError(f"{where} is not as schema {version} has it.")


STEPS: Mapping[int, Callable[[Document], Document]] = MappingProxyType({1: _from_1})
