"""The probe of passes: which widths, on which cache, by a clock of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compresskit.measure import step_cost
from compresskit.methods.speculative.ngram import NGram
from compresskit.metrics.speedup import costs_of, passes_of


class Slow:
    """A step that takes a second and a tenth of one per further token, by its own clock."""

    def __init__(self, system):
        self.inner, self.now, self.seen = system.step, 0.0, []

    def __call__(self, tokens, cache, **options):
        self.seen.append((tokens.shape[1], cache.get_seq_length()))
        self.now += 1 + 0.1 * (tokens.shape[1] - 1)
        return self.inner(tokens, cache, **options)

    def clock(self):
        return self.now


@pytest.fixture
def slow(lab):
    system = NGram(draft=4).apply(lab.system("llama"), None)
    step = Slow(system)
    return replace(system, step=step), step


def test_every_width_is_timed_on_the_same_cache(lab, slow):
    system, step = slow
    found = step_cost.probe(system, lab.request(lab.prompt(9), 6), rounds=3, timer=step.clock)
    assert found.widths == (1, 2, 3, 4, 5)
    assert (found.batch, found.tokens_in_cache, found.padded) == (1, 9, False)
    assert all(len(spent) == 3 for spent in found.seconds)
    # One prefill, then each width twice a round and twice before; whatever came before is taken back.
    assert step.seen[0] == (9, 0)
    assert {seen for _, seen in step.seen[1:]} == {9}
    assert sorted(width for width, _ in step.seen[1:]) == sorted([1, 2, 3, 4, 5] * 8)


def test_the_costs_are_those_of_the_step(lab, slow):
    system, step = slow
    found = step_cost.probe(system, lab.request(lab.prompt(9), 6), timer=step.clock)
    # The clock is not the machine's, so neither is the waiting.
    seconds, passes = passes_of(found.model_copy(update={"waited": None}))
    assert seconds == pytest.approx(1.0)
    assert passes == tuple((n, pytest.approx(1 + 0.1 * (n - 1))) for n in range(1, 6))


def test_a_trial_tells_what_the_loop_costs_beside_its_passes(lab, slow):
    system, step = slow
    request = lab.request(lab.prompt(8).repeat(1, 3), 24)
    found = step_cost.probe(system, request, rounds=1, trial=True, timer=step.clock)
    assert sum(found.trial.per_step_drafted[0]) == found.trial.drafted > 0
    assert len(found.trial.parts["verify"]) == len(found.trial.arrivals) - 1
    # Only the passes take time by this clock.
    assert costs_of(found).draft == 0
    assert costs_of(found).host == pytest.approx(0)


def test_fixed_widths_are_the_only_ones_that_are_asked_for(lab, slow):
    system, step = slow
    fixed = replace(system, fixed_widths=True, widths=(1, 5))
    found = step_cost.probe(fixed, lab.request(lab.prompt(9), 6), rounds=1, timer=step.clock)
    assert (found.widths, found.padded) == ((1, 5), True)
    assert costs_of(found).padded


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (9, [*range(1, 10)]), (17, [*range(1, 9), 12, 16, 17])],
)
def test_wide_passes_are_sampled(lab, most, expected):
    assert step_cost.widths(replace(lab.system("llama"), widths=(1, most))) == expected


def test_rows_of_a_batch_are_probed_together(lab, slow):
    system, step = slow
    tokens = torch.cat([lab.prompt(7, seed=seed) for seed in range(2)])
    found = step_cost.probe(system, lab.request(tokens, 6), rounds=1, timer=step.clock)
    assert (found.batch, found.tokens_in_cache) == (2, 7)
