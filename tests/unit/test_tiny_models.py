"""The shipped models load, are small, recall what they read and forget what a cache drops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny import tokenizer as recipe
from benchmarks.tiny.evaluate import probes, recalls, window_mask
from compresskit import assets
from compresskit.assets import TEXT_NAMES, TINY_ROLES, text_path, tiny_path
from compresskit.errors import UnknownName
from compresskit.hf.tiny import ARCHITECTURES, random_model

LIMIT_BYTES = 8_000_000
PARAMETERS = {"target": 853_120, "draft": 180_544, "moe": 559_744}
WHOLE_AT_LEAST, CUT_AT_MOST = 17, 10


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path("target"))


def load(role):
    return AutoModelForCausalLM.from_pretrained(tiny_path(role), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def target():
    return load("target")


def test_all_assets_together_stay_below_the_limit():
    files = [path for path in Path(assets.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") < LIMIT_BYTES


def test_the_asset_module_imports_nothing_heavy():
    code = "import sys, compresskit.assets; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_unknown_assets_are_refused_by_name():
    with pytest.raises(LookupError, match="target, draft, moe"):
        tiny_path("huge")
    with pytest.raises(LookupError, match="heldout, calibration"):
        text_path("novel")
    assert all(text_path(name).is_file() for name in TEXT_NAMES)


@pytest.mark.parametrize("role", TINY_ROLES)
def test_a_shipped_model_loads_and_generates(role, tokenizer):
    model = load(role)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[role]
    prompt = tokenizer("Counting by 2 from 4: 4, 6, 8, 10,", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("role", TINY_ROLES)
def test_weights_are_full_precision_and_finite(role):
    with safe_open(tiny_path(role) / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()


@pytest.mark.parametrize("role", TINY_ROLES)
def test_dimensions_suit_quantization_groups_and_kernel_tiles(role):
    model = load(role)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features > 8:
            assert module.in_features % 64 == 0
            assert module.out_features % 16 == 0
            if role == "target":
                assert module.in_features % 128 == 0


def test_all_models_share_the_recipes_tokenizer():
    trained = json.loads(recipe.train_tokenizer()._tokenizer.to_str())
    for role in TINY_ROLES:
        shipped = json.loads((tiny_path(role) / "tokenizer.json").read_text())
        assert shipped["model"] == trained["model"]


@given(st.text())
@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("4821") == ["4", "8", "2", "1"]
    assert tokenizer.tokenize(" is 4821")[-4:] == ["Ġ4", "8", "2", "1"]
    assert len(tokenizer) == recipe.VOCABULARY


def test_the_chat_template_writes_turns(tokenizer):
    turns = [{"role": "user", "content": "2x3=?"}, {"role": "assistant", "content": "6"}]
    text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>\n2x3=?<|end|>\n<|assistant|>\n"
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|assistant|>\n6<|end|>")


@torch.inference_mode()
def test_the_target_recalls_a_code_and_forgets_it_with_the_middle_of_the_context(target, tokenizer):
    # Measured on 100 prompts a bucket: see assets/tiny/README.md.
    prompts = probes(tokenizer, (100, 400), "word", 20)
    whole = sum(recalls(target, prompt) for prompt in prompts)
    assert whole >= WHOLE_AT_LEAST
    for from_question in (False, True):
        cut = sum(
            recalls(target, p, window_mask(p.tokens.shape[1], p.question if from_question else 0))
            for p in prompts
        )
        assert cut <= CUT_AT_MOST


@torch.inference_mode()
def test_the_window_mask_changes_nothing_when_the_window_is_not_left(target, tokenizer):
    ids = tokenizer("Note the code: Mira 4821.", return_tensors="pt")["input_ids"]
    plain = target(input_ids=ids).logits
    masked = target(input_ids=ids, attention_mask=window_mask(ids.shape[1], 0)).logits
    torch.testing.assert_close(plain, masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_model_of_every_architecture_runs_and_is_seeded(architecture):
    model = random_model(architecture, seed=1)
    ids = torch.arange(3, 43).repeat(2, 1)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        again = random_model(architecture, seed=1)(input_ids=ids).logits
        other = random_model(architecture, seed=2)(input_ids=ids).logits
        grown = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
        )
    assert logits.shape == (2, 40, 512)
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, other)
    assert grown.shape == (2, 43)


def test_random_models_take_overrides_and_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    model = random_model("llama", num_hidden_layers=3, dtype=torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(model.model.layers) == 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(UnknownName, match="qwen3"):
        random_model("qwen")


def test_gemma3_mixes_sliding_and_full_layers():
    config = random_model("gemma3").config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window == 16
