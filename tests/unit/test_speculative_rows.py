"""Rows that grow apart in one cache, and trees: each row is what it is alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from compresskit.decode import pad
from compresskit.errors import RunError
from compresskit.hf import slots
from compresskit.hf.cache import new_dynamic, static
from compresskit.methods.kv.int8 import Int8Cache
from compresskit.methods.kv.rotate import Rotate
from compresskit.methods.speculative import _rows
from compresskit.methods.speculative._draft import Draft, EachRow
from compresskit.methods.speculative._loop import speculate
from compresskit.methods.speculative._rows import Rows

LENGTHS = (3, 9, 17, 30)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "gpt2", "mixtral")
"""Those without windows."""


class Guesses:
    """Drafts a known answer, each token right with probability `right`; as a tree with decoys."""

    def __init__(self, answer, *, right=0.6, seed=0, size=4, tree=False):
        self.answer, self.right, self.size, self.tree = answer, right, size, tree
        self.at, self.dice = None, random.Random(seed)

    def observe(self, tokens):
        self.at = 0 if self.at is None else self.at + len(tokens)

    def draft(self, limit):
        tokens, parents, last = [], [], -1
        for place in range(self.at, min(self.at + min(limit, self.size), len(self.answer))):
            good = (self.answer[place] + (self.dice.random() >= self.right)) % 300
            candidates = [good, (good + 7) % 300, (good + 9) % 300] if self.tree else [good]
            self.dice.shuffle(candidates)
            parents += [last] * len(candidates)
            last = len(tokens) + candidates.index(good)
            tokens += candidates
        return Draft(tokens, parents=parents) if self.tree else Draft(tokens)


@pytest.fixture
def texts(lab):
    return [lab.prompt(length, seed=length)[0].tolist() for length in LENGTHS]


def alone(lab, system, texts, new):
    return [lab.rows(system.generate(lab.request(torch.tensor([text]), new)))[0] for text in texts]


def together(lab, system, texts, answers, new, **options):
    tokens, mask = pad(texts, device=torch.device("cpu"))
    drafter = EachRow([Guesses(answer, seed=row, **options) for row, answer in enumerate(answers)])
    return lab.rows(speculate(system, lab.request(tokens, new, mask=mask), drafter))


@pytest.mark.parametrize("tree", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_of_a_batch_is_what_it_is_alone(lab, texts, name, tree):
    system = lab.system(name)
    answers = alone(lab, system, texts, 40)
    assert together(lab, system, texts, answers, 40, tree=tree) == answers


@pytest.mark.parametrize("right", [0, 0.3, 1])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_single_row_needs_no_more_slots_than_tokens(lab, texts, right, tree):
    system = lab.system("llama")
    answers = alone(lab, system, texts[-1:], 40)
    caches = []

    def new_cache(capacity):
        caches.append(new_dynamic(system.model.config))
        return caches[-1]

    seen = replace(system, new_cache=new_cache)
    assert together(lab, seen, texts[-1:], answers, 40, right=right, tree=tree) == answers
    # The last pass is not taken back: its block is one token and at most a draft.
    most = LENGTHS[-1] + 40 + (12 if tree else 4)
    assert caches[0].get_seq_length() <= most


@pytest.mark.parametrize("loose", [1.0, 1.1, 100])
@pytest.mark.parametrize("tree", [False, True], ids=["chains", "trees"])
def test_gathering_the_slots_changes_nothing(lab, texts, loose, tree, monkeypatch):
    gathered = []
    right = _rows.rearrange
    monkeypatch.setattr(_rows, "LOOSE", loose)
    monkeypatch.setattr(_rows, "rearrange", lambda *args: (gathered.append(1), right(*args))[-1])
    system = lab.system("qwen3")
    answers = alone(lab, system, texts, 40)
    assert together(lab, system, texts, answers, 40, right=0.3, tree=tree) == answers
    assert bool(gathered) == (loose < 100)


@pytest.mark.parametrize("tree", [False, True], ids=["chains", "trees"])
def test_a_cache_of_fixed_size_is_gathered_when_it_is_full(lab, texts, tree):
    system = lab.system("llama")
    fixed = replace(
        system, new_cache=lambda capacity: static(system.model.config, capacity), widths=(1, 13)
    )
    answers = alone(lab, system, texts, 40)
    assert together(lab, fixed, texts, answers, 40, right=0.2, tree=tree) == answers


@pytest.mark.parametrize("tree", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("method", [Int8Cache(), Rotate()], ids=["int8", "rotate"])
def test_caches_of_codes_with_a_code_per_token(lab, texts, method, tree):
    system = method.apply(lab.system("llama"), None)
    answers = alone(lab, system, texts, 30)
    assert together(lab, system, texts, answers, 30, tree=tree) == answers


@pytest.mark.parametrize("place", [2, 5, 11])
def test_rows_that_stop_early_leave_the_others_alone(lab, texts, place):
    system = lab.system("llama")
    answers = alone(lab, system, texts, 30)
    stop = (answers[1][place],)
    tokens, mask = pad(texts, device=torch.device("cpu"))
    request = lab.request(tokens, 30, mask=mask, stop=stop)
    cut = [
        answer[: answer.index(stop[0]) + 1] if stop[0] in answer else answer for answer in answers
    ]
    drafter = EachRow([Guesses(answer, seed=row) for row, answer in enumerate(answers)])
    chunks = list(speculate(system, request, drafter))
    assert lab.rows(chunks) == cut
    for chunk in chunks:
        for length, (drafted, accepted) in zip(chunk.lengths.tolist(), chunk.drafts, strict=True):
            assert accepted <= drafted
            assert length in (accepted, accepted + 1)  # a stop inside the draft ends without bonus


def test_passes_of_fixed_width_are_filled_up_and_the_filling_is_forgotten(lab, texts):
    system = lab.system("llama")
    answers = alone(lab, system, texts, 30)
    widths = []

    def step(tokens, cache, **options):
        widths.append(tokens.shape[1])
        return system.step(tokens, cache, **options)

    fixed = replace(system, step=step, widths=(1, 5), fixed_widths=True)
    assert together(lab, fixed, texts, answers, 30) == answers
    assert set(widths[1:]) <= {1, 5}
    assert together(lab, fixed, texts[:1], answers[:1], 30) == answers[:1]


# What must fail


def test_slots_that_are_not_masked_show(lab, texts, monkeypatch):
    system = lab.system("llama")
    answers = alone(lab, system, texts, 40)
    monkeypatch.setattr(Rows, "_crop", lambda self: self.valid.fill_(True))
    assert together(lab, system, texts, answers, 40) != answers


def test_a_tree_under_a_causal_mask_shows(lab, texts, monkeypatch):
    system = lab.system("llama")
    answers = alone(lab, system, texts[-1:], 40)

    def causal(self, blocks, width):
        old = self.valid.shape[1]
        return torch.ones(1, 1, width, old + width, dtype=torch.bool).tril(old)

    monkeypatch.setattr(Rows, "_tree_mask", causal)
    assert together(lab, system, texts[-1:], answers, 40, tree=True) != answers


def test_kept_slots_that_do_not_move_show(lab, texts, monkeypatch):
    system = lab.system("llama")
    answers = alone(lab, system, texts[-1:], 40)
    monkeypatch.setattr(
        _rows, "keep", lambda cache, new, kept: slots.roll_back(cache, new - len(kept))
    )
    assert together(lab, system, texts[-1:], answers, 40, tree=True) != answers


@torch.inference_mode()
def test_single_slots_of_a_window_cannot_be_dropped(lab):
    system = lab.system("gemma3_text")
    cache = system.new_cache(40)
    system.step(lab.prompt(20), cache)
    with pytest.raises(RunError, match="goes by slots"):
        slots.keep(cache, 3, [0, 2])
    with pytest.raises(RunError, match="goes by slots"):
        slots.rearrange(cache, torch.arange(10)[None])
