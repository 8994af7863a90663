"""speculative/oracle: acceptance at the rate asked for, real passes, and no quality."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compresskit import catalogue, metrics, runner
from compresskit.decode import pad
from compresskit.drafts.play import Recording
from compresskit.errors import SpecError
from compresskit.methods.speculative.oracle import Certain, Oracle
from compresskit.metrics.speculation import lossless
from compresskit.spec import ModelSpec, RunSpec, SamplingSpec
from compresskit.system import Request
from compresskit.traits import Trait


def lengths(rate, draft, *, new=4000, seed=0):
    """Tokens of every pass that had a whole draft."""
    recording = Recording(8)
    recording.text = torch.arange(new + 8) % 8
    system = Oracle(rate=rate, draft=draft).apply(recording.system(), None)
    request = Request(torch.tensor([[1, 2, 3]]), new, SamplingSpec(), seed=seed)
    chunks = list(system.generate(request))
    assert sum(int(chunk.lengths) for chunk in chunks) == new
    assert all(chunk.tokens.shape == (1, chunk.accepted + 1) for chunk in chunks)
    return [int(chunk.lengths) for chunk in chunks if chunk.drafted == draft]


def moments(rate, draft):
    """Mean and standard deviation of the tokens of a pass: a geometric law, cut off."""
    chance = [rate**n * (1 - rate) for n in range(draft)] + [rate**draft]
    mean = sum((n + 1) * p for n, p in enumerate(chance))
    assert mean == pytest.approx((1 - rate ** (draft + 1)) / (1 - rate))
    return mean, math.sqrt(sum((n + 1 - mean) ** 2 * p for n, p in enumerate(chance)))


@pytest.mark.parametrize(("rate", "draft"), [(0.3, 1), (0.6, 4), (0.8, 4), (0.9, 8)])
def test_tokens_a_pass_follow_the_formula(rate, draft):
    found = lengths(rate, draft)
    mean, deviation = moments(rate, draft)
    error = deviation / math.sqrt(len(found))
    assert abs(sum(found) / len(found) - mean) < 3 * error
    # The check can fail: a rate not far off is told apart.
    other, _ = moments(rate - 0.15, draft)
    assert abs(sum(found) / len(found) - other) > 3 * error


def test_the_ends_are_exact():
    assert set(lengths(1.0, 4)) == {5}
    assert set(lengths(0.0, 4)) == {1}


def test_a_rate_of_zero_leaves_the_models_own_tokens(lab, architecture):
    system = lab.system(architecture)
    request = lab.request(lab.prompt(12), 24)
    applied = Oracle(rate=0.0, draft=3).apply(system, None)
    assert lab.rows(applied.generate(request)) == lab.rows(system.generate(request))


def test_passes_have_real_widths(lab):
    system = lab.system("llama")
    widths = []

    def step(tokens, cache, **options):
        widths.append(tokens.shape[1])
        return system.step(tokens, cache, **options)

    request = lab.request(lab.prompt(9), 21)
    chunks = list(
        Oracle(rate=1.0, draft=4).apply(replace(system, step=step), None).generate(request)
    )
    # One token with the prompt, then whole blocks.
    assert widths == [9, 5, 5, 5, 5]
    assert [chunk.accepted for chunk in chunks] == [0, 4, 4, 4, 4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_seeds_decide(lab, temperature):
    applied = Oracle(rate=0.5, draft=4).apply(lab.system("llama"), None)
    sampling = SamplingSpec(temperature=temperature)

    def run(seed):
        request = lab.request(lab.prompt(9), 40, sampling=sampling, seed=seed)
        return [int(chunk.lengths) for chunk in applied.generate(request)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_last_token_is_the_models(lab):
    """Each chunk ends with the arg max after the text before it."""
    system = lab.system("llama", double=True)
    prompt = lab.prompt(9)
    text = prompt[0].tolist()
    for chunk in Oracle(rate=0.6, draft=3).apply(system, None).generate(lab.request(prompt, 30)):
        *drafted, last = chunk.tokens[0].tolist()
        text += drafted
        with torch.inference_mode():
            logits = system.step(torch.tensor([text]), system.new_cache(0))
        assert last == int(logits[0, -1].argmax())
        text.append(last)


def test_a_row_does_not_depend_on_its_neighbours(lab):
    applied = Oracle(rate=0.6, draft=4).apply(lab.system("llama"), None)
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (1, 5, 12, 30)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    together = lab.rows(applied.generate(lab.request(tokens, 30, mask=mask)))
    for row, ids in zip(together, rows, strict=True):
        alone = lab.request(torch.tensor([ids]), 30)
        assert [row] == lab.rows(applied.generate(alone))


def test_stop_tokens_of_the_prompt_are_not_drafted(lab):
    system = lab.system("llama")
    applied = Oracle(rate=1.0, draft=4).apply(system, None)
    request = lab.request(torch.tensor([[7, 8, 7, 9]]), 21, stop=(7,))
    (row,) = lab.rows(applied.generate(request))
    assert 7 not in row[:-1]
    # A prompt of nothing else drafts nothing.
    request = lab.request(torch.tensor([[7, 7]]), 5, stop=(7,))
    assert not any(chunk.drafted for chunk in applied.generate(request))


def test_a_draft_that_is_cut_short_is_accepted_as_far_as_it_goes():
    draft = Certain([1, 2, 3, 4])
    draft.fate = 3
    assert [draft._replace(tokens=draft.tokens[:n]).fate for n in range(5)] == [0, 1, 2, 3, 3]


def test_it_claims_nothing(lab):
    before = frozenset(Trait)
    assert before - Oracle().effects().after(before) == {Trait.LOSSLESS}
    assert Oracle().apply(lab.system("llama"), None).synthetic == "synthetic acceptance"
    with pytest.raises(SpecError, match="accept: oracle accepts at its own rate"):
        Oracle.decode({"accept": "typical"}, where="speculative/oracle")
    with pytest.raises(SpecError, match="length: what is not drafted has no fate"):
        Oracle.decode({"length": "adaptive"}, where="speculative/oracle")
    with pytest.raises(SpecError, match="rate"):
        Oracle.decode({"rate": 1.1}, where="speculative/oracle")


def test_its_record_has_speed_and_no_quality():
    spec = RunSpec(
        model=ModelSpec(name="tiny"),
        device="cpu",
        stack=(catalogue.parse_method("speculative/oracle:rate=1.0,draft=4"),),
    ).replace(
        workload={"prompt_tokens": 16, "new_tokens": 11},
        protocol={"passes": ["latency", "quality"], "warmups": 0, "repeats": 1},
    )
    record = runner.run(spec)
    assert record.status == "ok"
    assert lossless(record)[0] == "none"
    assert lossless(record.model_copy(update={"facts": {}}))[0] == "exact"
    assert record.facts["synthetic"] == "synthetic acceptance"
    assert record.quality.notes == ("quality: unavailable, synthetic acceptance",)
    assert metrics.METRICS["draft_acceptance_rate"].value(record).value == 1.0
    for name in ("perplexity", "kl_mean_nats", "greedy_exact_match"):
        reading = metrics.METRICS[name].value(record)
        assert reading.kind == "unavailable"
        assert "synthetic acceptance" in reading.reason
