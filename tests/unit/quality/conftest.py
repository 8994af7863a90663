"""A random model that reads bytes: quality arithmetic needs no trained one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from compresskit.spec import QualitySpec

TEXT = " ".join(f"{number} times {number % 7} is {number * (number % 7)}." for number in range(120))


class Bytes:
    """One token per byte; 256 is BOS, 257 ends a text."""

    has_chat_template = False

    def __init__(self, *, bos=False, eos_ids=()):
        self.eos_ids = eos_ids
        self.bos_id = 256
        self.adds_bos = bos

    def encode(self, text, *, special=True):
        return [256] * (special and self.adds_bos) + list(text.encode())

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def spec(text):
    """A small evaluation; options override."""

    def build(**options):
        small = {
            "protocol": "auto",
            "tokens": 96,
            "window": 32,
            "prefill": 16,
            "continuation": 8,
            "windows": 3,
            "greedy_prompts": 2,
            "greedy_tokens": 6,
        }
        return QualitySpec(text=str(text), **{**small, **options})

    return build


@pytest.fixture
def system(lab):
    """The baseline."""
    return replace(lab.system("llama"), tokenizer=Bytes())


@pytest.fixture
def perturbed(system):
    """The baseline with noise on all its weights."""
    model = copy.deepcopy(system.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    return replace(system, model=model, step=step_of(model))


def step_of(model):
    def step(tokens, cache, *, mask=None, positions=None, keep=1):
        return model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits

    return step


@pytest.fixture
def with_step(system):
    """Make a system whose logits are changed by `change(logits, tokens)`."""

    def build(change):
        def step(tokens, cache, **options):
            return change(system.step(tokens, cache, **options), tokens)

        return replace(system, step=step)

    return build


@pytest.fixture
def bytes_tokenizer():
    return Bytes
