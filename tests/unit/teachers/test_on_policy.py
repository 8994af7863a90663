"""Rows that a student writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compresskit.distill.batch import Batch
from compresskit.distill.losses import terms
from compresskit.distill.teachers import on_policy, seeds
from compresskit.distill.teachers.on_policy import by, mixed
from compresskit.errors import SpecError
from compresskit.hf.continuation import continued, evaluating
from compresskit.hf.tiny import ARCHITECTURES, random_model
from compresskit.spec import SamplingSpec

VOCABULARY, LENGTH = 512, 12


def a_batch(rows: int) -> Batch:
    drawing = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=drawing)
    return Batch(tokens, torch.ones(rows, LENGTH), torch.arange(rows) + 100)


def counting(prompts: torch.Tensor, new: int, seed: int) -> torch.Tensor:
    """A student that writes 0, 1, 2 ..."""
    return torch.arange(new).expand(len(prompts), -1)


# The student's own rows


def test_chosen_rows_keep_their_beginning_and_count_behind_it() -> None:
    before = a_batch(6)
    tokens, weights, numbers = before.tokens.clone(), before.weights.clone(), before.rows.clone()
    after = mixed(before, 0.5, counting, seed=0, step=3, prompt_share=0.25)
    own = after.batch.rows == -1
    assert int(own.sum()) == after.rows == 3 and after.generated_tokens == 3 * 9
    assert after.batch.tokens[own, :3].equal(tokens[own, :3])
    assert after.batch.tokens[own, 3:].equal(torch.arange(9).expand(3, -1))
    assert after.batch.weights[own].tolist() == [[0.0] * 3 + [1.0] * 9] * 3
    assert after.batch.tokens[~own].equal(tokens[~own])
    assert after.batch.weights[~own].equal(weights[~own])
    assert after.batch.rows[~own].equal(numbers[~own])
    # What was handed in is as it was.
    assert before.tokens.equal(tokens) and before.weights.equal(weights)
    assert before.rows.equal(numbers)


def test_nothing_counts_behind_the_end_of_a_text() -> None:
    after = mixed(a_batch(1), 1.0, counting, seed=0, step=0, stop=(2, 4))
    # The stop token itself is the student's, and the teacher's opinion of it counts.
    assert after.batch.weights.tolist() == [[0.0] * 6 + [1.0] * 3 + [0.0] * 3]
    assert after.generated_tokens == 6


@pytest.mark.parametrize(("fraction", "rows"), [(0.3, 1), (0.55, 4)])
def test_the_fraction_holds_on_average(fraction: float, rows: int) -> None:
    """Within five standard errors over 2000 steps; the fraction rounded up or down is not."""
    steps = 2000
    batch = a_batch(rows)
    taken = [mixed(batch, fraction, counting, seed=1, step=step).rows for step in range(steps)]
    mean = sum(taken) / steps
    _, part = divmod(fraction * rows, 1)
    error = (part * (1 - part) / steps) ** 0.5
    assert set(taken) == {int(fraction * rows), int(fraction * rows) + 1}
    assert abs(mean - fraction * rows) < 5 * error
    assert all(abs(whole - fraction * rows) > 5 * error for whole in set(taken))


def test_no_fraction_no_change() -> None:
    before = a_batch(3)
    after = mixed(before, 0.0, counting, seed=0, step=0)
    assert after == (before, 0, 0, 0.0)
    assert mixed(before, 1.0, counting, seed=0, step=0).rows == 3


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_row_keeps_a_prompt_and_gets_a_continuation(share: float) -> None:
    after = mixed(a_batch(1), 1.0, counting, seed=0, step=0, prompt_share=share)
    assert after.generated_tokens == (LENGTH - 1 if share < 0.5 else 1)


@pytest.mark.parametrize(
    ("fraction", "options", "culprit"),
    [
        (1.5, {}, "0 to 1, not 1.5"),
        (-0.1, {}, "0 to 1, not -0.1"),
        (0.5, {"prompt_share": 1.0}, "between 0 and 1, not at 1.0"),
        (0.5, {"prompt_share": 0.0}, "between 0 and 1, not at 0.0"),
    ],
)
def test_shares_out_of_range_are_refused(
    fraction: float, options: dict[str, Any], culprit: str
) -> None:
    with pytest.raises(SpecError, match=culprit):
        mixed(a_batch(2), fraction, counting, seed=0, step=0, **options)


def test_rows_of_one_token_are_refused() -> None:
    one = Batch(torch.ones(1, 1).long(), torch.ones(1, 1), torch.zeros(1).long())
    with pytest.raises(SpecError, match="leave nothing to write"):
        mixed(one, 1.0, counting, seed=0, step=0)


def test_what_own_rows_cannot_teach_is_refused() -> None:
    good, bad = terms.parse("reverse_kl"), terms.parse("reverse_kl + ce:weight=0.1")
    on_policy.check(0.5, "dense", good)
    on_policy.check(0.0, "topk", bad)
    with pytest.raises(SpecError, match=r"own tokens are right\. Leave ce out"):
        on_policy.check(0.5, "dense", bad)
    with pytest.raises(SpecError, match="has not read what the student writes"):
        on_policy.check(0.5, "topk", good)
    with pytest.raises(SpecError, match="0 to 1, not 2"):
        on_policy.check(2, "dense", good)


def test_seed_step_and_weights_decide_everything() -> None:
    batch = a_batch(8)
    student = random_model("llama")

    def text(seed: int, step: int, model: Any = student) -> torch.Tensor:
        # What was drawn before in the process makes no difference.
        torch.rand(3)
        return mixed(batch, 0.5, by(model), seed=seed, step=step).batch.tokens

    first = text(0, 5)
    assert first.equal(text(0, 5))
    assert not first.equal(text(0, 6))
    assert not first.equal(text(1, 5))
    assert not first.equal(text(0, 5, random_model("llama", seed=1)))


def test_seeds_that_add_up_to_the_same_are_different() -> None:
    found = {seeds.number(name, a, b) for name in "xy" for a in range(8) for b in range(8)}
    assert len(found) == 128
    assert all(0 <= one < 2**63 for one in found)


# What writes them


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_student_continues_as_without_a_cache(architecture: str) -> None:
    """Greedy tokens against the whole prefix read again for each; sampling is not greedy."""
    # torch's grouped matrix product, the default for experts, has no float64.
    experts = architecture in {"mixtral", "qwen3_moe"}
    model = random_model(architecture, dtype=torch.float32 if experts else torch.float64)
    prompts = a_batch(2).tokens[:, :5]
    found = continued(model, prompts, 6, sampling=SamplingSpec(), seed=0)
    tokens = prompts
    for _ in range(6):
        with torch.no_grad():
            best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, best), -1)
    assert found.equal(tokens[:, 5:])
    warm = continued(model, prompts, 6, sampling=SamplingSpec(temperature=2.0), seed=0)
    assert not warm.equal(found)


def test_samples_follow_the_students_distribution() -> None:
    """Chi-squared of 4000 first tokens at temperature 0.5; the same at temperature 1 must not fit."""
    from scipy.stats import chisquare

    model = random_model("llama")
    prompt = a_batch(1).tokens[:, :4]
    found = continued(
        model, prompt.expand(4000, -1), 1, sampling=SamplingSpec(temperature=0.5), seed=0
    )
    with torch.no_grad():
        logits = model(input_ids=prompt).logits[0, -1].double()
    counts = torch.bincount(found.flatten(), minlength=VOCABULARY).double()

    def fit(temperature: float) -> float:
        expected = (logits / temperature).softmax(-1) * len(found)
        likely = expected >= 5  # the usual rule; the others are put together
        ours = [*counts[likely].tolist(), counts[~likely].sum().item()]
        theirs = [*expected[likely].tolist(), expected[~likely].sum().item()]
        return float(chisquare(ours, theirs).pvalue)

    assert fit(0.5) > 1e-4
    assert fit(1.0) < 1e-6


def test_training_goes_on_after_a_student_has_written() -> None:
    """Dropout is off while it writes and on again; what stood in evaluation mode stays there; its
    tokens take part in a training step."""
    model = random_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    frozen = model.transformer.h[0].eval()
    greedy = by(model, temperature=0.0)
    first = mixed(a_batch(2), 1.0, greedy, seed=0, step=0).batch.tokens
    assert model.training and not frozen.training and model.transformer.h[1].attn.training
    assert first.equal(mixed(a_batch(2), 1.0, greedy, seed=9, step=1).batch.tokens)
    assert not first.requires_grad and not first.is_inference()
    model(input_ids=first).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_modes_are_restored_when_writing_fails() -> None:
    model = random_model("llama").train()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert all(module.training for module in model.modules())
    model.eval()


def test_the_head_works_under_autocast() -> None:
    model = random_model("llama")
    written = by(model, autocast=torch.bfloat16)(a_batch(2).tokens[:, :4], 5, 0)
    assert written.shape == (2, 5) and written.dtype == torch.int64
