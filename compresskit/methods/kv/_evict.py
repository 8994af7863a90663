"""What all evicting caches share: how many rows stay, which ones are safe, when rows are dropped.

    the first pass (the prompt)   attends over everything; then `limit` rows a head are kept
    later passes                  grow: nothing more is dropped
                                  hold: back to `limit` as soon as `interval` rows too many are held

    rows   0 1 2 3 | 4 5 6 ... 90 91 | 92 ... 122
            sink       by score          recent

Every key/value head keeps as many rows as the others, but rows of its own choice. Rows stay in the
order of the text. The prompt is what the first pass brings: if it comes in chunks, the share is one of
the first chunk, and a budget in tokens is the one to ask for.

To write an evicting method, subclass `EvictingLayer` with a `score` (larger stays) and `Evict` with
`layer`. A score that needs queries sets `watches`: `score` then gets the attention call.

The layer tells two lengths: the tokens it has seen, which is the next position, and the rows it
holds. With `positions = "contiguous"` kept keys close up to the newest one,

    tokens seen        0 1 2 3 . . . . 8 9        next position 10
    their positions    4 5 6 7         8 9

so that no distance is larger than the cache, as in StreamingLLM (arXiv 2309.17453, section 3.2),
which counts the rows from 0 instead. Rotary attention looks at distances alone, so both are the same;
this way queries stay where every loop, `model.generate()` included, puts them, layers may hold
different numbers of rows, and few rows move.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, Self

import torch
from pydantic import Field, model_validator

from compresskit.errors import RunError
from compresskit.hf.cache import TOKENS, Layer, factory, hand
from compresskit.hf.rotary import Rotary
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._layers import install
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import JsonValue

    from compresskit.hf.attention import Call
    from compresskit.system import System


class Rule(NamedTuple):
    """How much a layer keeps and when it drops the rest."""

    share: float = 0.5
    """Share of the prompt's rows that is kept, where `tokens` is 0."""
    tokens: int = 0
    """Rows that are kept; 0: by share."""
    hold: bool = False
    """Drop rows in later passes too."""
    interval: int = 1
    """Rows beyond the limit that make `hold` drop."""
    sink: int = 0
    """First rows that are always kept."""
    recent: int = 0
    """Newest rows that are always kept."""
    rotary: Rotary | None = None
    """Set if kept keys close up to the newest."""
    seed: int = 0
    """Of the run, for a score that draws."""

    def limit(self, prompt: int) -> int:
        """Rows to keep of a prompt of that many: rounded down, and never less than the safe ones."""
        # Not prompt * share, whose rounding could lose a row: int(10 * (1 - 0.9)) is 0.
        return self.tokens or max(int(round(prompt * self.share, 6)), self.sink + self.recent, 1)


def select(scores: torch.Tensor, limit: int, *, sink: int = 0, recent: int = 0) -> torch.Tensor:
    """Indices of the `limit` highest of `scores` `[B, K, S]`, ascending: int64 `[B, K, limit]`.

    The first `sink` and the last `recent` rows are always among them.
    """
    rows = scores.shape[-1]
    if sink or recent:
        scores = scores.clone()
        scores[..., :sink] = torch.inf
        scores[..., max(rows - recent, 0) :] = torch.inf
    return scores.topk(limit, dim=-1, sorted=False).indices.sort(dim=-1).values


def take(held: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows `kept` `[B, K, n]` of `held` `[B, K, S, *]`, as a copy."""
    batch, heads, rows, width = held.shape
    # Whole rows by one index: eight times faster on a CPU than a gather of single numbers.
    first = torch.arange(0, batch * heads * rows, rows, device=kept.device).view(batch, heads, 1)
    chosen = held.reshape(-1, width).index_select(0, (first + kept).flatten())
    return chosen.view(batch, heads, -1, width)


class EvictingLayer(Layer):
    """Keeps the rows with the highest `score`."""

    is_croppable = False
    watches: ClassVar[bool] = False
    """Whether `score` needs queries: rows are then dropped after attention, not before."""

    def __init__(self, rule: Rule) -> None:
        """Hold nothing yet; the limit is set by the first pass."""
        super().__init__()
        self.rule = rule
        # This name is what transformers reads and resets: tokens seen, not rows held.
        self.cumulative_length = 0
        self.limit: int | None = None

    @abstractmethod
    def score(self, call: Call | None) -> torch.Tensor:
        """How much each row held is worth, `[B, K, S]`; `call` is None unless the class `watches`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows held and the new ones; then drop, unless attention has to be seen first."""
        self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[TOKENS]
        self.arrive(key_states, value_states)
        seen = hand(self, self.keys), self.values
        if not self.watches:
            self.settle(None)
        return seen

    def arrive(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold the new rows; a class that keeps more about them adds that here."""
        self.append(keys=keys, values=values)

    def attend(self, call: Call) -> torch.Tensor:
        """Attend over the rows that `update` returned; then drop."""
        # Layers may hold different numbers of rows, and the model has one mask for all of them.
        refuse_other_masks(call)
        answer = call.over(call.keys, call.values).dense()
        if self.watches:
            self.settle(call)
        return answer

    def settle(self, call: Call | None) -> None:
        """After a pass: drop what is too many, if it is time."""
        rows = self.rows
        if self.limit is None:
            self.limit = self.budget(rows)
        elif not self.rule.hold or rows < self.limit + self.rule.interval:
            return
        if rows > self.limit:
            self.drop(self.limit, call)

    def budget(self, prompt: int) -> int:
        """Rows to keep of a prompt of that many."""
        return self.rule.limit(prompt)

    def drop(self, limit: int, call: Call | None) -> None:
        """Keep the `limit` rows of the highest score, and those that are safe."""
        self.keep(select(self.score(call), limit, sink=self.rule.sink, recent=self.rule.recent))

    def keep(self, kept: torch.Tensor) -> None:
        """Hold rows `kept` `[B, K, n]` alone; a class with tensors that are no rows spares them."""
        rows = self.rows
        self.each(lambda held: take(held, kept))
        self.renumber(kept, rows)

    def renumber(self, kept: torch.Tensor, rows: int) -> None:
        """If positions are contiguous, turn the keys, which were `kept` of `rows`, to the last ones."""
        if self.rule.rotary is not None:
            places = torch.arange(rows - kept.shape[-1], rows, device=kept.device)
            # So a row moves by as many places as newer rows were dropped.
            self.keys = self.rule.rotary.move(self.keys, places - kept)

    @property
    def rows(self) -> int:
        """Rows held."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen, which is the next position."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: rows are numbered so that the newest has its position."""
        return self.rows + query_length, self.cumulative_length - self.rows

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: what was dropped when the newest rows came does not return."""
        raise RunError("an evicting cache cannot take tokens back: the rows it dropped are gone.")

    def reset(self) -> None:
        """Forget everything, the count of tokens seen and the limit included."""
        super().reset()
        self.cumulative_length, self.limit = 0, None


def refuse_other_masks(call: Call) -> None:
    """Raise unless the call's mask says no more than that older tokens are seen.

    Raises:
        RunError: a row of the batch is padded, or the mask is one of the user's own.
    """
    if call.mask is None:
        return
    seen = call.mask if call.mask.dtype is torch.bool else call.mask == 0
    new, rows = seen.shape[-2:]
    causal = torch.ones(new, rows, dtype=torch.bool, device=seen.device).tril(rows - new)
    if not bool((seen == causal).all()):
        raise RunError(
            "an evicting cache takes no padded batch and no attention mask: padding would be kept or "
            "dropped like tokens. Give prompts of equal length, or one at a time."
        )


EFFECTS = Effects(
    requires=frozenset(
        {Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.FULL_CONTEXT, Trait.ATTENTION_HOOK}
    ),
    removes=frozenset(
        {
            # A second cache method would replace these layers, not wrap them.
            Trait.OWN_CACHE,
            Trait.FULL_CONTEXT,
            Trait.ROLLBACK,
            # By row number padding would be taken for text.
            Trait.PADDED_BATCH,
            Trait.STATIC_SHAPES,
            Trait.LOSSLESS,
        }
    ),
)
"""Rows are dropped for good."""


Positions = Literal["original", "contiguous"]


def rotary_for(system: System, positions: Positions) -> Rotary | None:
    """What moves keys if positions are contiguous.

    Raises:
        Conflict: the keys of the model cannot be moved, or it has no layer to evict from.
    """
    if positions == "original":
        return None
    factory(system.model.config, lambda index: Layer())
    return Rotary.of(system.model)


class Evict(AbstractMethod):
    """Parameters of all evicting methods."""

    stage: ClassVar[Stage] = Stage.CACHE
    chosen: ClassVar[str] = "by score"
    """How rows are chosen, for people."""

    ratio: float = Field(0.5, ge=0, lt=1)
    """Share of the prompt's rows that is dropped; what stays is rounded down."""
    tokens: int = Field(0, ge=0)
    """Rows kept, instead of a share of the prompt; 0: by ratio."""
    decoding: Literal["grow", "hold"] = "grow"
    """grow: tokens decoded after the prompt all stay. hold: the cache goes back to its budget."""
    interval: int = Field(16, ge=1)
    """hold: rows beyond the budget after which it is restored."""
    positions: Positions = "original"
    """original: kept keys stay rotated by the positions they had. contiguous: they close up to the
    newest one, so that no distance is larger than the cache."""

    @model_validator(mode="after")
    def _budget(self) -> Self:
        safe = self.rule().sink + self.rule().recent
        if self.tokens and self.tokens < safe:
            raise ValueError(
                f"a budget of {self.tokens} tokens is smaller than the {safe} that are always kept; "
                "raise tokens, or lower what is always kept"
            )
        return self

    @abstractmethod
    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """An empty layer: number `index` of `layers` of the model."""

    def maker(self, system: System, rule: Rule) -> Callable[[int], EvictingLayer]:
        """What makes the layers of `system`; for a method that must know more of the model."""
        layers = system.model.config.get_text_config().num_hidden_layers
        return lambda index: self.layer(rule, index, layers)

    def rule(self, rotary: Rotary | None = None) -> Rule:
        """The parameters as a layer needs them; a method with rows that are always kept adds them."""
        return Rule(
            share=1 - self.ratio,
            tokens=self.tokens,
            hold=self.decoding == "hold",
            interval=self.interval,
            rotary=rotary,
        )

    def effects(self) -> Effects:
        """As of all evicting methods."""
        return EFFECTS

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer a bounded cache."""
        return self.bounded(system)

    def bounded(self, system: System, *, seed: int = 0) -> System:
        """`apply`; a method whose score draws calls it with the seed of the run."""
        rule = self.rule(rotary_for(system, self.positions))._replace(seed=seed)
        make = self.maker(system, rule)
        nominal: dict[str, JsonValue] = (
            {"keep_tokens": self.tokens} if self.tokens else {"keep_share": rule.share}
        )
        return install(
            system,
            make,
            cache=self.describe(),
            nominal=nominal,
        )

    def describe(self) -> str:
        """One phrase about what is kept."""
        kept = f"{self.tokens} tokens" if self.tokens else f"{1 - self.ratio:.0%} of the prompt"
        return f"{kept} {self.chosen}, {self.decoding} while decoding"
