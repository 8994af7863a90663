"""Power, cells, the statistic, greedy comparison, stops and the verdict, each by itself."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats

from compresskit.audit import power
from compresskit.audit.answer import Answered, loop
from compresskit.audit.cells import OTHER, Cells, exact
from compresskit.audit.document import Asked, GreedyCheck, RuleCheck, SampledCheck, StopCheck
from compresskit.audit.greedy import greedy
from compresskit.audit.sampled import RARE, degrees, enough, pearson
from compresskit.audit.stops import stops
from compresskit.audit.verdict import convincing, suspicious, verdict
from compresskit.sampling import probabilities
from compresskit.spec import SamplingSpec

V = 8

# Power


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(56, (622, 2072, 6216, 62160)), (7, (319, 1061, 3183, 31826))],
)
def test_draws_for_a_divergence(freedom, table):
    """The table of section 7 of the reference: alpha 1e-3, power 0.9."""
    found = [power.draws_for(freedom, divergence) for divergence in (0.1, 0.03, 0.01, 0.001)]
    assert found == [pytest.approx(draws, abs=1, rel=1e-3) for draws in table]


@pytest.mark.parametrize("freedom", [1, 10, 60])
def test_power_is_scipys_noncentral_chi_square(freedom):
    wanted = power.noncentrality(freedom, 1e-3, 0.9)
    critical = stats.chi2.isf(1e-3, freedom)
    assert stats.ncx2.sf(critical, freedom, wanted) == pytest.approx(0.9, abs=1e-6)
    assert power.p_value(critical, freedom) == pytest.approx(1e-3)


# Cells


@pytest.fixture(scope="module")
def plain(lab):
    return lab.system("llama", vocabulary=V)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=1.0),
        SamplingSpec(temperature=1.3, top_k=5, top_p=0.9, min_p=0.02),
    ],
)
@pytest.mark.parametrize(("depth", "most"), [(3, 64 + 16 + 4 + 1), (4, 81 + 27 + 9 + 3 + 1)])
def test_cells_are_the_sum_of_their_texts(lab, plain, sampling, depth, most):
    prompt = lab.prompt(5, vocabulary=V, seed=2)
    cells = exact(plain, prompt[0].tolist(), sampling, depth)
    texts = list(itertools.product(range(V), repeat=depth))
    rows = torch.cat((prompt.expand(len(texts), -1), torch.tensor(texts)), -1)
    with torch.inference_mode():
        logits = plain.step(rows, plain.new_cache(0), keep=depth + 1)[:, :-1]
    p = probabilities(logits, sampling).double()
    chances = p.gather(-1, torch.tensor(texts).unsqueeze(-1)).squeeze(-1).prod(-1).tolist()
    summed: Counter[tuple[int, ...]] = Counter()
    for text, chance in zip(texts, chances, strict=True):
        summed[cells.cell(text)] += chance
    assert len(cells.law) <= most
    assert sum(cells.law.values()) == pytest.approx(1, abs=1e-9)
    assert dict(cells.law) == pytest.approx({key: summed[key] for key in cells.law}, abs=1e-6)
    # What a filter rules out has no chance at all, not a small one.
    assert all(cells.law[key] == 0 for key in cells.law if summed[key] == 0)


def test_where_an_answer_belongs():
    cells = Cells((1,), {}, {(): frozenset({4, 5}), (4,): frozenset({4}), (4, 4): frozenset({7})})
    assert cells.cell([4, 4, 7, 9]) == (4, 4, 7)
    assert cells.cell([4, 4, 8]) == (4, 4, OTHER)
    assert cells.cell([4, 5, 7]) == (4, OTHER)
    assert cells.cell([6, 4, 4]) == (OTHER,)


# The statistic

LAW = {(0,): 0.5, (1,): 0.3, (2,): 0.15, (3,): 0.03, (4,): 0.02, (5,): 0.0}


def test_pearson_pools_what_is_rare():
    counts = Counter({(0,): 55, (1,): 25, (2,): 14, (3,): 4, (4,): 2})
    found = pearson(LAW, counts)
    expected = stats.chisquare([55, 25, 14, 6], [50, 30, 15, 5])
    assert (found.statistic, found.degrees) == (pytest.approx(expected.statistic), 3)
    assert found.variation == pytest.approx((0.05 + 0.05 + 0.01 + 0.01 + 0.0) / 2)
    assert found.impossible == 0


def test_a_pool_that_is_rare_itself_takes_one_more():
    # 40 draws: the two rare cells expect 2 together, and go with the least likely of the others.
    counts = Counter({(0,): 20, (1,): 12, (2,): 5, (3,): 2, (4,): 1})
    found = pearson(LAW, counts)
    expected = stats.chisquare([20, 12, 8], [20, 12, 8])
    assert (found.statistic, found.degrees) == (pytest.approx(expected.statistic), 2)


def test_what_cannot_happen_is_counted_by_itself():
    counts = Counter({(0,): 50, (1,): 30, (2,): 15, (3,): 3, (4,): 1, (5,): 1})
    assert pearson(LAW, counts).impossible == 1
    assert pearson(LAW, Counter({(0,): 99, (9, OTHER): 1})).impossible == 1


def test_p_values_of_a_sound_sampler_are_uniform():
    """And so is the expected total variation: the noise that is reported."""
    dice = torch.Generator().manual_seed(0)
    weights = torch.tensor(list(LAW.values()), dtype=torch.double)
    found = []
    for _ in range(400):
        drawn = torch.multinomial(weights, 200, replacement=True, generator=dice).tolist()
        found.append(pearson(LAW, Counter((cell,) for cell in drawn)))
    p = [power.p_value(one.statistic, one.degrees) for one in found]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    mean = sum(one.variation for one in found) / len(found)
    assert mean == pytest.approx(found[0].noise, rel=0.1)


def test_the_power_is_kept():
    """A divergence just as large as the detectable one is noticed nine times in ten."""
    dice = torch.Generator().manual_seed(1)
    flat = {(cell,): 0.1 for cell in range(10)}
    draws = 300
    size = (power.detectable(9, draws) / 10) ** 0.5 * 10**0.5
    bent = torch.tensor([0.1 * (1 + size * (-1) ** cell) for cell in range(10)])
    assert float(((bent - 0.1) ** 2 / 0.1).sum()) == pytest.approx(power.detectable(9, draws))
    noticed = 0
    for _ in range(400):
        drawn = torch.multinomial(bent, draws, replacement=True, generator=dice).tolist()
        found = pearson(flat, Counter((cell,) for cell in drawn))
        noticed += power.p_value(found.statistic, found.degrees) < 1e-3
    assert 0.85 < noticed / 400 < 0.95


def test_as_many_draws_as_the_power_needs():
    flat = Cells((1,), {(cell,): 1 / 80 for cell in range(80)}, {})
    asked = Asked(detect=0.1)
    draws = enough([flat], asked)
    assert power.detectable(degrees([flat], draws), draws) <= 0.1
    assert degrees([flat], draws) == 79
    assert draws / 80 >= RARE
    assert enough([flat, flat], Asked(detect=0.05)) % 2 == 0


# Greedy


def parroting(system, change):
    """Answers like plain decoding, but for what `change` makes of each row."""
    inner = loop(system)

    def answer(request, enough):
        return Answered([change(row) for row in inner(request, enough).rows])

    return answer


def test_greedy_answers_that_differ_are_told_with_their_margin(lab, plain):
    prompts = [lab.prompt(5, vocabulary=V, seed=seed)[0].tolist() for seed in range(3)]
    wrong = parroting(plain, lambda row: [*row[:4], (row[4] + 1) % V, *row[5:]])
    found, _ = greedy(wrong, plain, loop(plain), prompts, new=8, batch=2)
    assert (found.prompts, found.equal) == (3, 0)
    assert {one.token for one in found.divergences} == {4}
    assert all(one.kind == "bug" and one.gap >= one.margin > 0 for one in found.divergences)
    same, _ = greedy(loop(plain), plain, loop(plain), prompts, new=8, batch=2)
    assert (same.equal, same.divergences, same.drafted) == (3, (), None)


def rounded(plain, dtype):
    """The plain system, its logits as coarse as `dtype`."""
    step = plain.step

    def coarse(*args, **options):
        return step(*args, **options).to(dtype)

    return replace(plain, step=coarse)


def test_half_precision_allows_a_tie_and_nothing_else(lab, plain):
    prompt = lab.prompt(5, vocabulary=V, seed=1)[0].tolist()
    half = rounded(plain, torch.bfloat16)
    with torch.inference_mode():
        logits = half.step(torch.tensor([prompt]), half.new_cache(0))[0, -1].float()
    order = logits.argsort(descending=True).tolist()
    bound = 2 * 2**-7 * float(logits.abs().max())

    def instead(token):
        return parroting(half, lambda row: [token, *row[1:]])

    kinds = {}
    for token in order[1:]:
        found, _ = greedy(instead(token), half, loop(half), [prompt], new=4, batch=1)
        (one,) = found.divergences
        assert one.bound == pytest.approx(bound)
        assert one.gap == pytest.approx(float(logits[order[0]] - logits[token]))
        kinds[one.kind == "numeric_tie"] = one.gap < bound
        assert (one.kind == "numeric_tie") == (one.gap < bound)
    assert kinds[False] is False
    # An answer that is merely shorter is no tie.
    short = parroting(half, lambda row: row[:2])
    found, _ = greedy(short, half, loop(half), [prompt], new=4, batch=1)
    assert found.divergences[0].kind == "bug"


# Stops


@pytest.mark.parametrize("exact_tokens", [True, False])
def test_answers_that_end_elsewhere_are_found(lab, plain, exact_tokens):
    prompts = [lab.prompt(5, vocabulary=V, seed=seed)[0].tolist() for seed in range(2)]

    def check(answer):
        return stops(answer, plain, loop(plain), prompts, new=12, exact=exact_tokens)

    assert check(loop(plain)).wrong == ()
    for change in (lambda row: [*row, row[-1]], lambda row: row[:-1]):
        assert check(parroting(plain, change)).wrong


# The verdict

RULE = RuleCheck(
    pairs=1, identity_error=0, texts=1, chain_error=1e-16, tree_error=1e-16, bound=1e-12
)
EQUAL = GreedyCheck(prompts=4, new_tokens=8, equal=4, drafted=10, accepted=5)
ENDS = StopCheck(answers=4, inside=2)
FINE = SampledCheck(
    prompts=((1, 2),), draws=600, cells=85, chi_square=25, degrees=25, p=0.5, total_variation=0.1,
    noise=0.1, impossible=0, detectable=0.08, touched=500, drafted=900, accepted=300,
)  # fmt: skip


def judged(rule=RULE, same=EQUAL, ends=ENDS, test=FINE, again=None, dtype="float32"):
    return verdict(rule, same, ends, test, again, Asked(), dtype)


def but(document, **changes):
    return document.model_copy(update=changes)


@pytest.mark.parametrize(
    ("parts", "word", "said"),
    [
        ({}, "lossless", "greedy: 4 of 4"),
        ({"rule": but(RULE, chain_error=1e-3)}, "lossy", "chains"),
        ({"ends": but(ENDS, wrong=("prompt 0",))}, "lossy", "stops"),
        ({"test": but(FINE, p=1e-7)}, "lossy", "p 1e-07"),
        ({"test": but(FINE, impossible=1)}, "lossy", "rule out"),
        ({"test": but(FINE, impossible=1), "dtype": "bfloat16"}, "lossless", "greedy"),
        ({"test": but(FINE, p=1e-4), "again": but(FINE, p=1e-4)}, "lossy", "before gave p 0.0001"),
        ({"test": but(FINE, p=1e-4), "again": FINE}, "lossless", "greedy"),
        ({"test": but(FINE, detectable=0.2)}, "inconclusive", "Draw more"),
        ({"test": but(FINE, touched=30)}, "inconclusive", "met a draft"),
        ({"test": but(FINE, degrees=0, p=None, detectable=None)}, "inconclusive", "one cell"),
        ({"same": but(EQUAL, drafted=0, accepted=0)}, "inconclusive", "nothing was drafted"),
        ({"same": but(EQUAL, drafted=None, accepted=None)}, "lossless", "greedy"),
        ({"test": but(FINE, detectable=0.2, p=1e-7)}, "lossy", "chi-square"),
    ],
)
def test_the_word_and_its_reason(parts, word, said):
    found, reasons = judged(**parts)
    assert found == word
    assert said in reasons[0]


def test_a_suspicion_is_not_yet_a_verdict():
    odd = but(FINE, p=1e-4)
    assert suspicious(odd, Asked())
    assert not convincing(odd, Asked(), "float32")
    assert convincing(but(FINE, p=1e-7), Asked(), "float32")
