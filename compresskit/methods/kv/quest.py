"""Hold every key, read only the pages that may matter to the query.

    page      16 rows; its index: largest and smallest number of its keys in each channel
    score     sum over channels of max(q * smallest, q * largest)   >=   q k for every key k inside
    read      the index of all pages, then `budget` rows: the newest page and those of the best score

No row is dropped, so a page that is not read now may be read in the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import torch
from pydantic import Field, JsonValue, model_validator

from compresskit.hf.cache import KEYS_VALUES, TOKENS, Layer, hand
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._evict import refuse_other_masks
from compresskit.methods.kv._layers import install
from compresskit.methods.kv._pages import extend, gather
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.hf.attention import Call
    from compresskit.system import System


DRAFT = 64
"""Most tokens of a pass in which each chooses for itself: drafts that are checked, scored chunks."""


def bounds_of(keys: torch.Tensor, page: int) -> torch.Tensor:
    """Largest and smallest number of each channel in each page: `[B, K, S / page, 2 D]`."""
    batch, heads, _, width = keys.shape
    pages = keys.reshape(batch, heads, -1, page, width)
    return torch.cat((pages.amax(dim=3), pages.amin(dim=3)), dim=-1)


def page_scores(query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Largest product that a page may hold for a query head of the group: `[B, K, P]`.

    Args:
        query: `[B, H, D]`.
        bounds: `[B, K, P, 2 D]`, from `bounds_of`.
    """
    batch, heads, _, twice = bounds.shape
    groups = query.reshape(batch, heads, -1, twice // 2)
    # max(q * smallest, q * largest) takes the largest where q is positive, else the smallest.
    signed = torch.cat((groups.clamp(min=0), groups.clamp(max=0)), dim=-1)
    return (signed @ bounds.transpose(-1, -2)).amax(dim=2)


def best_pages(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` pages of the highest of `scores` `[B, K, P]`, the highest last: `[B, K, count]`."""
    return scores.topk(count, dim=-1).indices.flip(-1)


class QuestLayer(Layer):
    """Reads at most `budget` rows a query; None: all of them, and holds no index."""

    tensors = ("keys", "values", "bounds")
    holds = MappingProxyType({**KEYS_VALUES, "bounds": "index"})

    bounds: torch.Tensor | None
    """Of all pages but the newest, which is always read."""

    def __init__(self, budget: int | None, page: int) -> None:
        """Hold nothing yet; the budget has place for a page at least."""
        super().__init__()
        self.budget, self.page = budget, page

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold the new rows, and the bounds of the pages that they finished."""
        self.lazy_initialization(key_states, value_states)
        self.keys = extend(self.keys, key_states, page=self.page)
        self.values = extend(self.values, value_states, page=self.page)
        if self.budget is not None:
            known = 0 if self.bounds is None else self.bounds.shape[TOKENS]
            done = self._older(self.keys.shape[TOKENS])
            if done > known:
                new = self.keys[..., known * self.page : done * self.page, :]
                self.append(bounds=bounds_of(new, self.page))
        return hand(self, self.keys), self.values

    def _older(self, rows: int) -> int:
        """Pages before the one of the newest of `rows` rows."""
        return (rows - 1) // self.page

    def attend(self, call: Call) -> torch.Tensor:
        """A prompt sees everything; each later query only the pages that it chooses.

        A pass of more than `DRAFT` tokens is taken for another prompt.
        """
        if self.budget is None:
            return call.dense()
        # Padding would be in pages and move what is in which.
        refuse_other_masks(call)
        new, rows = call.query.shape[2], call.keys.shape[2]
        if rows <= self.budget or rows == new or new > DRAFT:
            return call.dense()
        answers = [
            self._read(call._replace(query=call.query[:, :, at : at + 1]), rows - new + at + 1)
            for at in range(new)
        ]
        return torch.cat(answers, dim=1)

    def _read(self, call: Call, rows: int) -> torch.Tensor:
        """Answer one query that sees the first `rows` rows: `[B, 1, H, D]`."""
        if self.budget is None or self.bounds is None or rows <= self.budget:
            return call.over(call.keys[:, :, :rows], call.values[:, :, :rows]).dense()
        older = self._older(rows)
        newest = rows - older * self.page
        room = self.budget - newest
        count = -(-room // self.page)
        scores = page_scores(call.query.squeeze(2), self.bounds[:, :, :older])
        last = torch.full((*scores.shape[:2], 1), older, device=scores.device)
        pages = torch.cat((best_pages(scores, count), last), dim=-1)
        # Of the page with the lowest score, which comes first, only what the budget leaves; of the
        # newest page, which comes last, only what there is.
        start = count * self.page - room
        taken = slice(start, start + self.budget)
        keys, values = (
            gather(held, pages, page=self.page)[:, :, taken] for held in (self.keys, self.values)
        )
        return call.over(keys, values).dense()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest rows, and the bounds of pages that are the newest again."""
        bounds, self.bounds = self.bounds, None
        super().crop(tokens_to_remove)
        rows = self.get_seq_length()
        self.bounds = bounds[..., : self._older(rows), :] if bounds is not None and rows else None

    def read_bytes(self) -> dict[str, int]:
        """Bytes of the cache that the next step reads, by kind."""
        if self.keys is None:
            return {}
        rows = self.get_seq_length()
        row = (self.keys.nbytes + self.values.nbytes) // rows
        if self.budget is None or self.bounds is None or rows <= self.budget:
            return {"keys_values": rows * row}
        return {"keys_values": self.budget * row, "index": self.bounds.nbytes}

    def copied_bytes(self) -> int:
        """Bytes that the next step writes to have the chosen pages side by side."""
        return self.read_bytes()["keys_values"] if "index" in self.read_bytes() else 0


@final
class Quest(AbstractMethod):
    """Read only the pages of the cache that the query may look at; hold all of them.

    Paper: Tang et al. 2024, Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference,
    arXiv 2406.10774.
    Differs: pages are chosen by key/value head, for the query head of its group that wants them
    most. Exactly `budget` rows are read: the newest page as far as it is filled, whole pages, and a
    part of the last one chosen. In later passes of up to 64 tokens (drafts) each chooses for
    itself; longer ones read everything, as the prompt does.
    Cost: holds more than a dense cache, by 1 / `page` of the keys' and as much of the values' bytes
    and up to 6 % of room for later rows. A step reads the index of all pages and copies the chosen
    ones side by side.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"budget": 64}

    budget: int = Field(1024, ge=1)
    """Rows that a query reads in each layer and head."""
    page: int = Field(16, ge=1)
    """Rows of a page."""
    dense_layers: int = Field(2, ge=0)
    """First layers that read everything: their attention is spread too wide."""

    @model_validator(mode="after")
    def _place(self) -> Self:
        if self.budget < self.page:
            raise ValueError(
                f"a budget of {self.budget} rows has no place for the newest page of {self.page}; "
                "raise budget or lower page"
            )
        return self

    def effects(self) -> Effects:
        """Every token is there and can be taken back, but attention does not see all of them."""
        return Effects(
            requires=frozenset(
                {Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.FULL_CONTEXT, Trait.ATTENTION_HOOK}
            ),
            removes=frozenset(
                {
                    # A second cache method would replace these layers, not wrap them.
                    Trait.OWN_CACHE,
                    # One pass over a text shows nothing of what decoding would do.
                    Trait.DENSE_CACHE,
                    Trait.PADDED_BATCH,
                    Trait.STATIC_SHAPES,
                    Trait.LOSSLESS,
                }
            ),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer pages."""
        paged = install(
            system,
            lambda index: QuestLayer(None if index < self.dense_layers else self.budget, self.page),
            cache=f"everything; a query reads {self.budget} rows in pages of {self.page}",
            # What is held; nothing is dropped.
            nominal={"keep_share": 1.0},
        )
        facts = {**paged.facts, "cache_read_tokens": self.budget}
        return replace(paged, facts=MappingProxyType(facts))
