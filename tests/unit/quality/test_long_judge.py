"""Answers through caches: a reader who remembers everything, and what forgetting costs it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compresskit import artefact
from compresskit.errors import RunError, SpecError
from compresskit.metrics.tasks import findings, overall
from compresskit.quality.evaluate import evaluate
from compresskit.quality.long.answer import answer
from compresskit.quality.long.judge import judge, write
from compresskit.spec import MethodSpec, QualitySpec, RunSpec, TaskSpec

QUESTION = re.compile(r"access codes? of the ([a-z ]+?) (?:is|are:) ?([\d, ]*)$")


class Tape:
    """A cache that is its tokens."""

    def __init__(self):
        self.keys = torch.zeros(1, 1, 0, 1)
        self.layers = []
        self.passes = []


def reader(tokenizer, *, keep=None):
    """A system that looks up the access code in what its cache holds and spells it out.

    After the first pass only the newest `keep` tokens stay.
    """

    def step(tokens, cache, **_):
        new = tokens.float()[:, None, :, None]
        cache.keys = torch.cat((cache.keys, new), dim=2)
        text = tokenizer.decode(cache.keys.flatten().long().tolist())
        if keep is not None and not cache.passes:
            cache.keys = cache.keys[:, :, -keep:].clone()
        cache.passes.append(tokens.shape[1])
        logits = torch.zeros(1, 1, 258)
        logits[0, 0, ord(next_character(text))] = 1
        return logits

    return SimpleNamespace(
        step=step,
        new_cache=lambda room: Tape(),
        prompt=lambda tokens: tokens,
        attached=lambda: torch.no_grad(),
        tokenizer=tokenizer,
        device=SimpleNamespace(torch=torch.device("cpu")),
        context=100_000,
    )


def next_character(text):
    asked = QUESTION.search(text)
    if asked is None:
        return "?"
    key, said = asked.groups()
    code = re.search(rf"access code of the {key} is (\d+)\.", text)
    known = code.group(1) if code else "nothing"
    return f"{known}\n"[len(said)]


@pytest.fixture
def spec():
    return TaskSpec(
        names=("niah_single",), tokens=900, samples=10, depths=(0.0, 0.25, 0.5, 0.75, 1.0)
    )


def judged(system, baseline, spec, **options):
    return judge(
        system, baseline, spec, tiny=False, seed=0, baseline_digest="0123456789ab", **options
    )


@pytest.mark.parametrize("when", ["aware", "agnostic"])
def test_a_full_cache_answers_and_the_lead_is_no_part_of_the_prefill(bytes_tokenizer, spec, when):
    system = reader(bytes_tokenizer())
    tape = Tape()
    system.new_cache = lambda room: tape
    prompt = write(system.tokenizer, "niah_single", spec, style="plain", seed=0)[0]
    found = answer(system, prompt, when)
    question = prompt.questions[0]
    assert (found.score, found.length) == (1, 6)
    if when == "aware":
        expected = [len(prompt.context) + len(question.asked), len(question.lead)]
    else:
        expected = [len(prompt.context), len(question.asked) + len(question.lead)]
    # The line's end is not fed: nothing is asked behind it.
    assert tape.passes == [*expected, 1, 1, 1, 1, 1]
    assert found.seen == expected[0]
    assert found.held == 4 * found.seen


def test_forgetting_costs_exactly_what_was_forgotten(bytes_tokenizer, spec):
    tokenizer = bytes_tokenizer()
    quality = judged(reader(tokenizer, keep=400), reader(tokenizer), spec)
    for one in findings(quality):
        # Depths 0 and 0.25 of 900 characters lie before the newest 400, 0.75 and 1 within.
        assert 4 <= one.lost <= 6
        assert (one.reference, one.won, one.floor, one.removed) == (1, 0, 0, 0)
        assert one.score == 1 - one.lost / 10
        assert one.delta.value == pytest.approx(-one.lost / 10)
        assert one.delta.high < 0
        assert one.identical == 10 - one.lost
        # Window and truncation hold the same tokens, so they answer the same.
        assert one.truncated == one.score
        assert (one.standing, one.length_delta > 0) == ("ok", True)
    assert overall(findings(quality), "aware").worst.task == "niah_single"
    (result,) = quality.results
    assert result.depths == (0.0, 0.25, 0.5, 0.75, 1.0) * 2
    assert result.answers["agnostic"].scores[4::5] == (1, 1)
    assert result.answers["agnostic"].scores[0::5] == (0, 0)
    assert {max(one.context_tokens) for one in result.controls.values() if one.context_tokens} == {
        400,
        400
        - min(
            len(p.questions[0].asked)
            for p in write(tokenizer, "niah_single", spec, style="plain", seed=0)
        ),
    }


def test_a_cache_as_large_as_the_full_one_loses_nothing_and_has_no_truncated_control(
    bytes_tokenizer, spec
):
    tokenizer = bytes_tokenizer()
    quality = judged(reader(tokenizer), reader(tokenizer), spec)
    for one in findings(quality):
        assert (one.delta.value, one.lost, one.won, one.truncated) == (0, 0, 0, None)
    assert "no fewer bytes" in quality.notes[0]


def test_a_reference_that_fails_makes_a_task_uninformative_not_lossless(bytes_tokenizer, spec):
    tokenizer = bytes_tokenizer()
    lost = reader(tokenizer, keep=200)
    quality = judged(reader(tokenizer, keep=100), lost, spec)
    assert {one.standing for one in findings(quality)} == {"uninformative"}
    assert overall(findings(quality), "aware") is None


def test_a_task_that_needs_no_text_is_invalid(bytes_tokenizer, spec):
    """The must-fail control: without the needle the full cache has to get worse, and here does not."""
    tokenizer = bytes_tokenizer()
    prompts = write(tokenizer, "niah_single", spec, style="plain", seed=0)
    codes = {prompt.questions[0].references[0] for prompt in prompts}

    def knows(system):
        def step(tokens, cache, **options):
            logits = system.step(tokens, cache, **options)
            text = tokenizer.decode(cache.keys.flatten().long().tolist())
            said = QUESTION.search(text)
            if said:
                key = said.group(1)
                code = next(
                    p.questions[0].references[0]
                    for p in prompts
                    if key in tokenizer.decode(list(p.questions[0].asked))
                )
                logits[:] = 0
                logits[0, 0, ord(f"{code}\n"[len(said.group(2))])] = 1
            return logits

        return SimpleNamespace(**{**vars(system), "step": step})

    assert len(codes) == 10
    spec = spec.model_copy(update={"samples": 1, "depths": (0.0,)})
    quality = judged(reader(tokenizer), knows(reader(tokenizer)), spec)
    assert {one.standing for one in findings(quality)} == {"invalid"}
    assert overall(findings(quality), "agnostic") is None


def test_a_run_that_is_its_own_baseline_has_scores_and_controls_but_no_delta(bytes_tokenizer, spec):
    aware = spec.model_copy(update={"questions": ("aware",)})
    quality = judged(reader(bytes_tokenizer()), None, aware)
    (one,) = findings(quality)
    assert (one.score, one.delta, one.removed, one.when) == (1, None, 0, "aware")
    assert quality.baseline_digest is None
    # The noise floor needs both ways whatever was asked for.
    assert set(quality.results[0].reference) == {"aware", "agnostic"}


def test_the_protocol_knows_every_prompt(bytes_tokenizer, spec):
    system = reader(bytes_tokenizer())
    ids = {
        judged(system, None, spec.model_copy(update=change)).protocol_id
        for change in ({"samples": 1}, {"samples": 2}, {"samples": 1, "tokens": 800})
    }
    ids.add(
        judge(
            system,
            None,
            spec.model_copy(update={"samples": 1}),
            tiny=False,
            seed=1,
            baseline_digest="x",
        ).protocol_id
    )
    ids.add(
        judge(
            system,
            None,
            spec.model_copy(update={"samples": 1}),
            tiny=True,
            seed=0,
            baseline_digest="x",
        ).protocol_id
    )
    assert len(ids) == 5


def test_progress_counts_prompts(bytes_tokenizer, spec):
    seen = []
    judged(
        reader(bytes_tokenizer()),
        None,
        spec.model_copy(update={"samples": 2}),
        progress=lambda *said: seen.append(said),
    )
    assert seen == [("task prompts", 1, 2), ("task prompts", 2, 2)]


def test_prompts_longer_than_the_context_are_refused(bytes_tokenizer, spec):
    system = reader(bytes_tokenizer())
    system.context = 900
    with pytest.raises(SpecError, match=r"more than the model's context of 900"):
        judged(system, None, spec)


def test_logits_that_are_no_numbers_are_no_answer(bytes_tokenizer, spec):
    system = reader(bytes_tokenizer())
    step = system.step
    system.step = lambda *args, **options: step(*args, **options) * float("nan")
    with pytest.raises(RunError, match="not finite"):
        judged(system, None, spec)


def test_the_quality_pass_answers_tasks_only_where_they_are_asked_for(system, text):
    tasks = TaskSpec(names=("niah_single",), tokens=150, samples=1, style="tiny")
    small = QualitySpec(text=str(text), prefill=16, continuation=4, windows=2, greedy_prompts=0)
    options = {"cache_changed": False, "batch_allowed": True, "baseline_digest": "x"}
    assert evaluate(system, None, small, **options).tasks is None
    found = evaluate(system, system, small.model_copy(update={"tasks": tasks}), **options)
    assert [result.task for result in found.tasks.results] == ["niah_single"]
    # A random model answers nothing, and says so instead of claiming no loss.
    assert {one.standing for one in findings(found.tasks)} == {"uninformative"}


@pytest.fixture(scope="module")
def tiny():
    """The trained model with its own cache, and with one that forgets all but 4 + 60 tokens."""
    window = MethodSpec(name="kv/sink_window", params={"sink": 4, "window": 60})
    plan = artefact.plan(RunSpec(stack=(window,)))
    with artefact.opened(plan) as found, artefact.opened(artefact.plan(RunSpec())) as dense:
        yield dense.system, found.system


def test_the_trained_model_recalls_and_a_window_forgets(tiny):
    dense, window = tiny
    spec = TaskSpec(names=("niah_single",), tokens=220, samples=6, depths=(0.0, 0.4))
    quality = judge(window, dense, spec, tiny=True, seed=0, baseline_digest="x")
    for one in findings(quality):
        assert one.standing == "ok"
        assert one.reference == 1
        assert one.score < 0.6
        assert one.delta.high < 0
    ((result,),) = (quality.results,)
    assert all(200 < length <= 220 for length in result.prompt_tokens)


def test_a_window_larger_than_the_prompt_changes_no_answer(tiny):
    dense, window = tiny
    spec = TaskSpec(names=("niah_single",), tokens=48, samples=2, depths=(0.0,))
    roomy = replace(window, new_cache=dense.new_cache)
    quality = judge(roomy, dense, spec, tiny=True, seed=0, baseline_digest="x")
    assert {one.identical for one in findings(quality)} == {2}


def test_a_baseline_of_another_tokenizer_reads_the_tasks_in_its_own_tokens(bytes_tokenizer, spec):
    class Shifted(bytes_tokenizer):
        def encode(self, text, *, special=True):
            return [token + 1 for token in super().encode(text, special=special)]

        def decode(self, ids):
            return super().decode([token - 1 for token in ids])

    quality = judged(reader(bytes_tokenizer()), shifted_reader(Shifted()), spec)
    (task,) = quality.results
    for answers in (task.answers["aware"], task.reference["aware"]):
        assert set(answers.scores) == {1.0}
    assert not any(name.startswith("truncated") for name in task.controls)
    assert any("another tokenizer" in note for note in quality.notes)
    # Negative control: in the other's tokens it understands nothing.
    prompt = write(bytes_tokenizer(), "niah_single", spec, style="plain", seed=0)[0]
    assert answer(shifted_reader(Shifted()), prompt, "aware").score == 0


def shifted_reader(tokenizer):
    """A reader whose vocabulary begins one id later."""
    system = reader(tokenizer)
    inner = system.step
    system.step = lambda tokens, cache, **options: torch.roll(
        inner(tokens, cache, **options), 1, dims=-1
    )
    return system
