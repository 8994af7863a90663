"""The teacher that reads every batch, and the states behind its blocks."""

from __future__ import annotations

import pytest
import torch

from compresskit.distill.batch import Batch
from compresskit.distill.teachers.online import Online
from compresskit.errors import Conflict
from compresskit.hf.states import behind
from compresskit.hf.tiny import ARCHITECTURES, random_model

VOCABULARY, LENGTH = 512, 12


def a_batch(rows: int) -> Batch:
    drawing = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=drawing)
    return Batch(tokens, torch.ones(rows, LENGTH), torch.arange(rows) + 100)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_online_teacher_says_what_the_whole_model_says(architecture: str) -> None:
    model = random_model(architecture)
    teacher = Online(model)
    batch = a_batch(3)
    told = teacher.targets(batch)
    with torch.no_grad():
        whole = model(input_ids=batch.tokens).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        teacher.logprobs(told.hidden), whole.float().log_softmax(-1), rtol=0, atol=1e-4
    )
    assert told.hidden.shape[0] == batch.labels().shape[0]
    assert teacher.tokens_read == 3 * (LENGTH - 1) and teacher.vocabulary == VOCABULARY
    teacher.targets(batch)
    assert teacher.tokens_read == 6 * (LENGTH - 1)


def test_an_online_teacher_caps_its_logits_as_the_model_does() -> None:
    """Gemma's soft cap; the output layer alone, without it, must not pass for the model."""
    model = random_model("gemma3", final_logit_softcapping=3.0)
    teacher = Online(model)
    told = teacher.targets(a_batch(2))
    with torch.no_grad():
        whole = model(input_ids=a_batch(2).tokens).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        bare = model.lm_head(told.hidden).log_softmax(-1)
    torch.testing.assert_close(teacher.logprobs(told.hidden), whole, rtol=0, atol=1e-4)
    assert (bare - whole).abs().max() > 0.1


def test_an_online_teacher_is_frozen_and_sure_of_itself() -> None:
    model = random_model("gpt2", resid_pdrop=0.5).train()
    teacher = Online(model)
    assert not any(weight.requires_grad for weight in model.parameters())
    first = teacher.targets(a_batch(2)).hidden
    model.train()  # whoever trains a student beside it may do that
    assert teacher.targets(a_batch(2)).hidden.equal(first)
    assert not first.requires_grad


def test_states_are_those_behind_the_blocks() -> None:
    """transformers' own list has them too, but for the last block, whose state it normalises."""
    model = random_model("llama", num_hidden_layers=3)
    batch = a_batch(2)
    listed = model(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    hooks = [len(block._forward_hooks) for block in model.model.layers]  # transformers' own
    told = Online(model, states=(0, 2)).targets(batch)
    assert sorted(told.states) == [0, 2]
    torch.testing.assert_close(told.states[0], listed[1][:, :-1].flatten(0, 1))
    last = model.model.norm(told.states[2])
    torch.testing.assert_close(last, told.hidden)
    assert not told.states[2].allclose(told.hidden, atol=1e-2)
    assert [len(block._forward_hooks) for block in model.model.layers] == hooks
    with pytest.raises(Conflict, match="blocks 0 to 2"):
        Online(model, states=(3,))


def test_states_keep_the_gradient_of_a_student() -> None:
    model = random_model("llama")
    with behind(model, (1,)) as seen:
        model(input_ids=a_batch(1).tokens)
    assert seen[1].requires_grad
    with behind(model, ()) as nothing:
        model(input_ids=a_batch(1).tokens)
    assert nothing == {}


def test_autocast_is_used_and_named() -> None:
    model = random_model("llama")
    exact = Online(model).targets(a_batch(2))
    cast = Online(model, autocast=torch.bfloat16)
    told = cast.targets(a_batch(2))
    assert not told.hidden.equal(exact.hidden)
    assert cast.logprobs(told.hidden).dtype == torch.float32


def test_a_model_without_a_head_is_no_teacher() -> None:
    with pytest.raises(Conflict, match="no output layer"):
        Online(random_model("llama").base_model)
