"""What the weights of a system hold, by storage class; shared storage once.

    embedding, norm, dense   parameters that are as they were loaded (a tied head is the embedding)
    buffer                   tensors beside the parameters
    codes, packed            quantised or laid-out weights, padding included
    scales, zero_points, bias
    constants                what a compiled graph froze and does not share with the model
    on_host, on_disk         weights that a placement keeps there between the steps that use them
    in_others                the shares of other processes
    drafter                  what only a draft model or drafting heads hold, of any of these kinds

A packed layout may be opaque or padded, and an element size then lies, so a module with
`held_bytes` answers for itself; whatever torch owns is counted by its storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from compresskit.hf import parallel, placement
from compresskit.hf.modules import HoldsBytes
from compresskit.hf.prepack import opaque_bytes
from compresskit.measure.memory import residency
from compresskit.record import Estimated, Measured, Reading
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from compresskit.system import System

Key = tuple[torch.device, int]


class Piece(NamedTuple):
    """Some bytes of the weights."""

    kind: str
    nbytes: int
    mapped: tuple[int, int] | None = None
    """Address and bytes where they may be a mapped file; None where they were written to memory."""
    frozen: bool = False
    """Held by a compiled graph only."""
    away: bool = False
    """Not on the device that computes, but for the moment in which it is used."""


def beside(system: System) -> list[tuple[Any, Any]]:
    """Modules that `system` holds beside its model, each with a step whose graphs may hold more."""
    heads = [(module, None) for module in system.beside]
    return [(draft.model, draft.step) for draft in system.drafts] + heads


def weight_bytes(
    model: Any, step: Any = None, others: Sequence[tuple[Any, Any]] = ()
) -> dict[str, int]:
    """Bytes held by `model` and the compiled graphs of `step`, by storage class; `others` on top."""
    totals: dict[str, int] = {}
    for piece in pieces(model, step, others):
        totals[piece.kind] = totals.get(piece.kind, 0) + piece.nbytes
    return totals


def pieces(model: Any, step: Any = None, others: Sequence[tuple[Any, Any]] = ()) -> Iterator[Piece]:
    """Everything that `model` and the graphs of `step` hold, each storage once, then the `others`."""
    seen: set[Key] = set()
    yield from _of_one(model, step, seen)
    for other, its_step in others:
        for piece in _of_one(other, its_step, seen):
            yield piece._replace(kind="drafter")


def here(held: Iterable[Piece]) -> Iterator[Piece]:
    """Those of `held` that stay where they are computed with."""
    return (piece for piece in held if not piece.away)


def _of_one(model: Any, step: Any, seen: set[Key]) -> Iterator[Piece]:
    for name, module in model.named_modules():
        if isinstance(module, HoldsBytes):
            yield from _packed(module, seen)
            continue
        for piece in _plain(module, seen):
            away = piece.kind == "on_host" and placement.home(model, name) == "disk"
            yield piece._replace(kind="on_disk") if away else piece
    for tensor in getattr(step, "constants", list)():
        key, size = storage(tensor)
        if key not in seen:
            seen.add(key)
            yield Piece("packed" if tensor.is_mkldnn else "constants", size, frozen=True)


def storage(tensor: torch.Tensor) -> tuple[Key, int]:
    """Identity and bytes of what `tensor` keeps alive."""
    if tensor.device.type == "meta" or hasattr(tensor, "to_local"):
        # The bytes are elsewhere, or some of them; a weight that two modules share is one tensor.
        return (tensor.device, -id(tensor)), tensor.nbytes
    if tensor.is_mkldnn:
        # Opaque: no storage to ask. Each of these is the only handle of its memory.
        return (tensor.device, -id(tensor)), opaque_bytes(tensor)
    held = tensor.untyped_storage()
    return (tensor.device, held.data_ptr()), held.nbytes()


def _packed(module: HoldsBytes, seen: set[Key]) -> Iterator[Piece]:
    keys = {storage(tensor)[0] for tensor in getattr(module, "held_tensors", list)()}
    if keys and keys <= seen:
        return
    seen |= keys
    for kind, size in module.held_bytes().items():
        yield Piece(kind, size)


def _plain(module: nn.Module, seen: set[Key]) -> Iterator[Piece]:
    for kind, tensors in ((_kind(module), module._parameters), ("buffer", module._buffers)):
        for tensor in tensors.values():
            if tensor is None:
                continue
            key, size = storage(tensor)
            if key not in seen:
                seen.add(key)
                if tensor.device.type == "meta":
                    yield Piece("on_host", size, away=True)
                elif (local := parallel.share(tensor)) is not tensor:
                    at = (local.data_ptr(), local.nbytes) if local.device.type == "cpu" else None
                    yield Piece(kind, local.nbytes, at)
                    yield Piece("in_others", size - local.nbytes, away=True)
                else:
                    yield Piece(kind, size, (key[1], size) if key[0].type == "cpu" else None)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "Norm" in type(module).__name__ else "dense"


class ResidentWeights(NamedTuple):
    """How much of the weights is in memory."""

    reading: Reading
    of_files: int
    """Resident bytes that are pages of a mapped file."""


def resident_weights(held: Iterable[Piece]) -> ResidentWeights:
    """Resident bytes of `held`: tensors of a mapped file count with the pages that were touched."""
    held = list(held)
    written = sum(piece.nbytes for piece in held if piece.mapped is None)
    found = residency.pages(piece.mapped for piece in held if piece.mapped is not None)
    if found is None:
        size = float(sum(piece.nbytes for piece in held))
        model = "bytes held by the weights: which pages are resident cannot be read here"
        return ResidentWeights(Estimated(value=size, unit=Unit.BYTE, model=model), 0)
    value = float(written + found.resident)
    source = "bytes of packed weights and resident pages of the others"
    return ResidentWeights(Measured(value=value, unit=Unit.BYTE, source=source), found.of_files)
