"""The module that training moves: sums over places, hidden states, and nothing left out of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compresskit.distill.batch import Batch, Dense
from compresskit.distill.lesson import Lesson
from compresskit.distill.losses.terms import parse
from compresskit.errors import Conflict, SpecError
from compresskit.hf import blocks, head
from compresskit.hf.tiny import ARCHITECTURES, random_model

ROWS, LENGTH = 3, 10


def student(architecture: str = "llama", **overrides: Any) -> Any:
    return random_model(architecture, seed=2, **overrides).requires_grad_(True)


def batch(*, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 512, (ROWS, LENGTH), generator=generator)
    weights = torch.rand(ROWS, LENGTH, generator=generator)
    weights[0, 4:] = 0.0
    return Batch(tokens, weights, torch.arange(ROWS))


@torch.no_grad()
def told(teacher: Any, of: Batch, wanted: tuple[int, ...] = ()) -> Dense:
    states, handles = {}, []
    for index in wanted:

        def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
            found = output[0] if isinstance(output, tuple) else output
            states[index] = found.flatten(0, 1)

        handles.append(blocks.find(teacher)[index].module.register_forward_hook(keep))
    base, top = head.split(teacher)
    hidden = base(input_ids=of.tokens[:, :-1], use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return Dense(hidden.flatten(0, 1), top, states)


def plainly(model: Any, teacher: Any, of: Batch) -> torch.Tensor:
    """Cross-entropy and forward KL from the models' own logits, by torch's own losses."""
    ours = model(input_ids=of.tokens).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        theirs = teacher(input_ids=of.tokens).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    ce = torch.nn.functional.cross_entropy(ours, of.labels(), reduction="none")
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs, log_target=True, reduction="none"
    ).sum(-1)
    return ((0.5 * ce + 2 * kl) * of.label_weights()).sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_what_the_plain_loss_says(architecture):
    model, teacher, of = student(architecture), random_model(architecture, seed=1), batch()
    lesson = Lesson(model, parse("ce:weight=0.5 + forward_kl:weight=2"), chunk=4)
    loss = lesson(of.tokens, of.weights, told(teacher, of))
    expected = plainly(model, teacher, of)
    torch.testing.assert_close(loss.total, expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(loss.weight, of.label_weights().sum())
    found = []
    for total in (loss.total, expected):
        model.zero_grad()
        total.backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_places_of_no_weight_are_not_computed():
    model, of, counted = student(), batch(), []
    lesson = Lesson(model, parse("ce"))
    handle = model.lm_head.register_forward_hook(
        lambda _, args, __: counted.append(args[0].shape[0])
    )
    lesson(of.tokens, of.weights, None).total.backward()
    handle.remove()
    # One place first, which shows the size of the vocabulary.
    assert counted == [1, int((of.label_weights() > 0).sum())] and counted[1] < ROWS * (LENGTH - 1)


def test_a_step_does_not_depend_on_how_it_is_cut():
    """The reduction trap: means of parts would weigh the rows of the lighter part more."""
    model, teacher, of = student(), random_model("llama", seed=1), batch()
    lesson = Lesson(model, parse("forward_kl"))
    steps, means = [], []
    for cuts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model.zero_grad()
        weight = of.label_weights().sum()
        mean = 0.0
        for rows in cuts:
            part = Batch(of.tokens[rows], of.weights[rows], of.rows[rows])
            loss = lesson(part.tokens, part.weights, told(teacher, part))
            (loss.total / weight).backward()
            mean += (loss.total / loss.weight).item() / len(cuts)
        steps.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
        means.append(mean)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)
    assert abs(means[0] - means[1]) > 0.01


def test_hidden_states_of_a_narrower_student_go_through_projections():
    teacher, of = random_model("llama", seed=1, num_hidden_layers=3), batch()
    model = student(hidden_size=32)
    lesson = Lesson(model, parse("hidden:at=every"), blocks=(2, 0), teacher_width=64)
    assert lesson.needs_states == (0, 2)
    target = told(teacher, of, (0, 2))
    loss = lesson(of.tokens, of.weights, target)
    states = []
    for block in blocks.find(model):
        block.module.register_forward_hook(lambda _, __, output: states.append(output))
    model.base_model(input_ids=of.tokens[:, :-1])
    expected = 0.0
    for index, number in enumerate((2, 0)):
        ours = lesson.projections[index](states[index].flatten(0, 1))
        square = ((ours - target.states[number]) ** 2).mean(-1)
        expected += (square * of.label_weights()).sum() / 2
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.parts["hidden"], expected.detach())
    loss.total.backward()
    assert all(one.weight.grad.any() for one in lesson.projections)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    model, of = student(), batch()
    terms = parse("forward_kl + jsd + tvd + hidden:at=every")
    lesson = Lesson(model, terms, blocks=(0, 1), teacher_width=64)
    loss = lesson(of.tokens, of.weights, told(model, of, (0, 1)))
    assert loss.total.item() == pytest.approx(0, abs=1e-4)
    assert not lesson.projections
    other = lesson(of.tokens, of.weights, told(random_model("llama", seed=1), of, (0, 1)))
    assert all(part > 0.1 for part in other.parts.values())


@pytest.mark.parametrize("everywhere", [False, True])
def test_last_hidden_state_is_the_one_under_the_logits(everywhere):
    model, teacher, of = student(), random_model("llama", seed=1), batch()
    of.weights.add_(0.5 * everywhere)
    assert (of.label_weights() > 0).all() == everywhere
    lesson = Lesson(model, parse("hidden"), teacher_width=64)
    target = told(teacher, of)
    ours = model.base_model(input_ids=of.tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    square = (ours - target.hidden).square().mean(-1)
    loss = lesson(of.tokens, of.weights, target)
    torch.testing.assert_close(loss.total, (square * of.label_weights()).sum())
    assert lesson.needs_states == ()


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("text", ["ce + forward_kl + hidden:at=every", "hidden:at=every"])
def test_everything_trainable_takes_part(empty, text):
    """Also in a batch of which nothing counts, or a wrapped module would wait for ever."""
    model = student(hidden_size=32, tie_word_embeddings=False)
    teacher, of, terms = random_model("llama", seed=1), batch(), parse(text)
    lesson = Lesson(model, terms, blocks=(0, 1), teacher_width=64)
    weights = of.weights * (not empty)
    loss = lesson(of.tokens, weights, told(teacher, of, (0, 1)))
    loss.total.backward()
    assert all(one.grad is not None for one in lesson.parameters())
    assert (loss.total.item() == 0) == empty


def test_a_wrapped_lesson_learns_the_same(tmp_path):
    """One process of a group of one: its hooks want every gradient exactly once."""
    teacher, of, found = random_model("llama", seed=1), batch(), []
    for wrapped in (False, True):
        model = student(hidden_size=32)
        terms = parse("ce + forward_kl + hidden")
        torch.manual_seed(0)
        lesson: Any = Lesson(model, terms, teacher_width=64)
        if wrapped:
            store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            lesson = torch.nn.parallel.DistributedDataParallel(lesson)
        try:
            for _ in range(2):  # a second pass tells of parameters that the first one left out
                lesson.zero_grad()
                lesson(of.tokens, of.weights, told(teacher, of)).total.backward()
        finally:
            if wrapped:
                torch.distributed.destroy_process_group()
        found.append(torch.cat([one.grad.flatten() for one in lesson.parameters()]))
    torch.testing.assert_close(*found)


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model, teacher, of = student(), random_model("llama", seed=1), batch()
        terms = parse("forward_kl + hidden:at=every")
        options: dict[str, Any] = {"blocks": (0, 1), "teacher_width": 64}
        lesson = Lesson(model, terms, **options, checkpointing=checkpointing).train()
        calls = []
        blocks.find(model)[0].module.mlp.register_forward_pre_hook(
            lambda *_, to=calls: to.append(1)
        )
        loss = lesson(of.tokens, of.weights, told(teacher, of, (0, 1)))
        loss.total.backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
        assert len(calls) == 1 + checkpointing
    torch.testing.assert_close(*found)


def test_wrong_lessons_are_refused():
    model, of = student(), batch()
    with pytest.raises(Conflict, match="width"):
        Lesson(model, parse("hidden"))
    with pytest.raises(Conflict, match=r"each of the student's 2 \(there are 1\)"):
        Lesson(model, parse("hidden:at=every"), blocks=(0,), teacher_width=64)
    with pytest.raises(SpecError, match="needs a teacher"):
        Lesson(model, parse("forward_kl"))(of.tokens, of.weights, None)


def test_a_teacher_that_was_not_asked_for_its_blocks_is_refused():
    model, of = student(), batch()
    lesson = Lesson(model, parse("hidden:at=every"), blocks=(0, 1), teacher_width=64)
    with pytest.raises(Conflict, match=r"blocks \[0, 1\], and its target lacks \[1\]"):
        lesson(of.tokens, of.weights, told(model, of, (0,)))
