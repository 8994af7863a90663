"""Checkpoints held against compressed-tensors itself: bits, schemes, and what transformers computes.

The library's `pack_to_int32` and its decompressors are the independent source. Packed words given
as hexadecimal constants were produced by compressed-tensors 0.20.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.activations import round_rows
from compresskit_kernels.grouped_matmul import GroupedWeight
from compresskit_kernels.packing import pack, unpack
from safetensors.torch import load_file, save_file

from compresskit import artefact as artefacts, catalogue
from compresskit.hf.checkpoint import write
from compresskit.hf.checkpoint.form import Form, Rounding, form_of, tensors_of
from compresskit.methods.quant import _group, int8
from compresskit.spec import ModelSpec, RunSpec

packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

IDS = torch.arange(3, 43).view(1, 40)


def words(packed: torch.Tensor) -> torch.Tensor:
    return packed.contiguous().view(torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 70, 576])
def test_our_packed_stream_is_theirs_bit_for_bit(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + width)
    codes = torch.randint(0, 2**bits, (7, width), generator=generator, dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = packing.pack_to_int32(signed, bits)
    assert torch.equal(words(pack(codes, bits)), theirs)
    assert torch.equal(unpack(theirs.view(torch.uint8), bits, width), codes)
    flipped = codes.clone()
    flipped[0, width // 2] ^= 1
    assert not torch.equal(words(pack(flipped, bits)), theirs)


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (4, list(range(-8, 8)), ["76543210", "fedcba98"]),
        (3, [*range(-4, 4)] * 4, ["88fac688", "c688fac6", "fac688fa"]),
        (8, [-128, -1, 0, 127], ["ff807f00"]),
        (2, [*range(-2, 2)] * 4, ["e4e4e4e4"]),
        (5, list(range(-16, -8)), ["8a418820", "00000039"]),
    ],
)
def test_known_words(bits: int, signed: list[int], expected: list[str]) -> None:
    codes = (torch.tensor([signed]) + 2 ** (bits - 1)).to(torch.uint8)
    got = [f"{word & 0xFFFFFFFF:08x}" for word in words(pack(codes, bits))[0].tolist()]
    assert got == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_packed_along_the_rows(bits: int) -> None:
    weight = _group.quantise(
        torch.randn(41, 96, generator=torch.Generator().manual_seed(0)),
        bits=bits,
        group=32,
        zero_point="integer",
    )
    assert weight.zeros is not None
    form = form_of("grouped_matmul", weight, "layer")
    signed = (weight.zeros.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = packing.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(tensors_of(form, weight, torch.float32)["weight_zero_point"], theirs)


def weights() -> dict[str, tuple[str, Any]]:
    exact = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    made: dict[str, tuple[str, Any]] = {
        f"{bits} bits {'symmetric' if symmetric else 'zero points'} group {group}": (
            "grouped_matmul",
            _group.quantise(
                exact, bits=bits, group=group, symmetric=symmetric, zero_point="integer"
            ),
        )
        for bits in range(2, 9)
        for symmetric in (True, False)
        for group in (32, 0)
    }
    return {
        **made,
        "int8": ("int8_matmul", int8.quantise(exact)),
        "int8 dynamic": ("int8_dynamic_matmul", int8.quantise(exact)),
    }


@pytest.mark.parametrize("name", weights())
def test_they_decompress_to_our_very_weight(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    op, weight = weights()[name]
    form = form_of(op, weight, "layer")
    scheme = QuantizationScheme.model_validate(form.document(["Linear"]))
    theirs = BaseCompressor.get_value_from_registry(form.format)
    tensors = tensors_of(form, weight, torch.float32)
    assert torch.equal(theirs.decompress(tensors, scheme)["weight"], weight.dequantise())
    # In bfloat16 they round each product of code and scale once, as we would.
    short = tensors_of(form, weight, torch.bfloat16)
    assert torch.equal(theirs.decompress(short, scheme)["weight"], weight.dequantise().bfloat16())
    shuffled = {**tensors, "weight_scale": tensors["weight_scale"].flip(0)}
    assert not torch.equal(theirs.decompress(shuffled, scheme)["weight"], weight.dequantise())


@pytest.mark.parametrize(
    ("preset", "form"),
    [
        ("W4A16", Form("pack-quantized", Rounding(4, "int", "group", 128))),
        ("W3A16", Form("pack-quantized", Rounding(3, "int", "group", 128))),
        ("W4A16_ASYM", Form("pack-quantized", Rounding(4, "int", "group", 128, symmetric=False))),
        (
            "W8A8",
            Form(
                "int-quantized",
                Rounding(8, "int", "channel"),
                Rounding(8, "int", "token", dynamic=True),
            ),
        ),
        (
            "FP8_DYNAMIC",
            Form(
                "float-quantized",
                Rounding(8, "float", "channel"),
                Rounding(8, "float", "token", dynamic=True),
            ),
        ),
    ],
)
def test_forms_are_their_presets_and_the_formats_they_would_choose(preset: str, form: Form) -> None:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    theirs = preset_name_to_scheme(preset, ["Linear"])
    ours = QuantizationScheme.model_validate(form.document(["Linear"]))
    for part in ("weights", "input_activations"):
        one, other = getattr(ours, part), getattr(theirs, part)
        fields = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")
        assert (one is None) == (other is None)
        assert one is None or all(getattr(one, f) == getattr(other, f) for f in fields)
    assert infer_module_format(torch.nn.Linear, theirs).value == form.format


def exported(folder: Path, method: str, *, model: str = "tiny") -> tuple[torch.Tensor, Any]:
    """Write a checkpoint; return our reference logits for it and what was written."""
    spec = RunSpec(
        model=ModelSpec(name=model), device="cpu", stack=(catalogue.parse_method(method),)
    )
    plan = artefacts.plan(spec)
    with dispatch.forced("reference"), artefacts.opened(plan) as opened:
        prepared = write.prepare(opened.system.model, plan.source.path)
        write.write(prepared, plan.source.path, folder, "card")
        with torch.no_grad():
            return opened.system.model(IDS, use_cache=False).logits, prepared


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


IDENTICAL = [
    "quant/int4:symmetric=true",
    "quant/int4:symmetric=true,head=false",
    "quant/int4:symmetric=true,group=0",
    "quant/intn:bits=3,symmetric=true,group=32",
    "quant/int8",
    "quant/fp8",
    "quant/fp8:activations=fp8",
    'quant/int4:symmetric=true,skip=["*.v_proj"]',
    'quant/int4:symmetric=true,layers=["*.down_proj=8"]',
]


@pytest.mark.parametrize("method", IDENTICAL)
def test_transformers_computes_identical_logits(method: str, tmp_path: Path) -> None:
    ours, _ = exported(tmp_path / "out", method)
    assert torch.equal(logits_of(loaded(tmp_path / "out")), ours)


def test_zero_points_give_identical_logits_when_unpacked_at_load(tmp_path: Path) -> None:
    """Its other way cannot take packed zero points: it makes room for them unpacked."""
    from transformers import CompressedTensorsConfig

    ours, _ = exported(tmp_path / "out", "quant/int4:zero_point=integer")
    with pytest.warns(UserWarning, match="loading attributes"):
        model = loaded(
            tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert torch.equal(logits_of(model), ours)


@pytest.mark.parametrize(
    "method", ["quant/int8_dynamic", "quant/int4:symmetric=true,activations=int8"]
)
def test_int8_activations_differ_by_their_step_alone(method: str, tmp_path: Path) -> None:
    """They divide the largest magnitude by 127.5, we (as vLLM) by 127; the weights are the same."""
    ours, prepared = exported(tmp_path / "out", method)
    model = loaded(tmp_path / "out")
    near = logits_of(model)
    assert not torch.equal(near, ours)
    assert (near - ours).abs().max() < 0.05 * ours.abs().max()
    for name, form in prepared.forms.items():
        layer = model.get_submodule(name)
        layer.quantization_enabled = False
        layer.register_forward_pre_hook(rounded(form.activations.group))
    assert torch.equal(logits_of(model), ours)


def rounded(group: int | None) -> Any:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (x,) = inputs
        return round_rows(x.reshape(-1, x.shape[-1]), group).dequantise().view(x.shape)

    return hook


def test_biases_of_another_architecture(tmp_path: Path) -> None:
    """transformers adds the bias inside the product, we after it: the last bit may differ."""
    base = random_folder(tmp_path, "qwen2")
    ours, prepared = exported(tmp_path / "out", "quant/int8", model=str(base))
    assert any(name.endswith("q_proj.bias") for name in prepared.tensors)
    assert (logits_of(loaded(tmp_path / "out")) - ours).abs().max() < 1e-5 * ours.abs().max()


def random_folder(tmp_path: Path, architecture: str) -> Path:
    from compresskit import assets
    from compresskit.hf.tiny import random_model

    folder = tmp_path / architecture
    random_model(architecture).save_pretrained(folder)
    for path in assets.tiny_path("target").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_damaged_checkpoint_is_seen(tmp_path: Path) -> None:
    """The negative control of all of the above: one scale, one code, one group of the config."""
    folder = tmp_path / "out"
    ours, _ = exported(folder, "quant/int4:symmetric=true")
    good = load_file(folder / "model.safetensors")
    for name, change in {
        "model.layers.1.mlp.up_proj.weight_scale": lambda t: t.index_fill(
            0, torch.tensor([5]), 0.0
        ),
        "model.layers.0.self_attn.q_proj.weight_packed": lambda t: t ^ 1,
    }.items():
        save_file(
            {**good, name: change(good[name])}, folder / "model.safetensors", {"format": "pt"}
        )
        assert not torch.equal(logits_of(loaded(folder)), ours)
    save_file(good, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError)):
        logits_of(loaded(folder))


def test_a_grouped_weight_of_our_own_reads_back(tmp_path: Path) -> None:
    codes = torch.randint(0, 8, (9, 64), dtype=torch.uint8)
    weight = GroupedWeight(pack(codes, 3), torch.rand(9, 2).bfloat16(), 64, 32, bits=3)
    form = form_of("grouped_matmul", weight, "layer")
    tensors = tensors_of(form, weight, torch.bfloat16)
    theirs = packing.unpack_from_int32(tensors["weight_packed"], 3, torch.Size((9, 64)))
    assert torch.equal(theirs.to(torch.int16) + 4, codes.to(torch.int16))
