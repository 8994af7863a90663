"""Our attention function inside transformers: single tokens are ours, everything else is theirs."""

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.native import build
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.device import resolve
from compresskit.hf import attention
from compresskit.hf.cache import new_dynamic

pytestmark = pytest.mark.skipif(not build.available(), reason=build.reason())


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def decoded(model, *, mask=None, prompt=7):
    """Logits of two tokens, one after the other, behind a prompt."""
    cache = new_dynamic(model.config)
    tokens = torch.arange(2 * (prompt + 2)).remainder(100).view(2, -1)
    out = []
    for start, stop in ((0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 2)):
        seen = None if mask is None else mask[:, :stop]
        out.append(
            model(tokens[:, start:stop], past_key_values=cache, attention_mask=seen).logits[:, -1]
        )
    return torch.stack(out)


def test_it_computes_what_sdpa_does(model):
    want = decoded(model)
    attention.use_decode_attention(model, resolve("cpu"))
    dispatch.reset()
    torch.testing.assert_close(decoded(model), want, rtol=1e-5, atol=1e-6)
    assert "decode_attention" in dispatch.used()
    dispatch.reset()


def test_padding_goes_to_sdpa_and_stays_right(model):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    want = decoded(model, mask=mask)
    attention.use_decode_attention(model, resolve("cpu"))
    dispatch.reset()
    torch.testing.assert_close(decoded(model, mask=mask), want, rtol=1e-5, atol=1e-6)
    assert dispatch.used() == {}
    assert not torch.allclose(decoded(model), want), "the mask makes a difference"


def test_other_attention_is_left_alone(model):
    model.set_attn_implementation("eager")
    attention.use_decode_attention(model, resolve("cpu"))
    assert model.config._attn_implementation == "eager"
