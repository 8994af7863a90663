"""A cache of bounded size: the first tokens and the newest ones.

tokens seen   0 1 2 3 | 4 5 6 ... 90 | 91 92 ... 122
               sink       dropped          window
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, final

import torch
from pydantic import Field, JsonValue

from compresskit.errors import RunError
from compresskit.hf.cache import TOKENS, Layer, factory
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.system import System


def keep(rows: torch.Tensor, *, sink: int, window: int) -> torch.Tensor:
    """Return the first `sink` and the last `window` rows of `[B, K, S, D]`."""
    if rows.shape[TOKENS] <= sink + window:
        return rows
    return torch.cat((rows[..., :sink, :], rows[..., -window:, :]), dim=TOKENS)


class SinkWindowLayer(Layer):
    """Forgets the middle after each forward pass, and remembers how many tokens it has seen."""

    is_croppable = False

    def __init__(self, *, sink: int, window: int) -> None:
        """Hold at most `sink + window` rows between forward passes."""
        super().__init__()
        self.sink, self.window = sink, window
        # This name is what transformers reads and resets: tokens seen, not rows held.
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows held and the new ones; then forget the middle."""
        self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[TOKENS]
        self.append(keys=key_states, values=value_states)
        seen = self.keys, self.values
        self.each(lambda rows: keep(rows, sink=self.sink, window=self.window))
        return seen

    def get_seq_length(self) -> int:
        """Tokens seen: the next position, whatever has been dropped."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: rows are numbered so that the newest has its position."""
        held = super().get_seq_length()
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: the rows that would come back into the window are gone."""
        raise RunError(
            "kv/sink_window cannot take tokens back: the rows before its window are gone."
        )

    def reset(self) -> None:
        """Forget everything, the count of tokens seen included."""
        super().reset()
        self.cumulative_length = 0


@final
class SinkWindow(AbstractMethod):
    """Keep the first `sink` tokens and the `window` newest ones; drop what lies between.

    Paper: Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks,
    arXiv 2309.17453.
    Differs: kept keys stay rotated by their original positions; the paper numbers the rows inside
    the cache instead, so that positions never exceed its size. Here generation therefore ends at
    the model's context length. A forward pass of several tokens (the prompt) sees all of them and
    drops rows only afterwards. Sliding-window layers stay as they are.
    Cost: copies the kept rows of each layer once more per step, when something was dropped.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"sink": 4, "window": 32}

    sink: int = Field(4, ge=0)
    """First tokens that are always kept."""
    window: int = Field(1020, ge=1)
    """Newest tokens that are kept."""

    def effects(self) -> Effects:
        """Rows are dropped for good, and by row number: padding would be taken for sinks."""
        return Effects(
            requires=frozenset({Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.FULL_CONTEXT}),
            # A second cache method would replace these layers, not wrap them: OWN_CACHE goes too.
            removes=frozenset(
                {
                    Trait.OWN_CACHE,
                    Trait.FULL_CONTEXT,
                    Trait.ROLLBACK,
                    Trait.PADDED_BATCH,
                    Trait.STATIC_SHAPES,
                    Trait.LOSSLESS,
                }
            ),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a bounded cache."""
        return replace(
            system,
            new_cache=factory(
                system.model.config,
                lambda index: SinkWindowLayer(sink=self.sink, window=self.window),
            ),
            facts=MappingProxyType(
                {**system.facts, "cache": f"first {self.sink} and newest {self.window} tokens"}
            ),
        )
