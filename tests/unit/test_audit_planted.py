"""The audit finds what breaks speculative loops in practice, and leaves sound ones alone.

Every fault is planted in our own loop by a small wrapper. The target is a random model over eight
words; the drafter draws from a table, so that what it draws from and what it says it drew from can
be told apart.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compresskit.audit.answer import loop
from compresskit.audit.conduct import conduct, laws
from compresskit.audit.document import Asked
from compresskit.methods.speculative import _verify
from compresskit.methods.speculative._draft import NOTHING, Draft, EachRow
from compresskit.methods.speculative._loop import speculate
from compresskit.methods.speculative._verify import Verdict, verify
from compresskit.sampling import generator_for, probabilities
from compresskit.spec import SamplingSpec

V = 8
PLAIN = SamplingSpec(temperature=1.0)
HOT = SamplingSpec(temperature=1.0, top_k=2)
NUCLEUS = SamplingSpec(temperature=1.0, top_p=0.8)


class Table:
    """Drafts two words, each drawn by the word before it."""

    def __init__(self, request, row, table, *, draws=None, says=None, drops=0.0, noise=1.0):
        """`table`: logits `[V, V]` of the next word, made worse by `noise`; `draws` and `says` make
        of a row what is drawn from and what is handed over."""
        self.sampling = request.sampling
        self.dice = generator_for(1000 * request.seed + row, torch.device("cpu"), self.sampling)
        self.logits = table + noise * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
        self.draws, self.says, self.drops = draws or probabilities, says or probabilities, drops

    def observe(self, tokens):
        if tokens:
            self.newest = tokens[-1]

    def draft(self, limit):
        at, tokens, q = self.newest, [], []
        greedy = self.sampling.temperature == 0
        for _ in range(min(limit, 2)):
            logits = self.logits[at]
            if greedy:
                at = int(logits.argmax())
            else:
                at = int(
                    torch.multinomial(self.draws(logits, self.sampling), 1, generator=self.dice)
                )
                said = self.says(logits, self.sampling)
                if said[at] < self.drops:
                    break
                q.append(said)
            tokens.append(at)
        if not tokens:
            return NOTHING
        return Draft(tokens, None if greedy else torch.stack(q))


def unfiltered(logits, sampling):
    return logits.softmax(-1)


def colder(logits, sampling):
    return (logits / 0.5).softmax(-1)


def arg_max(logits, sampling):
    return torch.eye(V)[logits.argmax()]


@pytest.fixture(scope="module")
def plain(lab):
    return lab.system("llama", vocabulary=V)


@pytest.fixture(scope="module")
def prompts(lab):
    return [
        lab.prompt(6, vocabulary=V, seed=4)[0].tolist(),
        lab.prompt(4, vocabulary=V)[0].tolist(),
    ]


@pytest.fixture(scope="module")
def table(plain, prompts):
    """What the model says after the prompt and one word, roughly: half of it is accepted."""
    texts = torch.tensor([[*prompts[0], word] for word in range(V)])
    with torch.inference_mode():
        return plain.step(texts, plain.new_cache(0))[:, -1]


@pytest.fixture(scope="module")
def audit(plain, prompts, table):
    """Audit the loop with this drafter and judge; cells are shared."""
    known = {}

    def audited(*, sampling=PLAIN, batch=4, judge=verify, **drafter):
        def decode(system, request):
            rows = [Table(request, row, table, **drafter) for row in range(len(request.tokens))]
            return speculate(system, request, EachRow(rows), judge)

        asked = Asked(sampling=sampling, batch=batch, greedy_tokens=20)
        key = (sampling, batch > 1)
        if key not in known:
            known[key] = laws(plain, asked, prompts[: 1 + (batch > 1)])
        return conduct(
            loop(replace(plain, decode=decode)),
            plain,
            asked,
            label="planted",
            model="random",
            law=lambda asked: known[key],
            prompts=[*prompts, *([word] * 3 for word in range(2))],
            rule=False,
        )

    return audited


def found_by(audit) -> set[str]:
    return {reason.partition(":")[0] for reason in audit.reasons}


# Sound loops


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sampling", [PLAIN, NUCLEUS], ids=["plain", "nucleus"])
def test_the_loop_as_it_is_passes(audit, sampling, batch):
    found = audit(sampling=sampling, batch=batch)
    assert found.verdict == "lossless", found.reasons
    assert found.sampled.detectable <= 0.1
    assert found.sampled.accepted > 100
    assert found.sampled.drafted - found.sampled.accepted > 100
    assert found.greedy.accepted > 0


def test_drafts_from_a_wild_distribution_pass_if_they_say_so(audit):
    """Not an error: q may be anything, as long as it is what was drawn from."""
    found = audit(sampling=NUCLEUS, draws=colder, says=colder)
    assert found.verdict == "lossless", found.reasons


def strict(logits, drafts, sampling, generator):
    """Say a token of the model's own at each place, and go on while it is the draft."""
    if sampling.temperature == 0:
        return verify(logits, drafts, sampling, generator)
    p = probabilities(logits, sampling)
    said = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2]).tolist()
    return [_verify.walk(row, draft) for row, draft in zip(said, drafts, strict=True)]


def without_bonus(logits, drafts, sampling, generator):
    """Wasteful, not wrong: a draft accepted whole ends the step, and its last token is fed again."""
    return [
        Verdict(v.tokens[:-1], v.path[:-1]) if v.path and v.accepted == len(d.tokens) else v
        for v, d in zip(verify(logits, drafts, sampling, generator), drafts, strict=True)
    ]


@pytest.mark.parametrize("judge", [strict, without_bonus])
def test_other_rules_that_are_lossless_pass(audit, judge):
    found = audit(judge=judge)
    assert found.verdict == "lossless", found.reasons


# Faults of drafters: greedy output stays right, only the law of drawn answers tells


@pytest.mark.parametrize(
    "fault",
    [
        {"says": colder},
        {"draws": arg_max},
        {"drops": 0.3, "noise": 0.0},
        {"says": unfiltered, "sampling": SamplingSpec(temperature=1.0, top_k=2)},
        {"draws": unfiltered, "sampling": SamplingSpec(temperature=1.0, top_k=2)},
    ],
    ids=[
        "q of another temperature",
        "arg max drafted, its softmax handed over",
        "unlikely token dropped after it was drawn",
        "q before the filter, drawn after it",
        "q after the filter, drawn before it",
    ],
)
def test_a_q_that_was_not_drawn_from_is_found(audit, fault):
    found = audit(**fault)
    assert found.greedy.equal == found.greedy.prompts
    assert found.verdict == "lossy"
    assert found_by(found) == {"sampled"}


# Faults of the rule


def keep_rejected(p, q, token):
    return p


def wrong_neighbour(p, q, token):
    left = p.clone()
    left[(token + 1) % V] = 0
    return left / left.sum()


_judge = _verify.judge


def judge_at_next_place(p, draft, uniform):
    """The residual is taken from the place after the rejected one."""
    accepted, after = _judge(p, draft, uniform)
    if accepted < len(draft.tokens):
        q = None if draft.q is None else draft.q[accepted]
        after = _verify.residual(p[accepted + 1], q, draft.tokens[accepted])
    return accepted, after


def no_top_p(logits, sampling):
    return probabilities(logits, sampling.model_copy(update={"top_p": 1.0}))


@pytest.mark.parametrize(
    ("name", "wrong", "sampling"),
    [
        ("residual", keep_rejected, PLAIN),
        ("residual", wrong_neighbour, PLAIN),
        ("judge", judge_at_next_place, PLAIN),
        ("probabilities", no_top_p, NUCLEUS),
    ],
    ids=[
        "rejected token used again",
        "residual off by one",
        "residual a place late",
        "top-p on q alone",
    ],
)
def test_a_wrong_rule_is_found(audit, name, wrong, sampling, monkeypatch):
    monkeypatch.setattr(_verify, name, wrong)
    # A drafter that is often wrong: the rule of what is said instead matters.
    found = audit(sampling=sampling, noise=2.0)
    assert found.verdict == "lossy"
    assert found_by(found) == {"sampled"}


# Three tokens that hardly meet a draft


class Blank(Table):
    """Drafts nothing before it has heard four words after the prompt."""

    def observe(self, tokens):
        self.heard = getattr(self, "heard", -1) + (len(tokens) if hasattr(self, "newest") else 1)
        super().observe(tokens)

    def draft(self, limit):
        return super().draft(limit) if self.heard >= 4 else NOTHING


@pytest.mark.parametrize(("says", "word"), [(None, "lossless"), (colder, "lossy")])
def test_a_drafter_that_begins_blank_is_looked_at_later(plain, prompts, table, says, word):
    def decode(system, request):
        rows = [Blank(request, row, table, says=says) for row in range(len(request.tokens))]
        return speculate(system, request, EachRow(rows))

    def audited(depth):
        return conduct(
            loop(replace(plain, decode=decode)),
            plain,
            Asked(sampling=HOT, batch=4, depth=depth, draws=2000),
            label="blank",
            model="random",
            law=lambda asked: laws(plain, asked, prompts),
            rule=False,
            identity=False,
        )

    found = audited(None)
    assert (found.verdict, found.sampled.depth) == (word, 6), found.reasons
    assert any("6 were taken together" in note for note in found.notes)
    shallow = audited(3)
    assert (shallow.verdict, shallow.sampled.touched) == ("inconclusive", 0)
