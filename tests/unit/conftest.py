"""Tiny random models, one per kind of cache, in a plain eager system; nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresskit.decode import autoregressive
from compresskit.device import resolve
from compresskit.hf.cache import new_dynamic
from compresskit.hf.step import eager_step
from compresskit.spec import SamplingSpec
from compresskit.system import Request, System

VOCABULARY = 300
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # The default of 0.02 gives nearly flat logits, whose arg max is decided by rounding.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "olmo2": GROUPED,
    "gpt_neox": SMALL,
    "gpt2": {**SMALL, "n_inner": 48},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {
        **GROUPED,
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@functools.cache
def random_model(architecture: str, vocabulary: int = VOCABULARY) -> Any:
    # A seed whose models do not fall into one repeated token: tests of caches need tokens that change.
    torch.manual_seed(3)
    options = {**CONFIGS[architecture], "vocab_size": vocabulary}
    config = CONFIG_MAPPING[architecture](**options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("k_norm.weight"):
            # Equal weights make all keys equally long, and what goes by length a matter of rounding.
            weight.data += torch.linspace(-0.5, 0.5, len(weight))
    return model


class Lab:
    """Builds systems and decodes with them; what the tests of caches and loops have in common."""

    def system(
        self, architecture: str, *, vocabulary: int = VOCABULARY, double: bool = False
    ) -> System:
        model = random_model(architecture, vocabulary)
        if double:
            # torch's grouped matrix product, the default for experts, has no float64.
            config = copy.deepcopy(model.config)
            twin = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
            twin.load_state_dict(model.state_dict())
            model = twin.eval()

        return System(
            model=model,
            tokenizer=SimpleNamespace(eos_ids=(), bos_id=None, has_chat_template=False),
            device=resolve("cpu"),
            step=eager_step(model),
            new_cache=lambda capacity: new_dynamic(model.config),
            decode=autoregressive,
            context=256,
        )

    def prompt(self, length: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, vocabulary, (1, length), generator=generator)

    def request(self, tokens: torch.Tensor, new: int, **options: Any) -> Request:
        return Request(tokens, new, options.pop("sampling", SamplingSpec()), **options)

    def rows(self, chunks: Any) -> list[list[int]]:
        """Tokens of each row of the batch."""
        out: list[list[int]] = []
        for chunk in chunks:
            out = out or [[] for _ in range(len(chunk.lengths))]
            for row, (tokens, length) in enumerate(
                zip(chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True)
            ):
                out[row] += tokens[:length]
        return out


@pytest.fixture(scope="session")
def lab() -> Lab:
    torch.set_num_threads(1)
    return Lab()


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param
