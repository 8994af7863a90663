"""speculative/hf_*: transformers' own loops say the same tokens, and leave everything as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from compresskit import assets
from compresskit.errors import Conflict, InputError
from compresskit.hf import assisted
from compresskit.spec import SamplingSpec
from compresskit.traits import Trait

ASSISTED = "speculative/hf_assisted"
LOOKUP = "speculative/hf_prompt_lookup"


def prompts(system, count=3, size=40):
    """Pieces of the held-out text."""
    ids = system.tokenizer.encode(assets.text_path("heldout").read_text(encoding="utf-8")[:2000])
    return [torch.tensor([ids[size * i : size * (i + 1)]]) for i in range(count)]


@pytest.fixture(scope="module")
def plain(open_stack):
    """The bare tiny model."""
    with open_stack() as opened:
        yield opened.system


@pytest.fixture(scope="module")
def theirs(open_stack):
    with open_stack(f"{ASSISTED}:draft=4") as opened:
        yield opened


# The same as ours


@pytest.mark.parametrize("method", [f"{ASSISTED}:draft=3", LOOKUP, f"{LOOKUP}:draft=4,max_match=3"])
@pytest.mark.parametrize("new", [1, 2, 40])
def test_the_tokens_are_those_of_plain_decoding(open_stack, lab, plain, method, new):
    with open_stack(method) as opened:
        for prompt in prompts(plain):
            request = lab.request(prompt, new)
            chunks = list(opened.system.generate(request))
            assert lab.rows(chunks) == lab.rows(plain.generate(request))
            # A lookup may draft beyond the last token asked for; no chunk says more than it holds.
            assert all(0 <= c.accepted <= min(c.drafted, int(c.lengths)) for c in chunks)
            assert all(c.tokens.shape == (1, int(c.lengths)) for c in chunks)


@pytest.mark.parametrize("draft", [1, 4, 8])
def test_counts_equal_ours_step_by_step(open_stack, lab, plain, draft):
    """They draft before the prompt is read, we after: given our first token, all steps are alike."""
    with (
        open_stack(f"speculative/draft_model:draft={draft}") as ours,
        open_stack(f"{ASSISTED}:draft={draft}") as others,
    ):
        accepted = 0
        for prompt in prompts(plain):
            first, *rest = ours.system.generate(lab.request(prompt, 41))
            longer = torch.cat((prompt, first.tokens), 1)
            steps = list(others.system.generate(lab.request(longer, 40)))
            assert [c.drafts for c in steps] == [c.drafts for c in rest]
            assert [c.tokens.tolist() for c in steps] == [c.tokens.tolist() for c in rest]
            accepted += sum(c.accepted for c in steps)
        assert accepted > 0


@pytest.mark.parametrize(
    ("new", "steps", "last"), [(20, 4, (4, 4)), (22, 5, (1, 1)), (23, 5, (2, 2))]
)
def test_a_draft_that_is_the_target_is_always_right(open_stack, lab, new, steps, last):
    with open_stack(f"{ASSISTED}:model=tiny,draft=4") as opened:
        chunks = list(opened.system.generate(lab.request(prompts(opened.system)[0], new)))
    assert len(chunks) == steps
    assert chunks[-1].drafts == (last,)


@pytest.mark.parametrize("place", range(1, 7))
def test_a_stop_token_inside_a_draft_counts_as_accepted(open_stack, lab, plain, place):
    """transformers' own count of matches is one short there."""
    prompt = prompts(plain)[0]
    answer = lab.rows(plain.generate(lab.request(prompt, 20)))[0]
    with open_stack(f"{ASSISTED}:model=tiny,draft=4") as opened:
        request = lab.request(prompt, 20, stop=(answer[place],))
        chunks = list(opened.system.generate(request))
    end = answer.index(answer[place]) + 1
    assert lab.rows(chunks) == [answer[:end]]
    # Four drafts and one bonus a step; a stop token in fifth place is the bonus.
    assert sum(c.accepted for c in chunks) == end - end // 5


# What it leaves behind


def state(system, draft):
    models = system.model, draft.model
    configs = [model.generation_config for model in models]
    return (
        [id(config) for config in configs],
        [config.to_dict() for config in configs],
        [assisted.HOOK in vars(model) for model in models],
        threading.active_count(),
        torch.get_num_threads(),
    )


def test_configs_hooks_and_threads_are_as_before(lab, theirs):
    system, (draft,) = theirs.system, theirs.system.drafts
    before = state(system, draft)
    request = lab.request(prompts(system)[0], 20)
    list(system.generate(request))
    assert state(system, draft) == before
    running = system.generate(request)
    next(running)
    # Meanwhile things do differ, or the comparison would say nothing.
    assert state(system, draft) != before
    running.close()
    assert state(system, draft) == before


def test_an_error_inside_arrives_outside(lab, theirs, monkeypatch):
    system, (draft,) = theirs.system, theirs.system.drafts
    before = state(system, draft)
    right, calls = draft.model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 6:
            raise ValueError("planted")
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(draft.model, "forward", failing)
        with pytest.raises(ValueError, match="planted"):
            list(system.generate(lab.request(prompts(system)[0], 20)))
    assert state(system, draft) == before


def test_nothing_runs_ahead_of_what_is_asked_for(lab, theirs, monkeypatch):
    system = theirs.system
    right, passes = system.model.forward, []

    def counting(*args, **kwargs):
        passes.append(1)
        return right(*args, **kwargs)

    monkeypatch.setattr(system.model, "forward", counting)
    for number, _ in enumerate(system.generate(lab.request(prompts(system)[0], 20)), start=1):
        assert len(passes) == number


# Refusals


def test_several_rows_are_refused(lab, theirs):
    with pytest.raises(InputError, match="takes one row, not 2"):
        list(theirs.system.generate(lab.request(lab.prompt(5, vocabulary=500).expand(2, -1), 4)))


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP])
def test_sampled_requests_are_refused(open_stack, lab, method):
    request = lab.request(
        lab.prompt(5, vocabulary=500), 4, sampling=SamplingSpec(temperature=1.0, top_k=3)
    )
    with open_stack(method) as opened, pytest.raises(InputError, match="Set temperature 0"):
        list(opened.system.generate(request))


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP])
@pytest.mark.parametrize("other", ["kv/int8", "kv/sink_window", "kv/none", "reuse/prefix_block"])
def test_methods_that_it_would_pass_over_are_refused(open_stack, method, other):
    with pytest.raises(Conflict, match="needs"), open_stack(other, method):
        pass


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP])
def test_it_is_eager_and_for_one_row(open_stack, method):
    with open_stack(method) as opened:
        assert not {Trait.BATCH, Trait.PADDED_BATCH, Trait.OWN_LOOP} & opened.traits
    with pytest.raises(Conflict, match="compiled"), open_stack(method, mode="compiled"):
        pass


def test_a_transformers_without_the_hook_is_refused(lab, plain, monkeypatch):
    monkeypatch.setattr(assisted, "HOOK", "_no_such_hook")
    with pytest.raises(Conflict, match="_no_such_hook"):
        list(assisted.bursts(plain.model, lab.request(prompts(plain)[0], 4), {}))


def test_a_larger_draft_is_refused_before_it_is_loaded(open_stack):
    with (
        pytest.raises(Conflict, match="larger than tiny:draft"),
        open_stack(f"{ASSISTED}:model=tiny", model="tiny:draft"),
    ):
        pass
