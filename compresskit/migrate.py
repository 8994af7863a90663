"""Bring a stored document of an earlier schema to the present one, one version at a time.

Each step is a pure function from a JSON document of version n to one of version n + 1. It moves
and renames what was measured; what the old version did not measure stays absent, never invented.
A step is never edited once its schema was released: records of every version stay readable.
"""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compresskit.record import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return `document` at schema `SCHEMA`; the argument is left as it is."""
    current = copy.deepcopy(document)
    for version in range(current["schema_version"], SCHEMA):
        STEPS[version](current)
        current["schema_version"] = version + 1
    return current


def _from_1(document: dict[str, Any]) -> None:
    """Peaks were one flat dict, the cache one number, energy one window of each kind."""
    for block in document.get("blocks") or ():
        passes = block.get("passes") or {}
        if memory := passes.get("memory"):
            memory["cache_bytes"] = {"held": memory["cache_bytes"]}
            memory["phases"] = _phases(memory.pop("peaks", {}))
        if energy := passes.get("energy"):
            for kind in ("prefill", "generate"):
                energy[kind] = [energy[kind]]


def _phases(peaks: dict[str, Any]) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    for key, reading in peaks.items():
        counter, _, window = key.partition("/")
        name = "compress" if window == "apply" else window
        phases.setdefault(name, {"peaks": {}})["peaks"][counter] = reading
    return phases


STEPS: Mapping[int, Callable[[dict[str, Any]], None]] = MappingProxyType({1: _from_1})
