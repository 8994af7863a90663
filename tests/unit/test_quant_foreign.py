"""Layers of bitsandbytes and torchao in our models: what they compute, what they hold, what is said."""

import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import dispatch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from compresskit import catalogue
from compresskit.device import resolve
from compresskit.errors import Conflict, MissingExtra, RunError, SpecError, UnknownName
from compresskit.hf import modules
from compresskit.measure.memory.weights import weight_bytes
from compresskit.method import quiet
from compresskit.methods.quant import _foreign, torchao
from compresskit.methods.quant.bnb4 import BitsAndBytes4
from compresskit.methods.quant.llm_int8 import LLMInt8
from compresskit.methods.quant.torchao import TorchAO
from compresskit.spec import MethodSpec
from compresskit.system import System
from compresskit.traits import Trait


def has_torchao():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.quantization  # noqa: F401
    except ImportError:
        return False
    return True


needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")
PACKED_INT4 = "torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(hidden=128, inner=192, *, dtype=torch.bfloat16, tied=True, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, vocab_size=256, tie_word_embeddings=tied,
        **SIZES, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def apply(method, model, progress=quiet, **facts):
    nothing = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    system = System(model=model, device=resolve("cpu"), context=64, facts=facts, **nothing)
    return method.apply(system, SimpleNamespace(progress=progress))


@torch.inference_mode()
def logits(model, length=12):
    tokens = torch.arange(length).remainder(256).view(1, length)
    return model(tokens, use_cache=False).logits.double()


def foreign(model):
    return [one for one in model.modules() if isinstance(one, _foreign.ForeignLinear)]


CASES = [
    pytest.param(BitsAndBytes4(), 0.05, 0.3, id="nf4"),
    pytest.param(BitsAndBytes4(type="fp4", blocksize=32), 0.05, 0.4, id="fp4"),
    pytest.param(BitsAndBytes4(double_quant=True), 0.05, 0.3, id="double"),
    pytest.param(LLMInt8(), 0.001, 0.05, id="llm_int8"),
    pytest.param(LLMInt8(threshold=0.0), 0.001, 0.05, id="no outliers"),
    pytest.param(TorchAO(), 0.001, 0.05, id="int8", marks=needs_torchao),
    pytest.param(
        TorchAO(config=PACKED_INT4, options={"group_size": 32}),
        0.05, 0.3, id="int4", marks=needs_torchao,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "low", "high"), CASES)
def test_it_is_close_to_dense_but_not_equal(method, low, high):
    dense = logits(llama())
    system = apply(method, llama())
    got = logits(system.model)
    assert low < float((got - dense).norm() / dense.norm()) < high
    assert len(foreign(system.model)) == 15
    assert not modules.linears(system.model)


@pytest.mark.parametrize(("method", "low", "high"), CASES)
def test_the_weight_error_is_what_the_layers_compute(method, low, high):
    """The reported error against unit vectors through the very layers, in float32."""
    model = llama(dtype=torch.float32)
    dense = {site.name: site.weight().clone() for site in modules.linears(model)}
    system = apply(method, model)
    error = energy = 0.0
    with torch.inference_mode():
        for name, weight in dense.items():
            units = torch.eye(weight.shape[1])
            got = model.get_submodule(name)(units).T
            error += float((got - weight).square().sum())
            energy += float(weight.square().sum())
    assert system.facts["weight_error"] == pytest.approx((error / energy) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("method", "low", "high"), CASES)
def test_bytes_are_those_of_the_tensors_inside(method, low, high):
    """Counted by hand for the int8 methods, and for all of them steady from call to call."""
    model = llama(tied=False, attention_bias=True)
    system = apply(method, model)
    before = weight_bytes(model)
    logits(model)
    assert weight_bytes(model) == before
    assert sum(before.values()) == modules.weight_bytes(model) + buffers(model)
    packed = [layer.held_bytes() for layer in foreign(model)]
    assert sum(sum(one.values()) for one in packed) < 2 * system.facts["quantized_parameters"]
    biases = sum(one.get("bias", 0) for one in packed)
    assert biases == 2 * 2 * (128 + 64 + 64 + 128)
    if isinstance(method, LLMInt8):
        rows = sum(layer.out_features for layer in foreign(model))
        codes = system.facts["quantized_parameters"]
        assert sum(sum(one.values()) for one in packed) == codes + 4 * rows + biases


def test_bytes_of_the_4_bit_layers_by_hand():
    """4 bits a code, bfloat16 scales in the CPU's layout or float32 ones, a table of 16 floats."""
    layer = foreign(apply(BitsAndBytes4(), llama()).model)[0]
    held = layer.held_bytes()
    packed_for_cpu = layer.layer.weight.quant_state.absmax.dtype is torch.bfloat16
    assert held == {
        "packed": 128 * 128 // 2,
        "scales": 128 * 128 // 64 * (2 if packed_for_cpu else 4),
        "table": 64,
    }


@needs_torchao
def test_bytes_of_tensor_subclasses_by_hand():
    model = apply(TorchAO(), llama()).model
    layer = foreign(model)[0]
    # int8 codes, a float32 scale and an int8 zero point a row.
    assert layer.held_bytes() == {"packed": 128 * 128, "scales": 128 * 4, "zero_points": 128}
    assert all(tensor.device.type == "cpu" for tensor in layer.held_tensors())
    # What torch reports of the weight itself is that of a dense one: not to be counted.
    assert layer.layer.weight.nbytes == 128 * 128 * 2
    assert sum(weight_bytes(model).values()) == modules.weight_bytes(model) + buffers(model)


def buffers(model):
    return sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize(("method", "low", "high"), CASES)
def test_it_says_what_ran(method, low, high):
    system = apply(method, llama())
    (op,) = system.kernels
    assert op in ("quant/bnb4", "quant/llm_int8", "quant/torchao")
    assert system.kernels[op].startswith(("bitsandbytes: ", "torchao: "))
    assert system.simulated == ()
    dispatch.reset()
    logits(system.model)
    assert dispatch.used() == {op: (system.kernels[op],)}


def test_llm_int8_warns_of_its_slowness_on_a_cpu():
    facts = apply(LLMInt8(), llama(), warnings=["earlier"]).facts
    assert facts["warnings"][0] == "earlier"
    assert "slower than with dense layers" in facts["warnings"][1]


def test_llm_int8_takes_outliers_out():
    """A column of 40 among ones costs the plain scheme its resolution, and the other nothing."""
    torch.manual_seed(0)
    x = torch.randn(4, 128)
    x[2, 5] = 40.0
    errors = []
    for threshold in (0.0, 6.0):
        model = llama(dtype=torch.float32)
        site = next(site for site in modules.linears(model) if site.name.endswith("q_proj"))
        want = x @ site.weight().T
        apply(LLMInt8(threshold=threshold), model)
        with torch.inference_mode():
            got = model.get_submodule(site.name)(x)[2]
        errors.append(float((got - want[2]).norm() / want[2].norm()))
    assert errors[1] < errors[0] / 3


def test_outliers_tie_the_rows_of_a_batch_together_and_the_traits_say_so():
    assert Trait.PADDED_BATCH in LLMInt8().effects().removes
    assert Trait.PADDED_BATCH not in LLMInt8(threshold=0.0).effects().removes


def test_gpt2_layers_are_transposed_for_bitsandbytes():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=256, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    dense = logits(model)
    system = apply(BitsAndBytes4(), model)
    got = logits(system.model)
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (128, 384)
    assert "bias" in layer.held_bytes()
    assert float((got - dense).norm() / dense.norm()) < 0.3


def test_layers_that_do_not_fit_stay_dense_and_are_named(monkeypatch):
    """96 inputs are no multiple of 64, which the CPU's layout wants; 160 by 32 are."""
    library = _foreign.bitsandbytes()
    if not library.functional.has_avx512bf16():
        pytest.skip("this CPU takes every shape")
    model = llama(96, 160)
    facts = apply(BitsAndBytes4(blocksize=32), model).facts
    left = [site.name for site in modules.linears(model)]
    assert left == [f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in ("k", "v")]
    (warning,) = facts["warnings"]
    assert warning.startswith("4 of 15 layers left dense (model.layers.0.self_attn.k_proj first)")
    assert "has 48 and 96" in warning
    with pytest.raises(Conflict, match=r"quant/bnb4: bitsandbytes' CPU product wants rows"):
        apply(BitsAndBytes4(blocksize=512), llama(96, 160))


def test_experts_that_stay_dense_are_reported():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=32, num_local_experts=4, vocab_size=256, **SIZES
    )
    facts = apply(LLMInt8(), MixtralForCausalLM(config).eval()).facts
    assert any("experts stay dense" in warning for warning in facts["warnings"])
    assert "experts" in facts["left_dense"]


@pytest.mark.parametrize(("method", "low", "high"), CASES[::3])
def test_head_skip_and_progress(method, low, high):
    told = []
    model = llama()
    options = {**method.model_dump(), "head": False, "skip": ("*.down_proj",)}
    apply(type(method)(**options), model, progress=lambda *step: told.append(step))
    left = [site.name for site in modules.linears(model)]
    assert left == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] + ["lm_head"]
    assert told[-1] == ("quantise", 12, 12)


@pytest.mark.parametrize(("method", "low", "high"), CASES[::3])
def test_embeddings_and_numbers_that_are_none_are_refused(method, low, high):
    asked = type(method)(**{**method.model_dump(), "embeddings": True})
    with pytest.raises(SpecError, match="has linear layers only"):
        apply(asked, llama())
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj holds NaN"):
        apply(method, model)


@pytest.mark.parametrize(("method", "low", "high"), CASES)
def test_nothing_random_is_drawn(method, low, high):
    """The libraries' constructors draw a weight; the generator must not notice."""
    model = llama()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    apply(method, model)
    assert torch.equal(torch.rand(3), want)


def test_bitsandbytes_asks_no_hub_and_says_nothing(monkeypatch, caplog, capfd):
    """With a package `kernels` in place, the import would fetch a product from the network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=refuse))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    seen = []
    monkeypatch.setattr(
        _foreign, "import_module", lambda name: seen.append(sys.modules.get("kernels", "absent"))
    )
    _foreign.bitsandbytes()
    assert seen == [None]  # an import of `kernels` fails at once
    assert sys.modules["kernels"].get_kernel is refuse
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        logits(apply(LLMInt8(), llama()).model)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_torchao_missing(monkeypatch):
    monkeypatch.setattr(torchao, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'compresskit\[torchao\]'"):
        apply(TorchAO(), llama())


@needs_torchao
@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("Int4WeightOnlyConfig", {}, "mslk"),
        ("Int4WeightOnlyConfig", {"int4_packing_format": "plain_int32"}, "cpu"),
        (
            "Int8DynamicActivationIntxWeightConfig",
            {"weight_dtype": "int4", "intx_packing_format": "opaque_torchao_auto"},
            "kernel library is not loaded",
        ),
        (
            "torchao.prototype.quantization.int4.inference_workflow.Int8DynamicActivationInt4WeightConfig",
            {},
            "da8w4_linear_cpu",
        ),
        ("Float8DynamicActivationFloat8WeightConfig", {}, "8.9"),
        ("FqnToConfig", {}, "FqnToConfig"),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else "",
)
def test_what_torchao_cannot_do_here_is_a_conflict_with_its_own_reason(config, options, reason):
    with pytest.raises(Conflict, match=reason) as caught:
        apply(TorchAO(config=config, options=options), llama())
    assert str(caught.value).startswith("quant/torchao: ")


@needs_torchao
def test_a_float8_configuration_does_not_depend_on_a_cuda_device():
    """Its refusal above is torchao's, not ours: what needs no such device runs."""
    system = apply(TorchAO(config="Float8WeightOnlyConfig"), llama())
    assert system.kernels == {"quant/torchao": "torchao: Float8Tensor"}
    assert "0.02 times" in system.facts["warnings"][0]


@needs_torchao
def test_layers_that_torchao_cannot_take_stay_dense_and_are_named():
    model = llama(96, 160)
    method = TorchAO(
        config="IntxWeightOnlyConfig",
        options={"weight_dtype": "int4", "granularity": "PerGroup(40)"},
    )
    facts = apply(method, model).facts
    left = [site.name for site in modules.linears(model)]
    assert "model.layers.0.mlp.up_proj" in left
    assert "model.layers.0.mlp.down_proj" not in left
    assert any("13 of 15 layers left dense" in warning for warning in facts["warnings"])


@needs_torchao
def test_options_become_what_the_configuration_wants():
    from torchao.quantization.granularity import PerGroup, PerRow
    from torchao.quantization.quant_primitives import MappingType

    cls = torchao.find_config("IntxWeightOnlyConfig")
    options = {
        "weight_dtype": "int4",
        "granularity": "PerGroup(32)",
        "mapping_type": "ASYMMETRIC",
        "scale_dtype": "torch.bfloat16",
    }
    made = torchao.build(cls, options)
    assert (made.weight_dtype, made.granularity) == (torch.int4, PerGroup(32))
    assert (made.mapping_type, made.scale_dtype) == (MappingType.ASYMMETRIC, torch.bfloat16)
    plain = torchao.build(torchao.find_config("Int8WeightOnlyConfig"), {"granularity": "PerRow"})
    assert plain.granularity == PerRow()
    assert plain.set_inductor_config is False  # it would change the compiler's settings for all


@needs_torchao
@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ("Int8WeightOnlyConfg", {}, UnknownName, "Did you mean 'Int8WeightOnlyConfig'"),
        ("quantize_", {}, UnknownName, "unknown configuration of torchao"),
        ("os.path", {}, SpecError, "no path in torchao"),
        ("torchao.nowhere.Config", {}, SpecError, "cannot be imported"),
        ("IntxWeightOnlyConfig", {"granulrity": 1}, UnknownName, "Did you mean 'granularity'"),
        ("IntxWeightOnlyConfig", {"granularity": "PerHaps(3)"}, SpecError, "PerHaps"),
        ("IntxWeightOnlyConfig", {"mapping_type": "odd"}, SpecError, "odd"),
        ("Int8WeightOnlyConfig", {"group_size": 32}, SpecError, "PerGroup"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(config, options, error, message):
    with pytest.raises(error, match=message):
        apply(TorchAO(config=config, options=options), llama())


@pytest.mark.parametrize(("kept", "simulated"), [(torch.float32, True), (torch.int8, False)])
def test_a_library_that_keeps_the_floats_is_simulated(kept, simulated):
    """A fake quantiser rounds and saves nothing: its quality counts, its speed does not."""

    def convert(site):
        weight = site.weight().clone()
        held = {"packed": [weight.to(kept)]}
        return _foreign.Converted(torch.nn.Identity(), lambda _: held, weight, "rounds", 8)

    system = System(
        model=llama(dtype=torch.float32), device=resolve("cpu"), context=64,
        **dict.fromkeys(("tokenizer", "step", "new_cache", "decode")),
    )  # fmt: skip
    done = _foreign.replace_linears(
        TorchAO(), system, SimpleNamespace(progress=quiet), convert, op="quant/fake"
    )
    assert done.simulated == (("quant/fake",) if simulated else ())


def test_options_survive_the_command_line():
    text = 'quant/torchao:config=IntxWeightOnlyConfig,options={"granularity": "PerGroup(32)", "version": 2}'
    spec = catalogue.parse_method(text)
    assert spec.params["options"] == {"granularity": "PerGroup(32)", "version": 2}
    assert catalogue.parse_method(spec.label()) == spec
    assert catalogue.normalise(MethodSpec.model_validate_json(spec.model_dump_json())) == spec
