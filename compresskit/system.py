"""What runs: a model with its cache, step and decode loop, as one immutable value.

A method is a function from `System` to `System`: it replaces the field that it is about and
leaves the others alone. Nothing is patched globally; what must be switched on while decoding
(an attention function, a recorder) is a context manager in `attach`.

Dimension letters used in all tensor docstrings:

    B batch      T new tokens   S context       H query heads   K key/value heads
    D head dim   E model dim    V vocabulary    N, M out/in features
    G group size X experts
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import torch
    from pydantic import JsonValue

    from compresskit.device import Device
    from compresskit.spec import SamplingSpec


class Chunk(NamedTuple):
    """What one step of a decode loop delivers.

    tokens: int64 `[B, n]`; lengths: int64 `[B]`, how many of the n are real in each row (a row
    that has stopped delivers 0). drafts: tokens drafted and accepted in each row before this chunk,
    empty when the loop does not speculate.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    drafts: tuple[tuple[int, int], ...] = ()

    @property
    def drafted(self) -> int:
        """Tokens drafted in this step, all rows together."""
        return sum(drafted for drafted, _ in self.drafts)

    @property
    def accepted(self) -> int:
        """Tokens of these that were accepted and are delivered."""
        return sum(accepted for _, accepted in self.drafts)


def longest(chunks: Iterable[Chunk]) -> list[int]:
    """Tokens of the longest row after each chunk; rows may take their tokens in different chunks."""
    totals: list[int] = []
    seen: list[int] = []
    for chunk in chunks:
        lengths: list[int] = chunk.lengths.tolist()
        totals = [a + b for a, b in zip(totals or [0] * len(lengths), lengths, strict=True)]
        seen.append(max(totals))
    return seen


@dataclass(frozen=True)
class Request:
    """One batch to decode.

    tokens: int64 `[B, S]`, left-padded; mask: bool `[B, S]`, True for real tokens, or None when
    nothing is padded. stop: token ids that end a row; empty means exactly `max_new_tokens`.
    """

    tokens: torch.Tensor
    max_new_tokens: int
    sampling: SamplingSpec
    mask: torch.Tensor | None = None
    stop: tuple[int, ...] = ()
    seed: int = 0


class Tokenizer(Protocol):
    """The little that compresskit asks of a tokenizer."""

    eos_ids: tuple[int, ...]
    bos_id: int | None
    has_chat_template: bool

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, what the tokenizer itself adds (often a BOS)."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def chat(self, text: str) -> list[int]:
        """Token ids of `text` as one user turn, ready for the answer."""


class Step(Protocol):
    """One forward pass of the model through a cache."""

    def __call__(
        self,
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits `[B, keep, V]` of the last `keep` positions (0: of all).

        tokens `[B, T]`; mask bool `[B, S + T]`, or `[B, 1, T, S + T]` where tokens of one pass see
        different slots, or None; positions `[B, T]` or None (contiguous). To `features` the hidden
        states `[B, keep, E]` under these logits are appended.
        """


class NewCache(Protocol):
    """Makes an empty cache that can hold `capacity` tokens per row (dynamic caches ignore it)."""

    def __call__(self, capacity: int) -> Any:
        """Return a transformers `Cache`."""


class Decode(Protocol):
    """A decode loop: yields chunks, knows no clock."""

    def __call__(self, system: System, request: Request) -> Iterator[Chunk]:
        """Yield the new tokens of `request`, step by step."""


@dataclass(frozen=True)
class System:
    """A model ready to decode."""

    model: Any
    """A transformers causal language model in eval mode."""
    tokenizer: Tokenizer
    device: Device
    step: Step
    new_cache: NewCache
    decode: Decode
    context: int
    """Longest prompt plus answer, in tokens."""
    widths: tuple[int, ...] = (1,)
    """Tokens per row of the passes that the loop asks for once the prompt is done: compiled steps
    are built for these."""
    fixed_widths: bool = False
    """Passes of other widths than `widths` are slow, so loops fill up the next wider one."""
    during: Callable[[str], AbstractContextManager[object]] = lambda part: nullcontext()
    """Entered around each part of a step of a loop that has parts (draft, verify, judge): whoever
    measures puts a clock here, the loop knows none."""
    tell: Callable[[str, int], None] | None = None
    """Told what a loop held when it ended (drafter_bytes), if anybody listens: counting takes time."""
    drafts: tuple[System, ...] = ()
    """Systems that guess for this one (a smaller model, a view of its layers), the newest last: what
    they hold belongs to this one's accounts."""
    beside: tuple[Any, ...] = ()
    """Torch modules that a method keeps beside the model (drafting heads), the newest last."""
    settle: tuple[Callable[[System], System], ...] = ()
    """Run in order once the decode mode is prepared: what has to try the finished step."""
    prompt: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens
    attach: tuple[Callable[[], AbstractContextManager[object]], ...] = ()
    facts: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))
    """What the methods and the engine say about themselves; keys are `METRICS` names or free text."""
    kernels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Operation -> implementation that was chosen for it."""
    simulated: tuple[str, ...] = ()
    """Methods whose saving is simulated: quality counts, speed does not."""
    synthetic: str | None = None
    """What about the output is made up (which drafts are accepted), if anything: speed counts, quality
    does not."""
    held: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What methods keep from request to request (a history, a table); keys are their names."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Switch on everything in `attach` for the duration, in order; undo in reverse."""
        with ExitStack() as stack:
            for enter in self.attach:
                stack.enter_context(enter())
            yield

    def generate(self, request: Request) -> Iterator[Chunk]:
        """Decode `request` with everything attached."""
        with self.attached():
            yield from self.decode(self, request)
