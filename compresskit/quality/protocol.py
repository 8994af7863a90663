"""Which tokens are scored, and through which forward passes.

window    disjoint windows, every token of a window is predicted from those before it
          ids   0 | 1 2 3 4 | 5 6 7 8 | ...       (window = 4, no BOS)
          in    0   1 2 3                         predicts 1 2 3 4
                        4   5 6 7                 predicts 5 6 7 8
split     prefill, then one token at a time, so that a compressed cache is really read
          in    0 1 2 3 | 4 5 6                   (prefill = 4, continuation = 3)
          predicts        5 6 7                   4 is predicted by the prefill itself, where
                                                  nothing is compressed yet: not scored

If the tokenizer puts a BOS token in front of texts, each window starts with one: under `window`
it takes the place of the token before the window, under `split` that of the first prefill token.

Under `window` most cache methods change nothing, since they compress after the forward pass: that
is what `split` is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compresskit import text as texts
from compresskit.errors import InputError, SpecError

if TYPE_CHECKING:
    from compresskit.spec import QualitySpec
    from compresskit.system import System
    from compresskit.text import Text

LARGEST_BATCH = 8
"""Rows that go through a model together: more would let memory grow with the scored tokens."""

_UNIT = "nats/token"
_SHORT = 12


class Cut(NamedTuple):
    """One forward pass: inputs `start:stop` of a row, and whether its predictions are scored."""

    start: int
    stop: int
    scored: bool


@dataclass(frozen=True)
class Plan:
    """The rows to score and how to walk through them."""

    protocol_id: str
    text: Text
    text_tokens: int
    rows: tuple[tuple[int, ...], ...]
    """Windows of equal length; input position i predicts token i + 1."""
    first: int
    """Input position of the first scored prediction."""
    step: int | None
    """Tokens per scored forward pass; None: as many as memory allows."""
    batch: int
    """Windows that go through the model together."""

    @property
    def inputs(self) -> int:
        """Input tokens per row: the last token is only a target."""
        return len(self.rows[0]) - 1

    @property
    def scored_per_row(self) -> int:
        """Scored tokens per row."""
        return self.inputs - self.first

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of all rows."""
        return self.scored_per_row * len(self.rows)

    def scored_bytes(self, system: System) -> int:
        """UTF-8 bytes of the scored tokens."""
        scored = [list(row[self.first + 1 :]) for row in self.rows]
        if self.first == 0:
            # Windows follow each other: decoding them at once keeps characters that span two whole.
            scored = [[token for row in scored for token in row]]
        return sum(len(system.tokenizer.decode(ids).encode()) for ids in scored)

    def cuts(self, largest: int) -> list[Cut]:
        """Forward passes of one row, none of more than `largest` scored tokens."""
        size = min(self.step or largest, largest)
        scored = [
            Cut(start, min(start + size, self.inputs), True)
            for start in range(self.first, self.inputs, size)
        ]
        return [Cut(0, self.first, False), *scored] if self.first else scored


def comparable(a: str, b: str) -> bool:
    """Tell whether numbers under two protocol ids may be subtracted: only if the ids are equal."""
    return a == b


def plan(
    system: System, text: Text, spec: QualitySpec, *, cache_changed: bool, batch_allowed: bool
) -> Plan:
    """Choose the rows of `text` that `spec` asks for.

    Raises:
        InputError: the text is too short for a single window.
        SpecError: a window is longer than the model's context.
    """
    ids = tuple(system.tokenizer.encode(text.content, special=False))
    bos = texts.bos(system.tokenizer)
    split = spec.protocol == "split" or (spec.protocol == "auto" and cache_changed)
    inputs = spec.prefill + spec.continuation if split else min(spec.window, spec.tokens)
    if inputs > system.context:
        raise SpecError(
            f"quality: a window of {inputs} tokens is more than the model's context of "
            f"{system.context}. Lower {'prefill or continuation' if split else 'window'}."
        )
    build = _split if split else _window
    rows, shape = build(ids, spec, bos)
    return Plan(
        protocol_id="/".join(
            (
                shape,
                "bos=none" if bos is None else f"bos={bos}",
                f"text=sha256:{text.sha256[:_SHORT]}",
                f"ids=sha256:{texts.ids_sha256(rows)[:_SHORT]}",
                _UNIT,
            )
        ),
        text=text,
        text_tokens=len(ids),
        rows=rows,
        first=spec.prefill if split else 0,
        step=1 if split else None,
        batch=min(len(rows), LARGEST_BATCH) if split and batch_allowed else 1,
    )


Rows = tuple[tuple[int, ...], ...]


def _window(ids: tuple[int, ...], spec: QualitySpec, bos: int | None) -> tuple[Rows, str]:
    """Disjoint windows from the start of the text; a shorter tail is dropped."""
    stream = ids if bos is None else (bos, *ids)
    available = min(spec.tokens, len(stream) - 1)
    width = min(spec.window, available)
    if width < 1:
        raise InputError("the evaluation text is a single token: nothing can be predicted from it.")
    rows = [stream[start : start + width + 1] for start in range(0, available - width + 1, width)]
    if bos is not None:
        rows = [(bos, *row[1:]) for row in rows]
    return tuple(rows), f"window-{width}/disjoint/{width * len(rows)}"


def _split(ids: tuple[int, ...], spec: QualitySpec, bos: int | None) -> tuple[Rows, str]:
    """Disjoint windows spread evenly over the text, first and last at its ends."""
    prefix = () if bos is None else (bos,)
    # One token between prefill and scored tokens, see the module's diagram.
    width = spec.prefill + 1 + spec.continuation - len(prefix)
    count = min(spec.windows, len(ids) // width)
    if count == 0:
        raise InputError(
            f"the evaluation text has {len(ids)} tokens; one window of prefill {spec.prefill} "
            f"and continuation {spec.continuation} takes {width}. Use a longer text or a shorter "
            "window."
        )
    starts = [index * (len(ids) - width) // max(1, count - 1) for index in range(count)]
    rows = tuple((*prefix, *ids[start : start + width]) for start in starts)
    return rows, f"split-{spec.prefill}+{spec.continuation}x{count}/spread/chunk-1"


def openings(system: System, plan: Plan, spec: QualitySpec) -> Rows:
    """Prompts for greedy continuations: of equal length, disjoint, spread evenly over the text.

    They are as long as the prefill of the split protocol, or as the text and the context allow.

    Raises:
        SpecError: the model's context has no room for a prompt.
    """
    count = spec.greedy_prompts
    if count == 0:
        return ()
    ids = system.tokenizer.encode(plan.text.content, special=False)
    bos = texts.bos(system.tokenizer)
    prefix = () if bos is None else (bos,)
    room = system.context - spec.greedy_tokens
    width = min(spec.prefill, room, len(ids) // count + len(prefix)) - len(prefix)
    if width < 1:
        raise SpecError(
            f"quality: {count} greedy prompts with {spec.greedy_tokens} new tokens each do not fit "
            f"a context of {system.context} and a text of {len(ids)} tokens. Lower greedy_prompts "
            "or greedy_tokens."
        )
    starts = [index * (len(ids) - width) // max(1, count - 1) for index in range(count)]
    return tuple((*prefix, *ids[start : start + width]) for start in starts)
