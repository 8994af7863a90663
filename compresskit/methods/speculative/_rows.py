"""The texts of a batch inside one cache, where each row may grow by another number of tokens.

    slots   pad pad  a   b   c   x   d            a rectangle [B, W]
    valid    -   -   +   +   +   -   +            x was drafted and rejected: masked for good
    position         0   1   2       3            counted along the valid slots of a row

Tokens rejected in every row are cropped. A batch masks the others and gathers the valid slots once
too many are not; a single row moves what it keeps together at once, so that plain decoding, chains
and trees all start from a dense cache and need no mask but a tree's own.

That rows which accept different lengths lose their places and masks if nobody keeps them is the subject
of EqSpec, arXiv 2510.22876.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compresskit.hf.cache import enable_rollback, roll_back
from compresskit.hf.slots import capacity, keep, rearrange
from compresskit.methods.speculative._draft import ROOT, Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.system import System

LOOSE = 1.5
"""Slots over the longest text from which on a batch is gathered; a gather copies the cache once."""


def span(system: System, tokens: int) -> int:
    """Slots for texts of at most so many tokens, with room for the widest pass behind them."""
    return tokens + max(system.widths)


class Rows:
    """Texts of `B` rows in one cache of `system`: `begin`, then `extend` and `keep` in turns."""

    def __init__(self, system: System, tokens: int) -> None:
        """Hold nothing yet; the texts will have at most so many tokens each."""
        self.system = system
        self.cache = system.new_cache(span(system, tokens))
        self.room = capacity(self.cache)
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        """`[B, W]`, on the host."""
        self.lengths: list[int] = []
        """Tokens of each text."""
        self.block: list[Draft] = []
        self.width = 0

    def begin(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Take the prompts `[B, S]`, left-padded where `mask` is False; logits `[B, 1, V]`."""
        positions = None
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self.system.step(
            tokens, self.cache, mask=mask, positions=positions, features=features
        )
        self.valid = (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask).cpu()
        self.lengths = self.valid.sum(-1).tolist()
        enable_rollback(self.cache)
        return logits

    def extend(
        self,
        blocks: Sequence[Draft],
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run one pass over a block per row; logits `[B, T, V]`, rows padded at the end.

        A block is a `Draft` whose tokens are all new to the cache: a chain, or a tree. A block that
        nobody has cut stays whole.
        """
        if self.width > max((len(block.tokens) for block in self.block), default=0):
            self.keep([range(len(block.tokens)) for block in self.block])
        system, rows = self.system, len(blocks)
        longest = max(len(block.tokens) for block in blocks)
        width = self._width(longest)
        tokens = torch.zeros(rows, width, dtype=torch.long)
        fresh = torch.zeros(rows, width, dtype=torch.bool)
        for row, block in enumerate(blocks):
            tokens[row, : len(block.tokens)] = torch.tensor(block.tokens, dtype=torch.long)
            fresh[row, : len(block.tokens)] = True
        trees = any(block.parents is not None for block in blocks)
        if self.room is not None and self.valid.shape[1] + width > self.room:
            self._gather()
        mask = positions = None
        dense = rows == 1 or (bool(fresh.all()) and bool(self.valid.all()))
        if trees or not dense:
            positions = torch.zeros(rows, width, dtype=torch.long)
            for row, block in enumerate(blocks):
                at = torch.tensor(block.depths(), dtype=torch.long) - 1
                positions[row, : len(at)] = at
                positions[row] += self.lengths[row]
            mask = self._tree_mask(blocks, width) if trees else torch.cat((self.valid, fresh), 1)
        device = system.device.torch
        logits = system.step(
            tokens.to(device),
            self.cache,
            mask=None if mask is None else mask.to(device),
            positions=None if positions is None else positions.to(device),
            keep=width,
            features=features,
        )
        # Padding at the end of a single chain is as valid as the rest until `keep` crops it.
        self.valid = torch.cat((self.valid, fresh), 1)
        self.lengths = [
            length + len(block.tokens) for length, block in zip(self.lengths, blocks, strict=True)
        ]
        self.block, self.width = list(blocks), width
        return logits

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep the tokens at these places (rising) of each row's last block, forget the others."""
        old = self.valid.shape[1] - self.width
        self.lengths = [
            length - len(block.tokens) + len(places)
            for length, block, places in zip(self.lengths, self.block, kept, strict=True)
        ]
        if len(kept) == 1:
            keep(self.cache, self.width, kept[0])
            self.valid = self.valid[:, : old + len(kept[0])]
            self.valid[:, old:] = True
        else:
            fresh = torch.zeros_like(self.valid[:, old:])
            for row, places in enumerate(kept):
                fresh[row, list(places)] = True
            self.valid = torch.cat((self.valid[:, :old], fresh), 1)
            self._crop()
        self.width = 0

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the newest `counts` tokens of each row, all of them chains."""
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        for row, count in enumerate(counts):
            if count:
                newest = self.valid[row].nonzero()[-count:, 0]
                self.valid[row, newest] = False
        self._crop()
        self.width = 0

    def _crop(self) -> None:
        """Take back slots at the end that no row uses, and gather if too many others are unused."""
        used = int(self.valid.any(0).nonzero().max()) + 1
        roll_back(self.cache, self.valid.shape[1] - used)
        self.valid = self.valid[:, :used]
        if len(self.lengths) > 1 and used > LOOSE * max(self.lengths):
            self._gather()

    def _gather(self) -> None:
        """Move the valid slots of every row to the right end of as few slots as possible."""
        longest = int(self.valid.sum(-1).max())
        if longest == self.valid.shape[1]:
            return
        # A stable sort puts the valid slots last, in their order.
        slots = self.valid.int().sort(dim=-1, stable=True).indices[:, -longest:]
        rearrange(self.cache, slots)
        self.valid = self.valid.gather(1, slots)

    def _width(self, longest: int) -> int:
        if not self.system.fixed_widths:
            return longest
        wide = [width for width in self.system.widths if width >= longest]
        return min(wide, default=longest)

    def _tree_mask(self, blocks: Sequence[Draft], width: int) -> torch.Tensor:
        """Bool `[B, 1, T, W + T]`: all valid slots, a token's ancestors and itself."""
        old = self.valid.shape[1]
        mask = torch.zeros(len(blocks), 1, width, old + width, dtype=torch.bool)
        mask[..., :old] = self.valid[:, None, None, :]
        new = mask[..., old:]
        for row, block in enumerate(blocks):
            for place, parent in enumerate(block.follows()):
                if parent != ROOT:
                    new[row, 0, place] = new[row, 0, parent]
                new[row, 0, place, place] = True
        # A row with nothing to see would be no number, and spoil the layers above.
        for row, block in enumerate(blocks):
            for place in range(len(block.tokens), width):
                new[row, 0, place, place] = True
        # A cache of fixed size hands out all its slots, used or not.
        empty = 0 if self.room is None else self.room - mask.shape[-1]
        return torch.nn.functional.pad(mask, (0, empty))
