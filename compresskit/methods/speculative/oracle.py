"""Drafts that are accepted at a set rate, whatever the model says.

    draft    x1  x2  x3  x4        each accepted with probability `rate`, until the first that is not
    verdict   +   +   -            x1 x2, and one token of the model's own

Passes, widths and caches are those of real speculation; only the verdict is drawn. So the speed
that any drafter of that rate could reach at most is measured without having the drafter.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from pydantic import Field, JsonValue, model_validator

from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._draft import NOTHING, Draft
from compresskit.methods.speculative._verify import Verdict
from compresskit.sampling import draw
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from compresskit.method import Context
    from compresskit.methods.speculative._draft import Drafter, Evidence
    from compresskit.methods.speculative._verify import Judge
    from compresskit.spec import SamplingSpec
    from compresskit.system import Request, System


class Certain(Draft):
    """A draft of which is known beforehand how many tokens will be accepted."""

    fate: int = 0

    def _replace(self, **changes: Any) -> Self:
        """Cut short, it is accepted as far as it goes."""
        changed = super()._replace(**changes)
        changed.fate = min(self.fate, len(changed.tokens))
        return changed


class Fates:
    """Drafts the prompt again, round and round, and draws how much of each draft is accepted.

    A row draws from a generator of its own, seeded by the request and its prompt: what becomes of it
    does not depend on the rows beside it.
    """

    wants_features = False

    def __init__(self, method: Oracle, request: Request) -> None:
        """Know no prompt yet."""
        self.draft_length, self.rate = method.draft, method.rate
        self.seed, self.stop = request.seed, frozenset(request.stop)
        self.prompts: list[list[int]] = []
        self.chance: list[random.Random] = []
        self.at: list[int] = []

    def observe(self, new: Sequence[Sequence[int]], evidence: Evidence | None = None) -> None:
        """Take the prompts, without what would end an answer; nothing else is looked at."""
        if self.prompts:
            self.at = [at + len(tokens) for at, tokens in zip(self.at, new, strict=True)]
            return
        self.prompts = [[token for token in row if token not in self.stop] for row in new]
        self.at = [0] * len(self.prompts)
        for row in new:
            digest = hashlib.sha256(repr((self.seed, list(row))).encode()).digest()
            self.chance.append(random.Random(digest))

    def draft(self, limits: Sequence[int]) -> list[Draft]:
        """As many tokens as allowed, of every row."""
        return [self._row(row, min(limit, self.draft_length)) for row, limit in enumerate(limits)]

    def _row(self, row: int, count: int) -> Draft:
        prompt = self.prompts[row]
        if count < 1 or not prompt:
            return NOTHING
        draft = Certain([prompt[(self.at[row] + i) % len(prompt)] for i in range(count)])
        hits = (self.chance[row].random() < self.rate for _ in range(count))
        draft.fate = sum(takewhile(bool, hits))
        return draft


def fulfil(
    logits: torch.Tensor,
    drafts: Sequence[Draft],
    sampling: SamplingSpec,
    generator: torch.Generator | None,
) -> list[Verdict]:
    """Accept what was drawn to be accepted; the last token is the model's. As `verify`."""
    fates = [draft.fate if isinstance(draft, Certain) else 0 for draft in drafts]
    last = draw(logits[list(range(len(fates))), fates], sampling, generator).tolist()
    return [
        Verdict([*draft.tokens[:fate], token], list(range(fate)))
        for draft, fate, token in zip(drafts, fates, last, strict=True)
    ]


@final
class Oracle(Speculative):
    """Accept each drafted token with a set probability: speed against acceptance, without a drafter.

    Paper: expected tokens per pass of Leviathan et al. 2022, arXiv 2211.17192, which
    this method makes true: (1 - rate^(draft + 1)) / (1 - rate).
    Differs: no drafter and no verification; the text means nothing and has no quality. Acceptance is
    independent from token to token, which that of real drafters is not.
    Cost: one forward pass over 1 + draft tokens instead of one. Drafting is free; add the cost of a
    drafter to compare with a real one.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"draft": 4, "rate": 0.7}

    rate: float = Field(0.8, ge=0, le=1)
    """Probability that a drafted token is accepted, if those before it are."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.accept != "exact":
            raise ValueError(
                f"accept: oracle accepts at its own rate, so {self.accept!r} says nothing; leave it out"
            )
        if self.length != "fixed":
            raise ValueError(
                "length: what is not drafted has no fate, so an adaptive length would learn nothing from "
                "oracle; set draft instead"
            )
        return self

    def effects(self) -> Effects:
        """As all speculation, but the answer is not the model's, which need not be trained."""
        usual = super().effects()
        return usual.model_copy(
            update={
                "requires": usual.requires - {Trait.TRAINED},
                "removes": usual.removes | {Trait.LOSSLESS},
            }
        )

    def prepare(self, system: System, ctx: Context) -> System:
        """Say that the output is made up."""
        before = [system.synthetic] if system.synthetic else []
        return replace(system, synthetic=", ".join([*before, "synthetic acceptance"]))

    def drafter(self, system: System, request: Request) -> Drafter:
        """Fresh fates for the rows of `request`."""
        return Fates(self, request)

    def judge(self) -> Judge:
        """The rule that looks at nothing but the fates."""
        return fulfil
