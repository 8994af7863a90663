"""Models of a known shape with random weights: right shapes, seeded, marked, and never judged."""

from __future__ import annotations

import json

import pytest
import torch

from compresskit import artefact, runner
from compresskit.errors import Conflict, SpecError, UnknownName
from compresskit.hf import load, synthetic
from compresskit.hf.sources import cache as sources_cache, known, resolve
from compresskit.hf.sources.random import MARK
from compresskit.hf.sources.shapes import SHAPES, divided, parameters
from compresskit.report import join, table
from compresskit.spec import RunSpec

SMALL = "layers=1,divide=16,vocabulary=512"
LLAMA = f"random:llama-3.2-1b:{SMALL}"

# As others counted the published checkpoints: `general.parameter_count` of their GGUF files (8B, 30B-A3B),
# metadata of the Hub's pages (8B), parameters of the loaded model (0.6B, 1B), and SmolLM2 as it is here.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    # Not by the environment: compiled kernels lie in that folder, too, and would be built anew.
    monkeypatch.setattr(sources_cache, "root", lambda chosen=None: tmp_path / "cache")


def spec(name=LLAMA, *stack, **changes):
    return RunSpec().replace(
        model={"name": name},
        device="cpu",
        stack=[{"name": one, "params": params} for one, params in stack],
        workload={"prompt_tokens": 8, "new_tokens": 4},
        protocol={"passes": ["latency", "quality"], "repeats": 2, "warmups": 0},
        **changes,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_published_model(name):
    assert parameters(SHAPES[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_builds_what_was_counted(name):
    """Empty modules of the whole shape: config.json means to transformers what it means to us."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve(f"random:{name}").path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(one.numel() for one in model.parameters()) == PUBLISHED[name]
    rotary = config.rope_parameters
    assert rotary["rope_theta"] == SHAPES[name]["rope_theta"]
    assert rotary.get("factor") == SHAPES[name].get("rope_scaling", {}).get("factor")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b", "qwen3-30b-a3b"])
def test_small_shapes_load_and_hold_what_was_counted(name):
    cut = f"random:{name}:{SMALL}"
    with artefact.opened(artefact.plan(spec(cut))) as opened:
        config = load.read_config(resolve(cut).path)
        assert opened.parameters == config[MARK]["parameters"]
        assert opened.system.model.dtype is torch.bfloat16
        assert opened.system.synthetic == "synthetic weights"
        held = synthetic.stored_bytes(resolve(cut).path, config)
        assert held == sum(one.nbytes for one in opened.system.model.parameters())


def weights(name):
    with artefact.opened(artefact.plan(spec(name))) as opened:
        return dict(opened.system.model.named_parameters())


def test_weights_follow_the_seed_and_nothing_else():
    first = weights(LLAMA)
    torch.manual_seed(99)
    second, other = weights(LLAMA), weights(f"{LLAMA},seed=1")
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[matrix], other[matrix])


def test_building_leaves_the_random_state_alone():
    path = resolve(LLAMA).path
    before = torch.random.get_rng_state()
    synthetic.build(path, torch.bfloat16, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_matrices_are_normal_and_gains_are_one():
    held = weights("random:qwen3-30b-a3b:layers=1,divide=16,vocabulary=512")
    for name, one in held.items():
        if one.dim() < 2:
            assert torch.equal(one, torch.ones_like(one)), name
        else:
            assert float(one.float().std()) == pytest.approx(0.02, rel=0.05), name
            assert bool((one != 0).float().mean() > 0.99), name


def test_the_revision_is_the_shape_and_the_seed():
    whole = resolve(LLAMA)
    assert resolve(LLAMA) == whole
    assert (whole.kind, whole.baseline) == ("random", "random")
    others = {resolve(f"{LLAMA},seed=1").revision, resolve("random:llama-3.2-1b").revision}
    assert len({whole.revision, *others}) == 3


def test_a_folder_copied_elsewhere_stays_random(tmp_path):
    import shutil

    moved = shutil.copytree(resolve(LLAMA).path, tmp_path / "moved")
    assert json.loads((moved / "config.json").read_text())[MARK]["seed"] == 0
    assert synthetic.is_marked(load.read_config(moved))


def test_what_is_saved_of_it_is_loaded_and_stays_marked(tmp_path):
    """A student or an export of random weights has weights of its own, and they mean as little."""
    saved = tmp_path / "saved"
    with artefact.opened(artefact.plan(spec(LLAMA))) as first:
        first.system.model.model.embed_tokens.weight.data.fill_(0.5)
        first.system.model.save_pretrained(saved)
        first.system.tokenizer.inner.save_pretrained(saved)
    assert resolve(str(saved)).baseline == "random"
    with artefact.opened(artefact.plan(spec(str(saved)))) as again:
        assert again.system.synthetic == "synthetic weights"
        weight = again.system.model.model.embed_tokens.weight
        assert torch.equal(weight, torch.full_like(weight, 0.5))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("random:llama-3.2-1", UnknownName, "Did you mean 'random:llama-3.2-1b'"),
        ("random:llama-3.2-1b:layer=2", SpecError, "Did you mean 'layers'"),
        ("random:llama-3.2-1b:layers=17", SpecError, "has 16 layers"),
        ("random:llama-3.2-1b:layers=0", SpecError, "greater than or equal to 1"),
        ("random:smollm2-135m:divide=2", SpecError, "num_attention_heads is 9"),
        ("random:llama-3.2-1b:vocabulary=100", SpecError, "512"),
        ("random:llama-3.2-1b:2", SpecError, "key=value"),
    ],
)
def test_what_cannot_be_had_is_refused(name, error, words):
    with pytest.raises(error, match=words):
        resolve(name)


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="cannot share"):
        divided({**SHAPES["qwen3-0.6b"], "num_key_value_heads": 6}, 2)


def test_models_lists_the_shapes():
    assert {f"random:{name}" for name in SHAPES} <= {model.name for model in known()}


def test_quality_is_refused_and_the_table_says_why():
    record = runner.run(spec(LLAMA, ("quant/int8", {})))
    assert record.status == "ok"
    assert record.facts["synthetic"] == "synthetic weights"
    assert record.model.baseline == "random"
    assert record.quality.likelihood is None
    assert record.quality.notes == ("quality: unavailable, synthetic weights",)
    # Refused is no finding: nothing was judged.
    assert not any("random_weights" in reason for reason in record.validity.reasons)
    built = table.build(join.of([record]))
    assert "synthetic weights)" in built.groups[0].heading()
    assert built.groups[0].rows[0].cells["kl_mean_nats"].kind == "unavailable"


@pytest.mark.parametrize(
    "name", ["speculative/ngram", "speculative/layer_skip", "speculative/hf_prompt_lookup"]
)
def test_speculation_that_listens_to_the_model_is_refused(name):
    with pytest.raises(Conflict, match="random weights say nothing"):
        artefact.plan(spec(LLAMA, (name, {}))).check()
    artefact.plan(spec("tiny", (name, {}))).check()


def test_a_set_rate_needs_no_trained_weights():
    with artefact.opened(artefact.plan(spec(LLAMA, ("speculative/oracle", {})))) as opened:
        assert opened.system.synthetic == "synthetic weights, synthetic acceptance"
