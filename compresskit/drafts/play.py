"""Play a trace: the speculative loop as it is, on a model that can only say what was recorded.

    block   c  d  x          at places 7, 8, 9 of the recorded text
    logits  d  e  f          what the text has at 8, 9, 10: certain, whatever was asked

After a wrong draft token the recorded model goes on as if it had been right; the loop rejects that
token and never looks at what comes after. So the counts are those of the real model, exactly.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from compresskit.decode import autoregressive
from compresskit.device import resolve
from compresskit.drafts.counts import Steps
from compresskit.errors import Conflict, UsageError
from compresskit.method import Context
from compresskit.methods.speculative._base import Speculative
from compresskit.spec import SamplingSpec
from compresskit.system import Request, System

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.drafts.trace import Entry
    from compresskit.method import AbstractMethod, Load, Placed

UNBOUNDED = 1 << 40
"""Context of a recorded model: whatever was recorded did fit."""


def check(placed: Placed) -> Speculative:
    """The method, if a trace says which of its drafts are accepted.

    Raises:
        UsageError: it drafts nothing, drafts from more than text, or accepts by another rule.
    """
    method: AbstractMethod = placed.method
    if not isinstance(method, Speculative):
        raise UsageError(
            f"{placed.name} drafts nothing. Replay a method of the family speculative."
        )
    if not method.replayable:
        raise UsageError(
            f"{placed.name} needs what a trace does not hold (the model's logits, a draft model, a "
            "verdict of its own), so it cannot be replayed. Run it with the model: compresskit run."
        )
    if method.accept != "exact":
        raise UsageError(
            f"{placed.name}: accept={method.accept} asks the model how likely a draft is, which a "
            "trace does not hold. Leave accept out."
        )
    return method


def play(method: Speculative, entries: Sequence[Entry]) -> list[Steps]:
    """Answer all requests in their order, one at a time, with one applied `method`.

    Raises:
        UsageError: the method wants to try the model's step first, which a recording does not have.
    """
    codes = {
        token: code
        for code, token in enumerate(
            sorted({token for entry in entries for token in (*entry.prompt, *entry.answer)})
        )
    }
    recording = Recording(len(codes))
    system = method.apply(recording.system(), _nothing_to_ask())
    if system.settle:
        raise UsageError(
            f"{type(method).__name__} times the model's step before it drafts, and a recording takes no "
            "time. Replay it with costs that are given, not probed."
        )
    return [_one(system, recording, entry, codes) for entry in entries]


def _one(system: System, recording: Recording, entry: Entry, codes: dict[int, int]) -> Steps:
    # Drafters compare tokens and nothing else, so any renaming will do; a small vocabulary is fast.
    prompt, answer = ([codes[token] for token in part] for part in (entry.prompt, entry.answer))
    recording.text = torch.tensor([*prompt, *answer, 0])
    request = Request(
        tokens=torch.tensor([prompt]),
        max_new_tokens=entry.max_new_tokens,
        sampling=SamplingSpec(),
        stop=(answer[-1],) if len(answer) < entry.max_new_tokens else (),
    )
    chunks = list(system.generate(request))
    said = [token for chunk in chunks for token in chunk.tokens[0].tolist()]
    if said != answer:
        raise Conflict("the recorded answer was not given back: its drafter is not lossless.")
    # The first token comes with the prompt; every later chunk is a pass of its own.
    return Steps(len(answer), tuple(drafts for chunk in chunks[1:] for drafts in chunk.drafts))


class Recording:
    """A model that says the next token of `text` with certainty, whatever it is shown."""

    def __init__(self, vocabulary: int) -> None:
        """Have no text yet."""
        self.vocabulary = vocabulary
        self.text = torch.zeros(1, dtype=torch.long)

    def system(self) -> System:
        """A system around it."""
        return System(
            model=None,
            tokenizer=SimpleNamespace(eos_ids=(), bos_id=None, has_chat_template=False),
            device=resolve("cpu"),
            step=self.step,
            new_cache=lambda capacity: Places(),
            decode=autoregressive,
            context=UNBOUNDED,
        )

    def step(
        self,
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits `[1, keep, V]`: one-hot at what the text has after each place."""
        cache.length += tokens.shape[1]
        end = cache.length + 1
        after = self.text[end - (keep or tokens.shape[1]) : end]
        return torch.nn.functional.one_hot(after, self.vocabulary).float().unsqueeze(0)


class Places:
    """A cache that only counts; it is its own and only layer."""

    is_croppable = True

    def __init__(self) -> None:
        """Have seen nothing."""
        self.length = 0
        self.layers = [self]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; the argument is zero or negative, as in transformers."""
        self.length += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Nothing is ever dropped, so nothing need be recorded."""


def _nothing_to_ask() -> Context:
    def refuse(*asked: object) -> NoReturn:
        raise Conflict("a replay has no model to load and no text to calibrate on.")

    return Context(load=cast("Load", refuse), calibration=refuse, seed=0, dtype="float32")
