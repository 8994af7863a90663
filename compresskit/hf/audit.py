"""Where the bits are: every kind of module of a model, with what it stands for and what it takes.

Layers of one kind share a line, their numbers replaced by stars; where they are stored differently
(another width, another implementation, one left dense) each way has a line of its own, which then
names its blocks. The lines cover the model: their bytes add up to everything that is held, their
parameters to those of the model as it was loaded, copies aside.

Nothing here trusts a nominal width. Bits are bytes that a module says it holds, over the weights
that it stands for; a test compares the bytes with every tensor that the garbage collector finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.hf import modules
from compresskit.hf.modules import HoldsBytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from pydantic import JsonValue
    from torch import nn

    from compresskit.system import System

DENSE = "torch"
"""The implementation of what is not packed."""
DENSE_SHARE = 0.1
"""Share of the bytes above which weights that no method could pack deserve a warning."""
NAMED_BY_USER = frozenset({"embedding", "head", "norm", "linear"})
"""Kinds that stay dense because somebody asked for it, by an option or by leaving one out."""


class Piece(NamedTuple):
    """The tensors of one module."""

    name: str
    kind: str
    storage: str
    """Its type, or for a packed one the bits a weight of each role."""
    implementation: str
    parameters: int
    """Weights that it stands for."""
    nbytes: int
    note: str = ""


def rows(model: Any, *, tied: bool | None = None) -> list[JsonValue]:
    """The audit of `model`, JSON-ready, largest lines first.

    tied: whether head and embedding shared one weight when the model was loaded; where they do not
    any more, the head is marked as a copy, since its parameters are the embedding's.
    """
    pieces = list(_pieces(model, modules.is_tied(model) if tied is None else tied))
    merged: dict[tuple[str, ...], list[Piece]] = {}
    for piece in pieces:
        key = (_starred(piece.name), piece.kind, piece.storage, piece.implementation, piece.note)
        merged.setdefault(key, []).append(piece)
    ways: dict[str, int] = {}
    for pattern, *_ in merged:
        ways[pattern] = ways.get(pattern, 0) + 1
    lines: list[Any] = [_line(key[0], one, ways[key[0]] > 1) for key, one in merged.items()]
    # A stable sort: equally large lines stay in the order of the model.
    lines.sort(key=lambda line: -line["bytes"])
    return lines


def _line(pattern: str, pieces: list[Piece], divided: bool) -> dict[str, Any]:
    first = pieces[0]
    parameters = sum(piece.parameters for piece in pieces)
    nbytes = sum(piece.nbytes for piece in pieces)
    line: dict[str, Any] = {
        "modules": pattern,
        "count": len(pieces),
        "kind": first.kind,
        "parameters": parameters,
        "bytes": nbytes,
        "bits": 8 * nbytes / parameters if parameters else None,
        "storage": first.storage,
        "implementation": first.implementation,
    }
    if divided and (which := _blocks(pieces)):
        line["blocks"] = which
    return {**line, "note": first.note} if first.note else line


def _pieces(model: Any, tied: bool) -> Iterator[Piece]:
    """Every module with tensors of its own, each tensor once, in the order of the model."""
    seen: set[object] = set()
    inside: set[int] = set()
    top, table = modules.head(model), model.get_input_embeddings()
    apart = tied and top is not None and not modules.is_tied(model) and not _shares(table)
    for name, found in model.named_modules():
        module: Any = found
        if id(module) in inside:
            continue
        if isinstance(module, HoldsBytes):
            inside |= {id(inner) for inner in found.modules()}
            kind = _packed_kind(name, module, top)
            note = "copy of the embedding" if apart and module is top else ""
            places = {_place(tensor) for tensor in getattr(module, "held_tensors", list)()}
            again = bool(places) and places <= seen
            seen |= places
            yield _packed(name, module, kind, note, again=again)
            continue
        for kind, tensors in _dense(module, top, seen):
            note = "copy of the embedding" if apart and kind == "head" else ""
            dtype = " and ".join(dict.fromkeys(_dtype(tensor) for tensor in tensors))
            count = 0 if kind == "buffer" else sum(tensor.numel() for tensor in tensors)
            size = sum(tensor.nbytes for tensor in tensors)
            yield Piece(name, kind, f"dense {dtype}", DENSE, count, size, note)


def _dense(
    module: nn.Module, top: nn.Module | None, seen: set[object]
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """The module's own parameters by kind, then its buffers; what was seen before is left out."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            kind = "head" if module is top else modules.kind_of(module, parameter)
            kinds.setdefault(kind, []).append(parameter)
    for buffer in module.buffers(recurse=False):
        if (place := _place(buffer)) not in seen:
            seen.add(place)
            kinds.setdefault("buffer", []).append(buffer)
    yield from kinds.items()


def _place(tensor: torch.Tensor) -> object:
    """What tells the memory of a tensor from that of others; opaque ones have none to ask for."""
    if tensor.is_mkldnn:
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def _packed(name: str, module: Any, kind: str, note: str, *, again: bool) -> Piece:
    held: dict[str, int] = module.held_bytes()
    if again or not held:
        return Piece(name, kind, "shared", _implementation(module), 0, 0, note)
    count, size = modules.stands_for(module), sum(held.values())
    storage = " + ".join(
        f"{role} {8 * nbytes / count:.2f}" if count else role for role, nbytes in held.items()
    )
    return Piece(name, kind, storage, _implementation(module), count, size, note)


def _packed_kind(name: str, module: Any, top: nn.Module | None) -> str:
    if module is top:
        return "head"
    if "experts" in name.split("."):
        return "experts"
    return "embedding" if hasattr(module, "num_embeddings") else "linear"


def _implementation(module: Any) -> str:
    """What multiplies: the class of the prepared weight, or of a layer that has none."""
    return type(getattr(module, "product", module)).__name__


def _shares(table: Any) -> bool:
    return bool(getattr(table, "shared", False))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _starred(name: str) -> str:
    """The name with numbers as stars.

    >>> _starred("model.layers.11.mlp.down_proj")
    'model.layers.*.mlp.down_proj'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split(".")) or "model"


def _blocks(pieces: list[Piece]) -> str:
    """Numbers of the blocks, neighbours as ranges: "0-3, 7"."""
    numbers = sorted(
        {int(part) for p in pieces for part in p.name.split(".") if part.isdecimal()}
        if all(sum(part.isdecimal() for part in p.name.split(".")) == 1 for p in pieces)
        else ()
    )
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def warnings(lines: list[Any], loaded: int) -> list[str]:
    """What a reader of the numbers has to be told.

    loaded: parameters of the model as it was loaded.
    """
    said = []
    found = sum(line["parameters"] for line in lines if "note" not in line)
    if found != loaded:
        said.append(
            f"audit: the modules account for {found} of the {loaded} parameters that were loaded"
        )
    total = sum(line["bytes"] for line in lines)
    narrow = any(line["implementation"] != DENSE and (line["bits"] or 16) < 12 for line in lines)
    for line in lines:
        share = line["bytes"] / total if total else 0.0
        left = line["implementation"] == DENSE and line["kind"] not in NAMED_BY_USER
        if narrow and left and share > DENSE_SHARE:
            said.append(
                f"audit: {line['modules']} stayed {line['storage']} and takes {share:.0%} of the "
                "bytes of the weights: nothing packed it"
            )
    return said


def added(system: System, *, tied: bool, parameters: int) -> dict[str, JsonValue]:
    """The facts of `system` with its audit, and with what that has to say as `warnings`."""
    lines = rows(system.model, tied=tied)
    facts: dict[str, JsonValue] = {**system.facts, "audit": lines}
    if said := warnings(lines, parameters):
        before = system.facts.get("warnings", [])
        facts["warnings"] = [*(before if isinstance(before, list) else [before]), *said]
    return facts
