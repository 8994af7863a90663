"""Adaptive draft length: what it learns, what it chooses, and that the output stays the model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from compresskit.methods.speculative._draft import Draft, EachRow
from compresskit.methods.speculative._length import LONGEST_PAUSE, Adaptive, Rates
from compresskit.methods.speculative._loop import speculate
from compresskit.methods.speculative.ngram import NGram
from compresskit.sampling import probabilities
from compresskit.spec import SamplingSpec
from compresskit.stats.speculation import FLAT, Costs, best_length

COSTLY = Costs(passes=((1, 1.0), (2, 1.05)), draft=0.2)
STEEP = Costs(passes=((1, 1.0), (2, 1.6), (9, 1.7)))


class Scripted:
    """Drafts the known answer, right up to `right` tokens deep in every step, and counts its work."""

    wants_features = False

    def __init__(self, answer, *, right, size=8, vocabulary=300, match=0):
        self.answer, self.right, self.size, self.match = answer, right, size, match
        self.vocabulary, self.at, self.asked, self.drafted = vocabulary, None, 0, 0

    def observe(self, new, evidence=None):
        self.at = 0 if self.at is None else self.at + len(new[0])

    def draft(self, limits):
        size = max(min(self.size, limits[0], len(self.answer) - self.at), 0)
        self.asked += size > 0
        self.drafted += size
        tokens = self.answer[self.at : self.at + size]
        wrong = [(token + 1) % self.vocabulary for token in tokens[self.right :]]
        return [Draft(tokens[: self.right] + wrong, match=self.match)]


def decoded(lab, right, costs, new=200):
    """Chunks of a request whose drafts are right that far, and the drafter."""
    system = replace(lab.system("llama"), context=1024)
    request = lab.request(lab.prompt(4), new)
    answer = lab.rows(system.generate(request))[0]
    drafter = Scripted(answer, right=right)
    chunks = list(speculate(system, request, Adaptive(drafter, costs)))
    assert lab.rows(chunks) == [answer]
    return chunks, drafter


# What it settles on


@pytest.mark.parametrize("costs", [FLAT, STEEP, COSTLY], ids=["flat", "steep", "costly"])
def test_perfect_drafts_are_taken_in_full_length(lab, costs):
    chunks, _ = decoded(lab, 8, costs)
    lengths = [chunk.drafted for chunk in chunks[1:-1]]
    assert lengths[-8:] == [8] * 8
    assert sum(lengths) > 0.8 * 8 * len(lengths)


@pytest.mark.parametrize("costs", [FLAT, STEEP], ids=["flat", "steep"])
def test_drafts_that_are_never_right_are_held_back(lab, costs):
    chunks, _ = decoded(lab, 0, costs)
    lengths = [chunk.drafted for chunk in chunks]
    assert set(lengths[60:]) == {0}
    # In passes: what learning has cost, of two hundred. Full drafts all along would cost 32 and 140.
    assert sum(costs.verify(length + 1) - 1 for length in lengths) < 2.5


def test_a_costly_drafter_that_is_never_right_is_hardly_asked(lab):
    chunks, drafter = decoded(lab, 0, COSTLY)
    assert len(chunks) == 200
    # 4, 8, 16, 32 and 64 steps apart: nine tokens drafted in two hundred steps.
    assert drafter.drafted <= 12
    assert drafter.asked <= 12


def test_a_costly_drafter_that_gets_better_is_found_out(lab):
    system = replace(lab.system("llama"), context=1024)
    request = lab.request(lab.prompt(4), 240)
    answer = lab.rows(system.generate(request))[0]
    drafter = Scripted(answer, right=0)
    adaptive = Adaptive(drafter, COSTLY)
    lengths = []
    for chunk in speculate(system, request, adaptive):
        lengths.append(chunk.drafted)
        if len(lengths) == 40:
            assert lengths[-1] == 0 or lengths[-2] == 0
            drafter.right = 8
    assert max(lengths[40:]) == 8
    assert len(lengths) < 240 - LONGEST_PAUSE


def test_drafts_that_are_right_to_a_depth_are_cut_there(lab):
    # A further token costs a tenth of a step, so the third, which is always wrong, never pays.
    dear = Costs(passes=((1, 1.0), (2, 1.1)))
    chunks, _ = decoded(lab, 2, dear)
    assert [chunk.drafted for chunk in chunks[30:-2]] == [2] * len(chunks[30:-2])


def test_what_was_held_back_teaches_without_a_pass(lab):
    """Everything is held back at first; free evidence turns that round, no draft was verified for it."""
    system = lab.system("llama")
    request = lab.request(lab.prompt(4), 120)
    answer = lab.rows(system.generate(request))[0]
    never = Costs(passes=((1, 1.0), (2, 1.6), (9, 1.6)))
    adaptive = Adaptive(Scripted(answer, right=8, size=1), never)
    chunks = list(speculate(system, request, adaptive))
    # A single token has to be right in 6 of 10 cases; half is what nothing is known with.
    first = next(place for place, chunk in enumerate(chunks) if chunk.drafted)
    assert first > 1
    assert all(chunk.drafted == 1 for chunk in chunks[first:-1])
    assert lab.rows(chunks) == [answer]


def test_long_matches_are_judged_apart_from_short_ones():
    rates = Rates()
    for _ in range(20):
        rates.note(1, 0, False)
        rates.note(5, 0, True)
    assert rates.of(1, 1)[0] < 0.1
    assert rates.of(5, 1)[0] > 0.9
    # A kind that never occurred is judged by all of them.
    assert 0.3 < rates.of(3, 1)[0] < 0.7
    assert best_length(rates.of(1, 1), STEEP) == 0
    assert best_length(rates.of(5, 1), STEEP) == 1


def test_a_place_never_reached_leans_on_the_one_before():
    rates = Rates()
    for _ in range(50):
        rates.note(0, 0, True)
    assert rates.of(0, 3)[2] == rates.of(0, 1)[0] > 0.95


def test_old_evidence_fades():
    rates = Rates()
    for right in [True] * 300 + [False] * 100:
        rates.note(0, 0, right)
    assert rates.of(0, 1)[0] < 0.2


def test_a_tree_is_cut_at_a_depth_with_all_its_branches():
    tree = Draft([7, 8, 9, 10], parents=[-1, -1, 1, 2], match=0)
    assert tree.down_to(1) == Draft([7, 8], parents=[-1, -1])
    assert tree.down_to(2) == Draft([7, 8, 9], parents=[-1, -1, 1])
    # Written out of order: the parents are renumbered.
    mixed = Draft([7, 70, 8, 80], parents=[-1, 0, -1, 2])
    assert mixed.down_to(1) == Draft([7, 8], parents=[-1, -1])
    chain = Draft([1, 2, 3], torch.eye(3))
    assert chain.down_to(2).tokens == [1, 2]
    assert torch.equal(chain.down_to(2).q, torch.eye(3)[:2])
    assert chain.down_to(0).tokens == []


def test_a_tree_that_holds_what_came_out_was_right(lab):
    class Branches(Scripted):
        def draft(self, limits):
            (chain,) = super().draft(limits)
            if len(chain.tokens) < 2:
                return [Draft([])]
            wrong = (chain.tokens[0] + 1) % self.vocabulary
            return [Draft([wrong, chain.tokens[0], chain.tokens[1]], parents=[-1, -1, 1])]

    system = lab.system("llama")
    request = lab.request(lab.prompt(4), 60)
    answer = lab.rows(system.generate(request))[0]
    adaptive = Adaptive(Branches(answer, right=8), FLAT)
    chunks = list(speculate(system, request, adaptive))
    assert lab.rows(chunks) == [answer]
    assert adaptive.rates.of(0, 2)[1] > 0.9
    assert sum(chunk.accepted for chunk in chunks) >= 2 * (len(chunks) - 3)


# As a method


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_greedy_tokens_are_those_of_plain_decoding(lab, architecture):
    system = lab.system(architecture)
    method = NGram(length="adaptive", costs="flat").apply(system, None)
    request = lab.request(lab.prompt(8).repeat(1, 3), 60)
    assert lab.rows(method.generate(request)) == lab.rows(system.generate(request))


def test_rows_of_a_batch_are_judged_together_and_stay_their_own(lab):
    system = lab.system("llama")
    method = NGram(length="adaptive", costs="flat").apply(system, None)
    tokens = torch.cat([lab.prompt(8, seed=seed).repeat(1, 2) for seed in range(3)])
    request = lab.request(tokens, 40)
    assert lab.rows(method.generate(request)) == lab.rows(system.generate(request))


def test_probed_costs_are_asked_for_once_the_step_is_finished(lab):
    asked = []

    class Probe:
        def step_cost(self, system):
            list(system.generate(lab.request(lab.prompt(4), 3)))
            asked.append(system.widths)
            return STEEP

    system = NGram(length="adaptive", draft=4).apply(lab.system("llama"), Probe())
    assert asked == []
    for settle in system.settle:
        system = settle(system)
    assert asked == [(1, 5)]
    assert system.decode.keywords == {"costs": STEEP}


def test_a_fixed_length_asks_for_nothing_and_keeps_its_digest(lab):
    assert NGram().apply(lab.system("llama"), None).settle == ()
    assert not {"length", "costs"} & set(NGram().model_dump(mode="json"))
    assert NGram(length="adaptive").model_dump(mode="json")["length"] == "adaptive"


def test_the_drafter_tells_what_it_holds_when_the_request_ends(lab):
    told = {}
    for method in (NGram(), NGram(length="adaptive", costs="flat")):
        system = method.apply(lab.system("llama"), None)
        listening = replace(system, tell=told.__setitem__)
        sizes = []
        for new in (8, 80):
            list(listening.generate(lab.request(lab.prompt(8), new)))
            sizes.append(told.pop("drafter_bytes"))
        assert 1000 < sizes[0] < sizes[1]


def test_a_drafter_that_does_not_tell_leaves_the_size_unknown(lab):
    class Silent:
        def observe(self, tokens):
            pass

        def draft(self, limit):
            return Draft([])

    assert EachRow([Silent()]).memory_bytes() is None
    assert Adaptive(EachRow([Silent()])).memory_bytes() is None


# Sampling

V, LENGTH, DRAWS = 5, 3, 800
PLAIN = SamplingSpec(temperature=1.0)
EDGE = Costs(passes=((1, 1.0), (2, 1.45), (3, 1.8)))
"""A draft about which nothing is known barely pays; after one that was wrong it does not."""


class Drawn:
    """Draws two tokens from a law of its own; `keep` decides by the tokens what is handed over."""

    wants_features = False
    # Sure of the model's own favourite, surer than the model is: where the bias is largest.
    law = torch.tensor([0.03, 0.55, 0.25, 0.1, 0.07])

    def __init__(self, seed, keep=len):
        self.keep, self.generator = keep, torch.Generator().manual_seed(seed + 12345)

    def observe(self, new, evidence=None):
        pass

    def draft(self, limits):
        size = max(min(limits[0], 2), 0)
        if not size:
            return [Draft([])]
        tokens = torch.multinomial(
            self.law, size, replacement=True, generator=self.generator
        ).tolist()
        return [Draft(tokens, self.law.expand(size, V)).down_to(self.keep(tokens))]


@pytest.fixture(scope="module")
def system(lab):
    return lab.system("llama", vocabulary=V)


@torch.inference_mode()
def p_value(lab, system, make):
    """Chi-square of the joint of `LENGTH` tokens over `DRAWS` answers; rare answers are pooled."""
    prompt = lab.prompt(6, vocabulary=V, seed=4)
    answers = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)
    texts = torch.cat((prompt.expand(len(answers), -1), answers), dim=-1)
    logits = system.step(texts, system.new_cache(0), keep=LENGTH + 1)[:, :-1]
    exact = probabilities(logits, PLAIN).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    expected = exact.double().prod(-1) * DRAWS
    counts = torch.zeros(V**LENGTH, dtype=torch.double)
    lengths = set()
    for seed in range(DRAWS):
        request = lab.request(prompt, LENGTH, sampling=PLAIN, seed=seed)
        chunks = list(speculate(system, request, make(seed)))
        answer = torch.tensor(lab.rows(chunks)[0])
        counts[(answer * torch.tensor([V**2, V, 1])).sum()] += 1
        lengths.add(tuple(chunk.drafted for chunk in chunks))
    rare = expected < 5
    observed, wanted = (
        torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts, expected)
    )
    return stats.chisquare(
        observed.numpy(), wanted.numpy() * DRAWS / wanted.sum().item()
    ).pvalue, lengths


@pytest.mark.parametrize("costs", [EDGE, replace(EDGE, draft=0.021)], ids=["cheap", "costly"])
def test_a_length_chosen_by_the_past_leaves_the_distribution(lab, system, costs):
    found, lengths = p_value(lab, system, lambda seed: Adaptive(Drawn(seed), costs))
    assert found > 1e-3
    # The choice did differ from text to text, else this would prove nothing.
    assert len(lengths) > 1


def test_a_length_chosen_by_the_drafted_tokens_is_biased(lab, system):
    """The negative control: to drop the token that is thought unlikely is to prefer the others."""

    def confident(tokens):
        return next((i for i, token in enumerate(tokens) if Drawn.law[token] < 0.5), len(tokens))

    found, _ = p_value(lab, system, lambda seed: Drawn(seed, confident))
    assert found < 1e-6


def test_dropping_an_unlikely_token_is_biased_by_hand():
    """Two tokens, p = (.5, .5), q = (.6, .4): without the second draft the first comes out in .7."""
    from compresskit.methods.speculative._verify import accept_probability, residual

    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.6, 0.4]).double()
    accept = [float(accept_probability(p[None], q[None], torch.tensor([x]))) for x in (0, 1)]
    kept = torch.zeros(2).double()
    kept[0] = q[0] * accept[0]
    whole = kept.clone()
    kept += q[0] * (1 - accept[0]) * residual(p, q, 0)
    whole = kept.clone()
    whole[1] += q[1] * accept[1]
    assert whole.tolist() == pytest.approx([0.5, 0.5])
    # The second token is dropped whenever it was drawn, and the model draws afresh.
    assert (kept + q[1] * p).tolist() == pytest.approx([0.7, 0.3])
