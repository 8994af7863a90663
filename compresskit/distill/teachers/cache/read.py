"""A teacher that looks its answers up.

Shards are mapped, not loaded: a batch touches the pages of its own rows. The first time a shard is
used, all of it is read once to compare it with its SHA-256.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, final

import torch

from compresskit.distill.teachers.cache import shard, source
from compresskit.errors import ModelError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.distill.batch import Batch, Draws, TopK
    from compresskit.distill.losses.term import Kind
    from compresskit.distill.teachers.cache.formats import Format

OPEN_SHARDS = 64
"""Files held open at once; systems allow some hundred to a process."""


@final
class Cached:
    """What `open` returns: the targets of a finished cache, by row numbers."""

    tokens_read = 0
    """No model reads anything here; what writing took is in `manifest.teacher_tokens`."""

    def __init__(self, folder: Path, manifest: source.Manifest) -> None:
        """Refer to the shards in `folder`; use `open`, which checks them."""
        self.folder = folder
        self.manifest = manifest
        self.form: Format = manifest.parsed()
        self.kind: Kind = self.form.kind
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._verified: set[int] = set()

    @property
    def vocabulary(self) -> int:
        """Tokens of the teacher's distribution."""
        return self.manifest.vocabulary

    def targets(self, batch: Batch) -> TopK | Draws:
        """Look the rows of `batch` up, in its order.

        Raises:
            SpecError: a row is not from the data, or the rows have another length.
            ModelError: a shard is damaged.
        """
        length = self.manifest.source.length
        if batch.tokens.shape[1] != length:
            raise SpecError(
                f"{self.folder} holds rows of {length} tokens, the batch has {batch.tokens.shape[1]}. "
                "Train with the row length that the cache was written for."
            )
        found = [self._row(row) for row in batch.rows.tolist()]
        stored = {name: torch.cat([row[name] for row in found]) for name in found[0]}
        return self.form.unpack(
            {name: tensor.to(batch.tokens.device) for name, tensor in stored.items()}
        )

    def _row(self, row: int) -> dict[str, torch.Tensor]:
        """What is stored of one row: `[L - 1, ...]` by name."""
        if row == -1:
            raise SpecError(
                "a teacher cache knows the rows of the data only, and the student wrote one of this "
                "batch itself. Use the teacher online for on-policy rows, or set their fraction to 0."
            )
        if not 0 <= row < self.manifest.source.rows:
            raise SpecError(
                f"{self.folder} holds rows 0 to {self.manifest.source.rows - 1}; there is no row {row}."
            )
        index, at = divmod(row, self.manifest.rows_per_shard)
        file = self._file(index)
        with shard.damage_told(shard.path_of(self.folder, index)):
            return {
                name: file.get_slice(name)[at : at + 1][0]
                for name in self.form.columns(self.vocabulary)
            }

    def _file(self, index: int) -> Any:
        if index in self._files:
            self._files.move_to_end(index)
            return self._files[index]
        path = shard.path_of(self.folder, index)
        first = self.manifest.span(index).start
        file, told = shard.open_mapped(path, cache=self.manifest.digest(), first=first)
        if index not in self._verified:
            shard.verify(path, file, told)
            self._verified.add(index)
        self._files[index] = file
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)
        return file


def open(folder: Path, *, wanted: source.Source, states: Sequence[int] = ()) -> Cached:
    """Open a finished cache as a teacher.

    wanted: what it must belong to. states: blocks that a hidden-state loss wants to look behind.

    Raises:
        SpecError: it belongs to something else, or hidden states are wanted.
        ModelError: there is none, it is unfinished, or a shard is missing or cut short.
    """
    if states:
        raise SpecError(
            "a teacher cache keeps no hidden states, which a hidden-state loss compares. Leave that "
            "loss out, or use the teacher online."
        )
    manifest = source.load(folder)
    if manifest is None:
        raise ModelError(f"{folder}: no teacher cache ({source.FILE} is missing). Write it first.")
    manifest.source.require(wanted, where=folder)
    if not manifest.complete:
        there = len(shard.listed(folder))
        raise ModelError(
            f"{folder}: unfinished, {there} of {manifest.shards()} shards are there. Run the command "
            "that wrote it again: it goes on where it was stopped."
        )
    for index in range(manifest.shards()):
        path = shard.path_of(folder, index)
        shard.open_mapped(path, cache=manifest.digest(), first=manifest.span(index).start)
    return Cached(folder, manifest)
