"""Rows chosen by attention answer what rows drawn by lot cannot, at equal bytes.

The shipped model recalls words from far back ("Note the pet: Mira fox." ... "What is the pet of
Mira? Mira fox."), so which rows a cache keeps decides what it answers. Prompts end with their
question: the queries that judge have read it.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks.tiny import domains
from benchmarks.tiny.corpus import TEST
from benchmarks.tiny.dice import Dice
from compresskit.hf.cache import cache_bytes
from compresskit.methods.kv.h2o import H2O
from compresskit.methods.kv.pyramid import PyramidKV
from compresskit.methods.kv.quest import Quest
from compresskit.methods.kv.random import RandomEviction
from compresskit.methods.kv.snapkv import SnapKV
from compresskit.stats import mcnemar

PROMPTS, CHARACTERS, RATIO, ALPHA = 30, 400, 0.5, 0.01
"""Length and ratio were chosen on the validation split; the prompts here are of the test split."""


def probe(tokenizer, index):
    """Tokens of a text that ends with an answer, and how many of them come before it."""
    text, (answer,) = domains.probe(Dice(index), CHARACTERS, ("pet", "box")[index % 2])
    ids, head = tokenizer.encode(text), tokenizer.encode(text[: answer.start])
    # The space before the value is a token of its own unless the value follows.
    given = next(at for at in range(len(ids)) if at >= len(head) or ids[at] != head[at])
    return ids, given


def recalls(system, ids, given):
    """Whether greedy decoding gives the value; all but the last token given are the prompt."""
    cache = system.new_cache(len(ids))
    system.step(torch.tensor([ids[: given - 1]]), cache)
    return all(
        int(system.step(torch.tensor([[token]]), cache)[0, -1].argmax()) == following
        for token, following in pairwise(ids[given - 1 :])
    )


@pytest.fixture(scope="module")
def answers(open_stack):
    """Method -> which prompts it answered, and the bytes that it held after one of them."""
    methods = {
        "snapkv": SnapKV(ratio=RATIO, window=16),
        "h2o": H2O(ratio=RATIO),
        "pyramid": PyramidKV(ratio=RATIO, window=8),
        "quest": Quest(budget=64, dense_layers=0),
        "random": RandomEviction(ratio=RATIO),
        "random again": RandomEviction(ratio=RATIO),
    }
    right, held = {}, {}
    with open_stack() as opened, torch.inference_mode():
        prompts = [probe(opened.system.tokenizer, index) for index in TEST[:PROMPTS]]
        right["dense"] = [recalls(opened.system, *prompt) for prompt in prompts]
        for seed, (name, method) in enumerate(methods.items()):
            system = method.apply(opened.system, SimpleNamespace(seed=seed))
            right[name] = [recalls(system, *prompt) for prompt in prompts]
            cache = system.new_cache(PROMPTS)
            system.step(torch.tensor([prompts[0][0]]), cache)
            held[name] = cache_bytes(cache)
    return right, held


def compared(right, one, other):
    """Discordant answers and McNemar's exact p."""
    pairs = list(zip(right[one], right[other], strict=True))
    wins, losses = pairs.count((True, False)), pairs.count((False, True))
    return wins, losses, mcnemar(wins, losses)


def test_the_whole_cache_answers(answers):
    assert all(answers[0]["dense"])


@pytest.mark.parametrize("name", ["snapkv", "h2o", "pyramid", "quest"])
def test_attention_chooses_better_than_a_lot(answers, name):
    wins, losses, p = compared(answers[0], name, "random")
    assert wins > losses
    assert p < ALPHA


def test_two_lots_do_not_differ(answers):
    """Negative control: the test does not call everything better."""
    assert compared(answers[0], "random again", "random")[2] > ALPHA
    assert sum(answers[0]["random"]) < sum(answers[0]["dense"])


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_they_hold_the_same_bytes(answers, name):
    held = answers[1]
    assert held[name] == held["random"]
    assert held[name] == held["random again"]
