"""Written checkpoints: what goes in, what is refused, what comes back; no other library needed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.fp8_matmul import Fp8Weight
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.packing import pack
from safetensors.torch import load_file, save_file

from compresskit import artefact as artefacts, assets, catalogue
from compresskit.errors import Conflict, ModelError, RunError, UsageError
from compresskit.hf import modules
from compresskit.hf.checkpoint import groups, vllm, write
from compresskit.hf.checkpoint.config import quantization_config
from compresskit.hf.checkpoint.form import Form, Rounding, form_of, tensors_of, weight_of
from compresskit.measure.memory.weights import weight_bytes
from compresskit.methods.quant import _group, int8
from compresskit.report import card as cards, join
from compresskit.spec import ModelSpec, RunSpec

IDS = torch.arange(3, 35).view(1, 32)
RECORDS = Path(__file__).parents[1] / "golden" / "records" / "v2"

W4 = Form("pack-quantized", Rounding(4, "int", "group", 64))
W8 = Form("pack-quantized", Rounding(8, "int", "channel"))


def opened(*methods: str, model: str = "tiny", impl: str = "reference") -> Any:
    spec = RunSpec(
        model=ModelSpec(name=model),
        device="cpu",
        stack=tuple(catalogue.parse_method(text) for text in methods),
    )
    with dispatch.forced(impl), artefacts.opened(artefacts.plan(spec)) as found:
        return found


def prepared(method: str, model: str = "tiny") -> tuple[Any, write.Prepared]:
    found = opened(method, model=model)
    return found, write.prepare(found.system.model, assets.tiny_path("target"))


def exported(folder: Path, method: str) -> Any:
    found, ready = prepared(method)
    write.write(ready, assets.tiny_path("target"), folder, "card")
    return found.system.model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("method", "op"),
    [
        ("quant/int4:symmetric=true", "grouped_matmul"),
        ("quant/intn:bits=3,group=32,zero_point=integer,head=false", "grouped_matmul"),
        ("quant/int4:symmetric=true,group=0,activations=int8", "grouped_dynamic_matmul"),
        ("quant/int8", "int8_matmul"),
        ("quant/int8_dynamic", "int8_dynamic_matmul"),
        ("quant/fp8", "fp8_matmul"),
        ("quant/fp8:activations=fp8", "fp8_dynamic_matmul"),
    ],
)
def test_a_checkpoint_comes_back_on_the_same_products(method: str, op: str, tmp_path: Path) -> None:
    before = exported(tmp_path / "out", method)
    after = opened(model=str(tmp_path / "out"))
    assert set(after.system.kernels) == {op}
    assert torch.equal(logits(after.system.model), logits(before))
    assert after.parameters == 853_120 + (0 if "head=false" in method else 512 * 128)
    held, kept = (weight_bytes(model) for model in (after.system.model, before))
    # Scales come back in the type of the model, which is wider than ours here.
    assert {k: v for k, v in held.items() if k != "scales"} == {
        k: v for k, v in kept.items() if k != "scales"
    }


def test_floats_of_eight_bits_have_no_speed_where_they_are_emulated(tmp_path: Path) -> None:
    exported(tmp_path / "out", "quant/fp8:activations=fp8")
    assert opened(model=str(tmp_path / "out")).system.simulated


def test_another_scale_is_another_model(tmp_path: Path) -> None:
    before = exported(tmp_path / "out", "quant/int8")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.down_proj.weight_scale"
    save_file({**tensors, name: tensors[name].flip(0)}, file, {"format": "pt"})
    assert not torch.equal(logits(opened(model=str(tmp_path / "out")).system.model), logits(before))


def test_several_forms_name_their_layers(tmp_path: Path) -> None:
    method = 'quant/int4:symmetric=true,layers=["*.down_proj=8"],skip=["*.0.self_attn.v_proj"]'
    found, ready = prepared(method)
    config = ready.config["quantization_config"]
    assert {len(g["targets"]) for g in config["config_groups"].values()} == {4, 24}
    assert "Linear" not in str(config["config_groups"])
    assert config["ignore"] == ["model.layers.0.self_attn.v_proj"]
    assert not ready.vllm.supported and "q_proj,k_proj,v_proj" in ready.vllm.words
    write.write(ready, assets.tiny_path("target"), tmp_path / "out", "card")
    after = opened(model=str(tmp_path / "out")).system.model
    assert torch.equal(logits(after), logits(found.system.model))


def test_different_formats_are_mixed_precision() -> None:
    w8a8 = Form(
        "int-quantized", Rounding(8, "int", "channel"), Rounding(8, "int", "token", dynamic=True)
    )
    config = quantization_config({"a": W4, "b": w8a8}, [], head=None, experts=False)
    assert config["format"] == "mixed-precision"
    forms = groups.layer_forms(config, ["a", "b"])
    assert forms == {"a": W4, "b": w8a8}


def test_a_tied_head_is_untied_only_if_it_was_packed() -> None:
    _, packed = prepared("quant/int8")
    _, dense = prepared("quant/int8:head=false")
    assert packed.config["tie_word_embeddings"] is False and packed.untied
    assert dense.config["tie_word_embeddings"] is True and not dense.untied
    group = packed.config["quantization_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["lm_head", "Linear"]
    assert dense.config["quantization_config"]["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in dense.tensors


def test_experts_that_stayed_dense_keep_the_names_of_the_base_model(tmp_path: Path) -> None:
    method = 'quant/int4:symmetric=true,skip=["*.experts"]'
    found = opened(method, model="tiny:moe")
    base = assets.tiny_path("moe")
    ready = write.prepare(found.system.model, base)
    config = ready.config["quantization_config"]
    assert "Linear" not in config["config_groups"]["group_0"]["targets"]
    names = {name for name in load_file(base / "model.safetensors") if "expert" in name}
    assert names and names <= ready.tensors.keys()
    write.write(ready, base, tmp_path / "out", "card")
    after = opened(model=str(tmp_path / "out")).system.model
    assert torch.equal(logits(after), logits(found.system.model))


CODES = pack(torch.zeros(4, 96, dtype=torch.uint8), 4)


@pytest.mark.parametrize(
    ("weight", "way_out"),
    [
        (_group.quantise(torch.randn(4, 96), group=32), "zero_point=integer"),
        (_group.quantise(torch.randn(4, 96), group=64, symmetric=True), r'skip=\["\*.up_proj"\]'),
        (
            GroupedWeight(CODES, torch.ones(4, 3), 96, 32, table=tuple(map(float, range(16)))),
            "symmetric=true",
        ),
        (GroupedWeight(CODES, torch.ones(4, 3), 96, 32, gain=2.0), "symmetric=true"),
        (object(), "quant/int8"),
    ],
)
def test_what_has_no_form_is_refused_with_the_way_out(weight: Any, way_out: str) -> None:
    with pytest.raises(Conflict, match=way_out):
        form_of("grouped_matmul", weight, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("method", "model", "said"),
    [
        ("quant/int4:symmetric=true,embeddings=true", "tiny", "embeddings=true"),
        ("quant/int4:symmetric=true", "tiny:moe", r'skip=\["\*.experts"\]'),
    ],
)
def test_what_cannot_be_written_is_refused(method: str, model: str, said: str) -> None:
    with pytest.raises(Conflict, match=said):
        prepared(method, model)


def test_layers_of_another_class_are_refused(tmp_path: Path) -> None:
    """GPT-2 keeps its linear layers in `Conv1D`, which nobody would look for."""
    from compresskit.hf.tiny import random_model

    random_model("gpt2").save_pretrained(tmp_path)
    for path in assets.tiny_path("target").glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    found = opened("quant/int8", model=str(tmp_path))
    with pytest.raises(Conflict, match="Conv1D"):
        write.prepare(found.system.model, tmp_path)


def test_scales_at_run_time_are_refused() -> None:
    found = opened("quant/int8")
    for index in range(2):
        layer = found.system.model.model.layers[index].self_attn.o_proj
        layer.input_scale = torch.ones(layer.in_features)
    with pytest.raises(Conflict, match=r'o_proj and 1 more.*skip=\["\*.o_proj"\]'):
        write.prepare(found.system.model, assets.tiny_path("target"))


def test_a_dense_model_and_a_layout_of_this_machine_are_refused() -> None:
    with pytest.raises(Conflict, match="nothing was packed"):
        write.prepare(opened().system.model, assets.tiny_path("target"))
    found = opened("quant/int8", impl="auto")
    if all(
        type(m.product).__name__ != "Dequantised"
        for m in found.system.model.modules()
        if hasattr(m, "product")
    ):
        with pytest.raises(RunError, match="this machine"):
            write.prepare(found.system.model, assets.tiny_path("target"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_written_in_the_type_of_the_model_if_that_is_exact(dtype: torch.dtype) -> None:
    weight = int8.quantise(torch.randn(4, 64))
    assert tensors_of(W8, weight, dtype)["weight_scale"].dtype is dtype
    tiny = weight._replace(scales=weight.scales * 2.0**-40)
    written = tensors_of(W8, tiny, dtype)["weight_scale"]
    assert torch.equal(written.float().flatten(), tiny.scales.float())


def test_forms_undo_themselves() -> None:
    exact = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    fp8 = Fp8Weight(exact.to(torch.float8_e4m3fn), torch.ones(17).bfloat16())
    for op, weight in {
        "grouped_matmul": _group.quantise(exact, bits=5, group=32, zero_point="integer"),
        "grouped_dynamic_matmul": _group.quantise(exact, bits=3, group=0, symmetric=True),
        "int8_dynamic_matmul": int8.quantise(exact),
        "fp8_matmul": fp8,
    }.items():
        form = form_of(op, weight, "layer")
        back = weight_of(form, tensors_of(form, weight, torch.float32))
        assert torch.equal(back.dequantise(), weight.dequantise())
        assert groups.operation(form).name == op


@pytest.mark.parametrize(
    ("form", "supported", "words"),
    [
        (W4, True, "CompressedTensorsWNA16"),
        (W8, True, "CompressedTensorsWNA16"),
        (Form("pack-quantized", Rounding(3, "int", "channel")), True, "recent"),
        (Form("pack-quantized", Rounding(4, "int", "group", 256)), False, "groups of 256"),
        (
            Form("pack-quantized", Rounding(3, "int", "channel", symmetric=False)),
            False,
            "symmetric=true",
        ),
        (Form("float-quantized", Rounding(8, "float", "channel")), True, "W8A16Fp8"),
    ],
)
def test_what_vllm_loads(form: Form, supported: bool, words: str) -> None:
    found = vllm.scheme(form)
    assert found.supported is supported
    assert words in found.line()


def test_layers_that_vllm_fuses_share_a_scheme() -> None:
    forms = {"m.q_proj": W4, "m.k_proj": W4, "m.v_proj": W8, "lm_head": W4}
    assert not vllm.support(forms, (), "lm_head").supported
    assert not vllm.support({"m.gate_proj": W4}, ("m.up_proj",), None).supported
    alike = {**forms, "m.v_proj": W4}
    assert "March 2026" in vllm.support(alike, (), "lm_head").words


def test_a_large_model_is_written_in_shards(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", 300_000)
    before = exported(tmp_path / "out", "quant/int8")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    after = opened(model=str(tmp_path / "out")).system.model
    assert torch.equal(logits(after), logits(before))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    _, ready = prepared("quant/int8")
    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        write.write(ready, assets.tiny_path("target"), tmp_path / "out", "card")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not overwritten"):
        write.check_free(tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        write.check_free(tmp_path / "notes.txt")


def test_what_no_product_takes_is_unpacked_and_said(tmp_path: Path) -> None:
    """Groups in the weights and one step a token: nothing here multiplies that."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "out"
    before = exported(folder, "quant/int4:symmetric=true")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = Rounding(8, "int", "token", dynamic=True).document()
    (folder / "config.json").write_text(json.dumps(config))
    after = opened(model=str(folder))
    assert re.search("unpacked to dense .* W4A8", str(after.system.facts["warnings"]))
    assert after.parameters == modules.parameter_count(before)
    assert after.parameters * 4 <= sum(weight_bytes(after.system.model).values())
    far = (logits(after.system.model) - logits(before)).abs().max()
    assert 0 < far < 0.1 * logits(before).abs().max()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset"),
        ({"config_groups": {}}, "no config group targets a"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
    ],
)
def test_unknown_kinds_are_left_to_transformers(change: dict[str, Any], reason: str) -> None:
    config = quantization_config({"a": W4}, [], head=None, experts=False)
    if "format" in change:
        del config["config_groups"]["group_0"]["format"]
    with pytest.raises(groups.Unread, match=reason):
        groups.layer_forms({**config, **change}, ["a"])


@pytest.mark.parametrize("missing", ["weight_shape", "weight_packed"])
def test_a_checkpoint_that_lacks_a_tensor_is_named(missing: str, tmp_path: Path) -> None:
    exported(tmp_path / "out", "quant/int8")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.0.mlp.up_proj.{missing}"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        opened(model=str(tmp_path / "out"))


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    exported(tmp_path / "out", "quant/int8")
    with pytest.raises(Conflict, match="already quantised"):
        opened("quant/int4", model=str(tmp_path / "out"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_missing_library_is_named(method: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if _installed("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    folder = shutil.copytree(assets.tiny_path("target"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"pip install 'compresskit\[gptq\]'"):
        opened(model=str(folder))


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes_answer_for_their_bytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = assets.tiny_path("target")
    asked = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=asked, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "out")
    for path in source.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "out")
    found = opened(model=str(tmp_path / "out"))
    weights = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
    held = weight_bytes(found.system.model)
    assert found.parameters == 853_120
    assert held["packed"] == weights * bits // 8
    # nf4: a float32 scale every 64 weights and 16 code words a layer; int8: one scale a row.
    rows = 4 * (2 * 128 + 2 * 64 + 2 * 384 + 128)
    assert held["scales"] == (weights // 64 * 4 + 28 * 64 if bits == 4 else rows * 4)
    assert sum(held.values()) == modules.weight_bytes(found.system.model) + held["buffer"]
    assert f"28 x Linear{bits}bit" in found.system.kernels["checkpoint_linear"]


def card(**changes: Any) -> cards.Card:
    joined = join.load([RECORDS])
    row = next(row for row in joined.rows if row.record.label == "quant/int8")
    fields: dict[str, Any] = {
        "name": "small",
        "spec": row.record.spec,
        "revision": row.record.model.revision,
        "kind": "hub",
        "licence": "Apache-2.0",
        "dtype": "bfloat16",
        "forms": {W8.name(): 28},
        "dense": ("lm_head",),
        "untied": False,
        "tensor_bytes": 1_000_000,
        "base_bytes": 2_000_000,
        "parameters": 1_000_000,
        "calibration_tokens": 0,
        "calibration_seconds": 1.0,
        "vllm": vllm.scheme(W8).line(),
        "zero_points": False,
        "mixed": False,
        "version": "0",
    }
    return cards.Card(**{**fields, **changes})


def test_a_card_without_records_says_how_to_measure() -> None:
    text = cards.render(card())
    assert "Not measured" in text and "compresskit run --model" in text
    assert "| this checkpoint | 1.000 MB | 8.00 |" in text
    assert "CompressedTensorsWNA16" in text and "dequantize" not in text
    assert "dequantize=True" in cards.render(card(zero_points=True))
    assert "cannot be loaded" in cards.render(card(zero_points=True, mixed=True))


def test_a_card_shows_the_record_of_its_very_stack() -> None:
    joined = join.load([RECORDS])
    plain = card()
    row = cards.of_stack(joined, plain.spec, plain.revision)
    assert row is not None and row.record.quality is not None
    near = row.record.quality.fidelity
    text = cards.render(card(row=row))
    assert "Not measured" not in text
    assert f"| same most likely token | {100 * near.top1_agreement:.2f} % |" in text
    assert row.record.digest in text
    assert cards.of_stack(joined, plain.spec, "another") is None
    assert (
        cards.of_stack(
            joined, plain.spec.baseline().replace(stack=[{"name": "quant/int4"}]), plain.revision
        )
        is None
    )


@pytest.mark.parametrize(("name", "named"), [("org/model", True), ("../secret/model", False)])
def test_only_a_hub_name_becomes_the_base_model(name: str, named: bool) -> None:
    spec = card().spec
    text = cards.render(card(spec=spec.replace(model={"name": name})))
    assert ("base_model:" in text) is named
