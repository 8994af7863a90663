"""What an audit found, as one frozen document."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from compresskit.record import Stored
from compresskit.spec import Frozen, SamplingSpec

SCHEMA = 1
SHALLOW, DEEP = 3, 6
"""Tokens taken together, and where these hardly meet a draft."""
Word = Literal["lossless", "lossy", "inconclusive"]


class Asked(Frozen):
    """What to try, and which bias must not go unnoticed."""

    sampling: SamplingSpec = SamplingSpec(temperature=1.0)
    """How answers are drawn; at temperature 0 nothing is, and the greedy parts stand alone."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Rows decoded together; from two on their prompts differ in length."""
    draws: Annotated[int | None, Field(ge=1)] = None
    """Answers drawn; null draws as many as `detect` needs."""
    depth: Annotated[int | None, Field(ge=3, le=6)] = None
    """First tokens of an answer that are taken together. Three show what follows a rejection; more are
    for drafters that know nothing at first, and tell fewer tokens apart at each place. Null: three,
    and six where these hardly meet a draft."""
    prompts: Annotated[int, Field(ge=1)] = 16
    """Prompts of the greedy part."""
    prompt_tokens: Annotated[int, Field(ge=4)] = 12
    """Longest prompt, in tokens."""
    greedy_tokens: Annotated[int, Field(ge=2)] = 32
    """Tokens of each greedy answer."""
    detect: Annotated[float, Field(gt=0)] = 0.1
    """Chi-square divergence, sum of (r - p)²/p over the cells, that must not go unnoticed."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Chance of suspecting a correct loop. A suspicion is tried again on fresh draws, so a correct one
    is called lossy with at most 4 · alpha²."""
    power: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Chance of noticing a divergence of `detect`."""
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def window(self) -> int:
        """Tokens taken together, to begin with."""
        return self.depth or SHALLOW


class RuleCheck(Stored):
    """The acceptance rule on paper, in float64."""

    pairs: int
    """Pairs of p and q put through the one-token identity."""
    identity_error: float
    """Largest |probability that a token comes out - p|."""
    texts: int
    """Texts whose probability was added up over every draft and branch, chains and trees."""
    chain_error: float
    """Largest |probability of a text - product of p|, over chains."""
    tree_error: float
    """The same over one-hot trees."""
    bound: float


class Divergence(Stored):
    """Where one greedy answer leaves the plain one."""

    prompt: int
    token: int
    """Index of the first token that differs."""
    margin: float
    """Logit of plain decoding's first choice minus that of its second."""
    gap: float
    """Logit of plain decoding's token minus that of the one that came instead."""
    bound: float
    """Gap below which two tokens count as tied in this type."""
    kind: Literal["numeric_tie", "bug"]


class GreedyCheck(Stored):
    """Greedy answers beside those of plain decoding by the same step."""

    prompts: int
    new_tokens: int
    equal: int
    divergences: tuple[Divergence, ...] = ()
    drafted: int | None = None
    """Null where the loop does not tell."""
    accepted: int | None = None


class StopCheck(Stored):
    """Answers that must end at a stop token, or at a length, that lies inside a block."""

    answers: int
    inside: int | None
    """Answers whose last step had a draft; null where the loop does not tell."""
    wrong: tuple[str, ...] = ()
    """The first few that ended elsewhere."""


class SampledCheck(Stored):
    """Drawn answers against exact cells, over all prompts together."""

    prompts: tuple[tuple[int, ...], ...]
    depth: int
    """First tokens that were taken together."""
    draws: int
    cells: int
    """Cells with a probability, before rare ones were pooled."""
    chi_square: float
    degrees: int
    p: float | None
    """Null without degrees of freedom: the model is certain of every prompt."""
    total_variation: float
    """Half the summed |frequency - probability|, all cells."""
    noise: float
    """The total variation that a perfect loop would show on average with so many draws."""
    impossible: int
    """Draws of what has probability 0."""
    detectable: float | None
    """Smallest chi-square divergence that this test notices with the power asked for."""
    touched: int | None = None
    """Answers in whose first tokens a draft was judged; null where the loop does not tell."""
    drafted: int | None = None
    accepted: int | None = None


class Audit(Stored):
    """The verdict on one loop, and all it rests on."""

    schema_version: int = SCHEMA
    label: str
    """The stack, and the mode unless it is eager."""
    model: str
    device: str
    mode: str
    dtype: str
    digest: str | None = None
    """Of the run spec that was opened; null for a loop from elsewhere."""
    asked: Asked
    rule: RuleCheck | None = None
    greedy: GreedyCheck | None = None
    stops: StopCheck | None = None
    sampled: SampledCheck | None = None
    again: SampledCheck | None = None
    """A suspicion that was not yet conclusive, tried on fresh draws, four times as many."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    verdict: Word
    reasons: tuple[str, ...]

    def file_stem(self) -> str:
        """The label as a file name, with what tells audits of one stack apart."""
        stem = re.sub(r"[^A-Za-z0-9._=-]+", "-", self.label).strip("-")
        sampling = self.asked.sampling
        how = "greedy" if sampling.temperature == 0 else f"t{sampling.temperature:g}"
        for name, value in (("k", sampling.top_k), ("minp", sampling.min_p)):
            how += f"-{name}{value:g}" if value else ""
        how += f"-p{sampling.top_p:g}" if sampling.top_p < 1 else ""
        return f"{stem}-{how}-b{self.asked.batch}"

    def summary(self) -> dict[str, str | float | int | None]:
        """What a run's record keeps of it, as `facts["audit"]`."""
        test = self.again or self.sampled
        return {
            "verdict": self.verdict,
            "temperature": self.asked.sampling.temperature,
            "batch": self.asked.batch,
            "draws": test.draws if test else None,
            "p": test.p if test else None,
            "detectable": test.detectable if test else None,
            "reason": self.reasons[0],
        }
