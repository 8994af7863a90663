"""Teacher caches: what is written comes back, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compresskit.distill.batch import Dense, Draws, TopK
from compresskit.distill.lesson import Lesson
from compresskit.distill.losses.terms import parse as parse_terms
from compresskit.distill.teachers.cache import read, report, shard
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.write import write
from compresskit.distill.teachers.online import Online
from compresskit.hf.tiny import random_model

VOCABULARY = 512
ROWS, LENGTH = 11, 9
PLACES = ROWS * (LENGTH - 1)
SIGMAS = 5.0


def test_top_k_of_a_row_is_the_same_whatever_the_batch(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    written: Any,
    belongs: Any,
    batch: Any,
    dense_logprobs: Any,
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5,store=float32")
    cache = read.open(tmp_path, wanted=belongs(rows))
    found = cache.targets(batch(rows, 10, 0, 4))
    assert isinstance(found, TopK) and cache.kind == "topk" and cache.tokens_read == 0
    exact = dense_logprobs(rows[[10, 0, 4]])
    best = exact.topk(5, -1)
    assert found.ids.equal(best.indices)
    torch.testing.assert_close(found.logprobs.double(), best.values, rtol=0, atol=2e-5)
    others = exact.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.rest.double(), others, rtol=0, atol=2e-5)
    # Negative control: the rows of another batch are others.
    assert not found.ids.equal(cache.targets(batch(rows, 4, 10, 0)).ids)


def test_all_tokens_kept_teach_what_the_teacher_teaches_online(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any, batch: Any
) -> None:
    """Forward KL and its gradient, in float32; top-8 of 512 fails the same comparison."""
    told = teacher.targets(batch(rows, 7, 2))
    assert isinstance(told, Dense) and teacher.kind == "dense"
    student = torch.randn(len(told.hidden), VOCABULARY, generator=torch.Generator().manual_seed(2))

    def learned(logp: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student.clone().requires_grad_()
        ours = logits.log_softmax(-1).gather(-1, ids)
        loss = (logp.exp() * (logp - ours)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    everything = torch.arange(VOCABULARY).expand(len(told.hidden), -1)
    online = learned(teacher.logprobs(told.hidden), everything)
    found = {}
    for k in (VOCABULARY, 8):
        written(tmp_path / str(k), teacher, rows, f"topk:k={k},store=float32")
        cached = read.open(tmp_path / str(k), wanted=belongs(rows)).targets(batch(rows, 7, 2))
        assert isinstance(cached, TopK)
        found[k] = learned(cached.logprobs, cached.ids)
    torch.testing.assert_close(found[VOCABULARY], online, rtol=1e-5, atol=1e-7)
    # In bfloat16 each log-probability is off by at most |logp| / 256, and so is the sum that they are
    # brought back to: that is how far the gradient, q - p a place, may be off, token by token.
    written(tmp_path / "rounded", teacher, rows, f"topk:k={VOCABULARY}")
    rounded = read.open(tmp_path / "rounded", wanted=belongs(rows)).targets(batch(rows, 7, 2))
    assert isinstance(rounded, TopK)
    exact = teacher.logprobs(told.hidden)
    bound = exact.exp() * (2 * exact.abs().amax(-1, keepdim=True) / 256).expm1() / len(exact)
    off = (learned(rounded.logprobs, rounded.ids)[1] - online[1]).abs()
    assert off.max() > 1e-6 and (off <= bound + 1e-7).all()
    assert not ((found[8][1] - online[1]).abs() <= bound + 1e-7).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[8], online, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("terms", "form", "same"),
    [
        ("forward_kl", f"topk:k={VOCABULARY},store=float32", True),
        ("jsd:beta=0.3", f"topk:k={VOCABULARY},store=float32", True),
        ("forward_kl", f"topk:k={VOCABULARY}", False),  # rounded: near, not the same
        ("forward_kl", "topk:k=8,store=float32", False),
    ],
)
def test_a_lesson_from_disk_is_the_lesson_of_the_teacher(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    written: Any,
    belongs: Any,
    batch: Any,
    terms: str,
    form: str,
    same: bool,
) -> None:
    """Loss and gradient of a student, through what training really runs."""
    written(tmp_path, teacher, rows, form)
    cached = read.open(tmp_path, wanted=belongs(rows))
    asked = batch(rows, 5, 1)
    learned = []
    for source_of in (teacher, cached):
        student = random_model("llama", seed=7).train()
        target = source_of.targets(asked)
        loss = Lesson(student, parse_terms(terms))(asked.tokens, asked.weights, target)
        loss.total.backward()
        gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()])
        learned.append((loss.total.detach(), gradient))
    (online, slope), (offline, other) = learned
    close = bool((slope - other).norm() <= 1e-5 * slope.norm())
    assert close == same
    assert (abs(online - offline) <= 1e-5 * online) == same


def test_reconstruction_of_all_tokens_is_the_rounding_of_bfloat16(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, dense_logprobs: Any
) -> None:
    """Each log-probability is off by at most |logp| / 256; of such errors the KL is a second moment."""
    got = written(tmp_path, teacher, rows, f"topk:k={VOCABULARY}").manifest.reconstruction
    exact = dense_logprobs(rows)
    half_step = exact.abs() / 256
    # KL(p || p e^d / Z) = log E e^d - E d <= (max d - min d)^2 / 8 (Hoeffding's lemma).
    bound = ((2 * half_step.amax(-1)) ** 2 / 8).mean().item()
    assert got is not None and 0 < got["kl_nats"] < bound
    assert got["mass_beyond_k"] == 0
    # float32 must be far below it, or the number is not about rounding.
    fine = written(tmp_path / "f", teacher, rows, f"topk:k={VOCABULARY},store=float32").manifest
    assert fine.reconstruction is not None
    assert abs(fine.reconstruction["kl_nats"]) < got["kl_nats"] / 100


def test_reconstruction_is_the_kl_of_what_is_read_again(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    written: Any,
    belongs: Any,
    batch: Any,
    dense_logprobs: Any,
) -> None:
    """Against numpy in float64 on what comes back, the tail spread over the other tokens."""
    got = written(tmp_path, teacher, rows, "topk:k=6").manifest.reconstruction
    back = read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, *range(ROWS)))
    assert isinstance(back, TopK) and got is not None
    exact = dense_logprobs(rows).numpy()
    kls = []
    for place in range(PLACES):
        given = np.full(VOCABULARY, np.exp(back.rest[place].item()) / (VOCABULARY - 6))
        given[back.ids[place].numpy()] = np.exp(back.logprobs[place].double().numpy())
        assert given.sum() == pytest.approx(1, abs=1e-6)
        kls.append((np.exp(exact[place]) * (exact[place] - np.log(given))).sum())
    assert got["kl_nats"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert got["mass_beyond_k"] == pytest.approx(back.rest.exp().mean().item(), rel=1e-5)


def test_draws_of_a_row_do_not_depend_on_its_batch(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any, batch: Any
) -> None:
    found = []
    for size, seed in ((1, 0), (5, 0), (5, 1)):
        folder = tmp_path / f"{size}-{seed}"
        written(folder, teacher, rows, "draws:n=12", batch=size, seed=seed)
        cached = read.open(folder, wanted=belongs(rows)).targets(batch(rows, 3, 8))
        assert isinstance(cached, Draws)
        found.append(cached)
    assert found[0].ids.equal(found[1].ids) and found[0].weights.equal(found[1].weights)
    assert not found[1].ids.equal(found[2].ids)


def test_the_report_of_draws_agrees_with_its_noise(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, dense_logprobs: Any
) -> None:
    manifest = written(tmp_path, teacher, rows, "draws:n=12").manifest
    got = manifest.reconstruction
    assert got is not None
    exact = dense_logprobs(rows)
    entropy = -(exact.exp() * exact).sum(-1)
    variance = (exact.exp() * exact.square()).sum(-1) - entropy.square()
    assert got["entropy_nats"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    noise = (variance.mean() / 12).sqrt().item()
    assert abs(got["entropy_drawn_nats"] - got["entropy_nats"]) < SIGMAS * noise / PLACES**0.5
    # What was measured over 88 places is the standard deviation that the distributions imply, 12
    # draws each, within the spread of such a measurement.
    assert got["rms_error_nats"] == pytest.approx(noise, rel=0.5)
    assert got["smoothed_kl_nats"] > 0


def test_a_large_vocabulary_goes_through_the_disk(tmp_path: Path, belongs: Any, batch: Any) -> None:
    """Ids of four bytes, in files and back; places of a row in several chunks."""
    large = Online(random_model("llama", vocab_size=70_000))
    rows = torch.randint(0, 70_000, (2, 80), generator=torch.Generator().manual_seed(0))
    form = parse("topk:k=3,store=float32")
    write(tmp_path, large, rows, form=form, belongs=belongs(rows))
    found = read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, 1))
    best = large.logprobs(large.targets(batch(rows, 1)).hidden).topk(3)
    assert isinstance(found, TopK) and found.ids.equal(best.indices)
    assert int(found.ids.max()) > 1 << 16
    torch.testing.assert_close(found.logprobs, best.values, rtol=1e-4, atol=1e-4)


def test_bytes_on_the_disk_are_measured(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any
) -> None:
    got = written(tmp_path, teacher, rows, "topk:k=5")
    manifest = got.manifest
    files = shard.listed(tmp_path)
    assert len(files) == manifest.shards() == 4
    size = sum(file.stat().st_size for file in files)
    assert manifest.shard_bytes == size and manifest.bytes_per_token == size / PLACES
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert size - headers == PLACES * parse("topk:k=5").bytes_per_place(VOCABULARY)
    assert got.tokens_read == manifest.teacher_tokens == PLACES


def test_the_report_tells_all_of_it(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any
) -> None:
    manifest = written(tmp_path, teacher, rows, "topk:k=5").manifest
    facts = report.facts(manifest)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["bytes_per_token"] == manifest.bytes_per_token
    assert facts["dense_bytes_per_token"] == 2 * VOCABULARY
    assert facts["reconstruction"] == manifest.reconstruction
    assert "biases" in str(facts["about"])
    line = report.line(manifest)
    assert f"{manifest.bytes_per_token:.1f} bytes a token" in line and "kl nats" in line
    assert "unfinished" in report.line(manifest.model_copy(update={"bytes_per_token": None}))


def test_few_files_are_held_open(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    written: Any,
    belongs: Any,
    batch: Any,
) -> None:
    monkeypatch.setattr(read, "OPEN_SHARDS", 2)
    written(tmp_path, teacher, rows, "topk:k=5")
    cache = read.open(tmp_path, wanted=belongs(rows))
    everything = cache.targets(batch(rows, *range(ROWS)))
    assert len(cache._files) == 2
    assert cache.targets(batch(rows, 0)).ids.equal(everything.ids[: LENGTH - 1])
