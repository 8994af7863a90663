"""The whole pass: zero against itself, more than zero against noise, the same in any cut."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from compresskit import text as texts
from compresskit.errors import RunError
from compresskit.quality import batches, protocol
from compresskit.quality.evaluate import evaluate
from compresskit.record import Quality

DIGEST = "0123456789ab"


@pytest.fixture
def judge(spec):
    def run(system, baseline, *, cache_changed=False, batch_allowed=True, progress=None, **options):
        return evaluate(
            system,
            baseline,
            spec(**options),
            cache_changed=cache_changed,
            batch_allowed=batch_allowed,
            baseline_digest=DIGEST,
            **({"progress": progress} if progress else {}),
        )

    return run


@pytest.mark.parametrize("chosen", ["window", "split"])
def test_a_system_is_at_no_distance_from_itself(judge, system, chosen):
    found = judge(system, system, protocol=chosen)
    kl = found.fidelity.kl
    assert (kl.mean, kl.stderr, set(kl.percentiles.values())) == (0, 0, {0})
    assert (found.fidelity.top1_agreement, found.fidelity.top1_stderr) == (1, 0)
    assert (found.fidelity.delta_nll, found.fidelity.delta_nll_stderr) == (0, 0)
    assert found.greedy.exact_match == found.greedy.length_ratio == 1
    assert found.greedy.first_divergence == (None, None)


@pytest.mark.parametrize("chosen", ["window", "split"])
def test_noise_on_the_weights_shows(judge, system, perturbed, chosen):
    found = judge(perturbed, system, protocol=chosen)
    assert found.fidelity.kl.mean > 0.001
    assert found.fidelity.top1_agreement < 1
    assert found.fidelity.kl.stderr > 0
    delta = found.likelihood.nll_mean - found.fidelity.baseline_nll
    assert found.fidelity.delta_nll == pytest.approx(delta, abs=1e-6)
    assert found.likelihood.protocol_id == found.fidelity.protocol_id
    assert found.fidelity.baseline_digest == DIGEST
    assert list(found.fidelity.kl.percentiles) == ["p50", "p90", "p95", "p99", "p99.9", "max"]
    assert Quality.model_validate_json(found.model_dump_json()) == found


def test_window_likelihood_is_the_model_s_own_loss(judge, system, text):
    ids = list(text.read_bytes())
    found = judge(system, None, protocol="window").likelihood
    with torch.inference_mode():
        losses = [
            float(system.model(input_ids=row, labels=row).loss)
            for row in (torch.tensor([ids[at : at + 33]]) for at in (0, 32, 64))
        ]
    assert found.nll_mean == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found.scored_tokens, found.scored_bytes) == (96, 96)
    assert found.bits_per_byte == pytest.approx(sum(losses) / 3 / math.log(2), rel=1e-5)
    assert found.nll_stderr > 0


def test_split_likelihood_is_that_of_one_forward_pass(judge, system, text):
    ids = list(text.read_bytes())
    found = judge(system, None, protocol="split", windows=1).likelihood
    row = torch.tensor([ids[:25]])  # 16 + 1 + 8
    with torch.inference_mode():
        log_q = system.model(input_ids=row).logits.log_softmax(-1)
    expected = [-float(log_q[0, at, ids[at + 1]]) for at in range(16, 24)]
    assert found.nll_mean == pytest.approx(sum(expected) / 8, abs=1e-5)
    assert found.nll_stderr is None


def test_the_baseline_itself_has_no_fidelity(judge, system):
    found = judge(system, None)
    assert found.fidelity is None
    assert found.greedy is None
    assert "own baseline" in found.notes[-1]


@pytest.mark.parametrize("chosen", ["window", "split"])
@pytest.mark.parametrize("change", ["forward", "held", "both", "unbatched"])
def test_how_it_is_cut_into_memory_does_not_matter(
    judge, system, perturbed, monkeypatch, chosen, change
):
    whole = judge(perturbed, system, protocol=chosen)
    if change in {"forward", "both"}:
        monkeypatch.setattr(batches, "LARGEST_FORWARD", 7 * 300 * 4)
    if change in {"held", "both"}:
        monkeypatch.setattr(batches, "LARGEST_HELD", 10 * 300 * 4)
    cut = judge(perturbed, system, protocol=chosen, batch_allowed=change != "unbatched")
    assert cut.fidelity.kl.mean == pytest.approx(whole.fidelity.kl.mean, rel=1e-3)
    assert cut.likelihood.nll_mean == pytest.approx(whole.likelihood.nll_mean, rel=1e-5)
    assert cut.fidelity.top1_agreement == whole.fidelity.top1_agreement
    assert cut.likelihood.protocol_id == whole.likelihood.protocol_id
    assert cut.greedy == whole.greedy


def test_only_split_reads_a_cache_that_compresses_after_the_prefill(judge, system, with_step):
    """Stand-in for an evicting cache: wrong only in single-token steps."""
    noise = torch.randn(300, generator=torch.Generator().manual_seed(2))
    lossy = with_step(lambda logits, tokens: logits + noise * (tokens.shape[1] == 1))
    assert judge(lossy, system, protocol="window").fidelity.kl.mean == 0
    assert judge(lossy, system, cache_changed=True).fidelity.kl.mean > 0.1
    noted = judge(lossy, system, protocol="window", cache_changed=True).notes
    assert any("use protocol split" in note for note in noted)


def test_what_is_attached_to_one_system_is_not_seen_by_the_other(judge, system, with_step):
    on = []

    @contextmanager
    def attach():
        on.append(True)
        yield
        on.pop()

    def variant(logits, tokens):
        assert on == [True]
        return logits

    def plain(logits, tokens):
        assert on == []
        return logits

    judge(replace(with_step(variant), attach=(attach,)), with_step(plain))
    assert on == []


def test_a_prompt_stage_shortens_the_prefill_only(judge, system):
    seen = []

    def halve(tokens):
        seen.append(tokens.shape[1])
        return tokens[:, ::2]

    found = judge(replace(system, prompt=halve), system, cache_changed=True, greedy_prompts=0)
    assert found.fidelity.kl.mean > 0
    assert set(seen) == {16}
    assert found.greedy is None


def test_bad_logits_fail_the_run(judge, system, with_step):
    broken = with_step(lambda logits, tokens: logits * math.nan)
    with pytest.raises(RunError, match="artefact gave NaN"):
        judge(broken, system)
    with pytest.raises(RunError, match="artefact gave NaN"):
        judge(broken, None)


def test_absurd_logits_fail_the_run_instead_of_overflowing(judge, with_step):
    with pytest.raises(RunError, match="unusable"):
        judge(with_step(lambda logits, tokens: logits * 1e6), None)


def test_notes_say_what_was_cut_short(judge, system):
    assert any("instead of 9999" in note for note in judge(system, None, tokens=9999).notes)
    few = judge(system, None, protocol="split", windows=999)
    assert any("windows instead of 999" in note for note in few.notes)


def test_a_cache_that_was_never_filled_is_not_praised(judge, system, perturbed):
    """An eviction budget above the window length scores zero for the wrong reason."""
    assert any("raise prefill" in note for note in judge(system, system, cache_changed=True).notes)
    noted = judge(perturbed, system, cache_changed=True).notes
    assert not any("raise prefill" in note for note in noted)


def test_the_noise_floor_is_rounding(system, perturbed, spec, text):
    plan = protocol.plan(
        system,
        texts.load(str(text)),
        spec(protocol="split"),
        cache_changed=False,
        batch_allowed=True,
    )
    note = batches.noise_floor(system, plan)
    assert float(note.split("mean |KL| ")[1].split()[0]) < 1e-6
    assert "float32" in note
    assert "cutting 8 tokens" in note  # 2 windows, the last 4 of 8 positions


def test_progress_counts_windows_and_prompts(judge, system):
    told = []
    judge(system, system, progress=lambda label, done, total: told.append((label, done, total)))
    assert told == [
        ("windows", 1, 3),
        ("windows", 2, 3),
        ("windows", 3, 3),
        ("greedy prompts", 2, 2),
    ]
