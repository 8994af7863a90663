"""Every method on every family of models: small random ones, saved and loaded like any folder.

Random weights prove mechanics only. float32, so that lossless methods must give equal tokens.
"""

from __future__ import annotations

import pytest
import torch

from compresskit import artefact as artefacts, assets, catalogue
from compresskit.hf.tiny import random_model
from compresskit.spec import ModelSpec, RunSpec, SamplingSpec
from compresskit.system import Request
from compresskit.traits import Trait

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "mixtral",
    "qwen3_moe",
)
STACKS = (
    ("quant/int8",),
    ("quant/int4:group=32",),
    ("kv/int8",),
    ("kv/sink_window:window=24",),
    ("speculative/ngram",),
    ("quant/int8", "kv/int8", "speculative/ngram"),
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    """A model folder with the shipped tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    random_model(request.param).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((assets.tiny_path("target") / name).read_bytes())
    return path


def greedy(folder, *methods: str, new: int = 40) -> tuple[list[int], frozenset[Trait]]:
    spec = RunSpec(
        model=ModelSpec(name=str(folder)),
        device="cpu",
        stack=tuple(catalogue.parse_method(text) for text in methods),
    )
    with artefacts.opened(artefacts.plan(spec)) as artefact:
        system = artefact.system
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
        request = Request(tokens=ids, max_new_tokens=new, sampling=SamplingSpec())
        tokens: list[int] = []
        for chunk in system.generate(request):
            tokens += chunk.tokens[0, : int(chunk.lengths[0])].tolist()
        return tokens, artefact.traits


def test_every_stack_runs_and_lossless_ones_are(folder) -> None:
    dense, traits = greedy(folder)
    assert len(dense) == 40
    assert Trait.LOSSLESS in traits
    for stack in STACKS:
        tokens, traits = greedy(folder, *stack)
        assert len(tokens) == 40, stack
        if Trait.LOSSLESS in traits:
            assert tokens == dense, stack
