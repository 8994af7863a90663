"""Baselines and wrapped caches: no cache, transformers' own, and what they would get wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import cache_utils

from compresskit.decode import pad
from compresskit.errors import Conflict, MissingExtra, RunError
from compresskit.hf import wrapped
from compresskit.hf.cache import Layer, cache_bytes, roll_back
from compresskit.measure.memory.moved import cache_traffic
from compresskit.methods.kv.dynamic import DynamicKV
from compresskit.methods.kv.hf_fp8 import HFFp8
from compresskit.methods.kv.hf_hqq import HFHqq
from compresskit.methods.kv.hf_quanto import HFQuanto
from compresskit.methods.kv.none import NoCache
from compresskit.methods.kv.offload import OffloadedCache
from compresskit.methods.kv.static import StaticKV
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait

EXACT = [NoCache(), DynamicKV(), StaticKV()]
KEYS = 2 * 2 * 8 * 4  # layers, key/value heads, head dimension, bytes: of one token of `llama`


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def name_of(method):
    return type(method).__name__


def forced(system, tokens, *, cut=20):
    """Logits of all tokens: the first `cut` in one pass, the others one by one."""
    cache = system.new_cache(tokens.shape[-1])
    logits = [system.step(tokens[:, :cut], cache, keep=0)]
    logits += [
        system.step(tokens[:, i : i + 1], cache, keep=0) for i in range(cut, tokens.shape[-1])
    ]
    return torch.cat(logits, dim=1)


def filled(system, tokens, *, more=0):
    cache = system.new_cache(tokens.shape[-1] + more)
    system.step(tokens, cache)
    for token in range(1, more + 1):
        system.step(torch.full((tokens.shape[0], 1), token), cache)
    return cache


# What changes nothing


@pytest.mark.parametrize("method", EXACT, ids=name_of)
def test_exact_caches_give_the_tokens_of_the_dense_one(lab, architecture, method):
    system = lab.system(architecture)
    request = lab.request(lab.prompt(30), 12)
    assert lab.rows(method.apply(system, None).generate(request)) == lab.rows(
        system.generate(request)
    )


def test_the_dynamic_cache_is_bit_equal_to_the_empty_stack(lab, architecture):
    system = lab.system(architecture)
    tokens = lab.prompt(30)
    assert torch.equal(forced(DynamicKV().apply(system, None), tokens), forced(system, tokens))


@pytest.mark.parametrize("method", [NoCache(), StaticKV()], ids=name_of)
def test_other_shapes_differ_by_rounding_alone(lab, method):
    system = lab.system("llama", double=True)
    tokens = lab.prompt(30)
    dense = forced(system, tokens)
    torch.testing.assert_close(forced(method.apply(system, None), tokens), dense)
    # Negative control: the same comparison sees one other token.
    tokens[0, 3] += 1
    assert (forced(method.apply(system, None), tokens) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("method", EXACT, ids=name_of)
def test_padded_rows_equal_their_rows_alone(lab, architecture, method):
    system = method.apply(lab.system(architecture), None)
    prompts = [lab.prompt(length, seed=length)[0].tolist() for length in (5, 21)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    together = lab.rows(system.generate(lab.request(tokens, 8, mask=mask)))
    assert together == [
        lab.rows(system.generate(lab.request(torch.tensor([p]), 8)))[0] for p in prompts
    ]


# No cache


def widths(lab, system, new):
    """Tokens of every forward pass of the model while `new` tokens are decoded."""
    seen = []
    hook = system.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        lab.rows(system.generate(lab.request(lab.prompt(10), new)))
    finally:
        hook.remove()
    return seen


def test_without_a_cache_each_step_runs_the_whole_text(lab):
    system = lab.system("llama")
    assert widths(lab, NoCache().apply(system, None), 4) == [10, 11, 12, 13]
    assert widths(lab, system, 4) == [10, 1, 1, 1]


def test_without_a_cache_only_ids_are_held(lab):
    cache = filled(NoCache().apply(lab.system("llama"), None), lab.prompt(30), more=2)
    assert cache_bytes(cache) == {"ids": 32 * 8}
    assert cache.get_seq_length() == 32


def test_without_a_cache_tokens_are_taken_back_by_forgetting_them(lab):
    system = NoCache().apply(lab.system("llama"), None)
    straight, detour = filled(system, lab.prompt(12)), filled(system, lab.prompt(12), more=3)
    roll_back(detour, 3)
    probe = torch.tensor([[9]])
    assert torch.equal(system.step(probe, detour), system.step(probe, straight))


def test_prompt_lookup_runs_without_a_cache(lab):
    plain = lab.system("llama")
    request = lab.request(lab.prompt(4).repeat(1, 6), 24)
    speculating = NGram().apply(NoCache().apply(plain, None), None)
    assert lab.rows(speculating.generate(request)) == lab.rows(plain.generate(request))


# Static


def test_a_static_cache_has_its_size_from_the_first_token_on(lab):
    system = StaticKV().apply(lab.system("llama"), None)
    cache = system.new_cache(50)
    system.step(lab.prompt(10), cache)
    held = cache_bytes(cache)
    assert held["keys_values"] == 2 * KEYS * 50
    system.step(lab.prompt(1), cache)
    assert cache_bytes(cache) == held


def test_a_static_cache_takes_tokens_back_exactly_but_not_out_of_a_window(lab):
    system = StaticKV().apply(lab.system("llama"), None)
    straight, detour = (system.new_cache(20) for _ in range(2))
    for cache in (straight, detour):
        system.step(lab.prompt(5), cache)
    system.step(lab.prompt(3, seed=7), detour)
    roll_back(detour, 3)
    assert torch.equal(system.step(lab.prompt(1), detour), system.step(lab.prompt(1), straight))
    windows = StaticKV().apply(lab.system("gemma3_text"), None)
    with pytest.raises(RunError, match="StaticSlidingWindowLayer"):
        roll_back(filled(windows, lab.prompt(5), more=1), 1)
    traits = frozenset(Trait)
    assert Trait.ROLLBACK in StaticKV().effects().after(traits)
    assert Trait.ROLLBACK not in StaticKV().effects().after(traits - {Trait.SLOT_MASKS})


# Offloading


def test_offloading_needs_cuda_and_says_so_before_anything_is_loaded():
    assert Trait.CUDA in OffloadedCache().effects().requires


# transformers' quantised layers


def test_fp8_stores_codes_and_one_scale_a_side(lab):
    cache = filled(HFFp8().apply(lab.system("llama"), None), lab.prompt(30), more=2)
    assert cache_bytes(cache) == {"codes": 2 * KEYS // 4 * 32, "scales": 2 * 2 * 4}
    assert cache.get_seq_length() == 32


def test_the_first_pass_hides_the_rounding(lab):
    """Why caches are scored after a split: a single pass measures nothing."""
    system, tokens = lab.system("llama"), lab.prompt(30)
    rounded, dense = forced(HFFp8().apply(system, None), tokens), forced(system, tokens)
    assert torch.equal(rounded[:, :20], dense[:, :20])
    assert (rounded[:, 20:] - dense[:, 20:]).abs().max() > 1e-2


def test_fp8_clips_what_exceeds_the_prompt():
    layer = wrapped.quantised_layer("fp8")(0)
    prompt = torch.full((1, 1, 4, 8), 2.0)
    layer.update(prompt, prompt)
    keys, _ = layer.update(1.5 * prompt[..., :1, :], prompt[..., :1, :])
    torch.testing.assert_close(keys[..., -1, :], torch.full((1, 1, 8), 2.0))
    keys, _ = layer.update(0.5 * prompt[..., :1, :], prompt[..., :1, :])
    torch.testing.assert_close(keys[..., -1, :], torch.ones(1, 1, 8), rtol=0.07, atol=0)


def test_a_decode_step_writes_a_full_copy_and_the_accounts_say_so(lab):
    system = HFFp8().apply(lab.system("llama"), None)
    assert "copy" not in cache_traffic(filled(system, lab.prompt(30)))
    cache = filled(system, lab.prompt(30), more=2)
    assert cache_traffic(cache) == {**cache_bytes(cache), "copy": 2 * KEYS * 32}


def test_what_would_corrupt_the_cache_is_refused(lab):
    # Stock transformers: it says that it can, and cannot.
    stock = cache_utils.Fp8QuantizedLayer()
    rows = torch.ones(1, 1, 4, 8)
    stock.update(rows, rows)
    assert stock.is_croppable
    with pytest.raises(IndexError):
        stock.crop(-1)
    cache = filled(HFFp8().apply(lab.system("llama"), None), lab.prompt(5), more=1)
    assert not cache.is_croppable
    layer = cache.layers[0]
    for refused in (
        lambda: layer.crop(-1),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: roll_back(cache, 1),
    ):
        with pytest.raises(RunError, match="Fp8QuantizedLayer"):
            refused()


def test_beams_are_refused_where_codes_would_keep_the_old_order():
    class Old:
        residual_length = 4
        is_initialized = True

        def reorder_cache(self, beam_idx):
            self.order = beam_idx.tolist()

    class Layered(wrapped.Wrapped, Old):
        pass

    with pytest.raises(RunError, match="reorder beams"):
        Layered().reorder_cache(torch.tensor([1, 0]))
    new = Layered()
    new._pending_beam_idx = None
    new.reorder_cache(torch.tensor([1, 0]))
    assert new.order == [1, 0]


@pytest.mark.parametrize("method", [HFFp8()], ids=name_of)
def test_a_padded_batch_is_refused_where_rows_are_rounded_together(lab, method):
    system = method.apply(lab.system("llama"), None)
    tokens, mask = pad([[3, 4, 5, 6], [7]], device=torch.device("cpu"))
    with pytest.raises(RunError, match="kv/hf_fp8 takes no padded batch"):
        list(system.generate(lab.request(tokens, 4, mask=mask)))
    equal = torch.cat([lab.prompt(6), lab.prompt(6, seed=1)])
    assert len(lab.rows(system.generate(lab.request(equal, 4)))) == 2


def test_an_older_transformers_is_told_apart_from_a_broken_one(lab, monkeypatch):
    wrapped._layer_class.cache_clear()
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer")
    with pytest.raises(Conflict, match=r"has no fp8 cache.*pip install -U transformers"):
        HFFp8().apply(lab.system("llama"), None)


@pytest.mark.parametrize(
    ("method", "package", "extra"),
    [
        (HFQuanto(group=8), "optimum-quanto", "quanto"),
        (HFHqq(group=8), "hqq", "hqq"),
    ],
    ids=["quanto", "hqq"],
)
def test_a_missing_library_is_named_with_its_install_line(lab, monkeypatch, method, package, extra):
    def absent(name):
        raise wrapped.PackageNotFoundError(name)

    wrapped._layer_class.cache_clear()
    monkeypatch.setattr(wrapped, "version", absent)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed.*compresskit\[{extra}\]"):
        method.apply(lab.system("llama"), None)


def test_groups_that_straddle_heads_are_refused_by_both_numbers(lab):
    for method in (HFQuanto(group=16), HFHqq(group=16)):
        with pytest.raises(Conflict, match=r"groups of 16.*head dimension of 8"):
            method.apply(lab.system("llama"), None)
    # A token of `llama` has two groups of 8; at 2 bits four must come at a time.
    with pytest.raises(Conflict, match=r"4 groups share their bytes.*has 2"):
        HFHqq(bits=2, group=8).apply(lab.system("llama"), None)


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_and_hqq_hold_what_the_formula_says(lab, bits):
    system, prompt = lab.system("llama"), lab.prompt(24)
    for method in (
        HFQuanto(bits=bits, group=8, residual=100),
        HFHqq(bits=max(bits, 4), group=8, residual=100),
    ):
        try:
            changed = method.apply(system, None)
        except MissingExtra as missing:
            pytest.skip(str(missing))
        cache = filled(changed, prompt, more=2)
        numbers = 2 * KEYS // 4 * 24
        assert cache_bytes(cache) == {
            "codes": numbers * method.bits // 8,
            # float32 scale and zero point of eight numbers
            "scales": 2 * 4 * numbers // 8,
            "residual": 2 * KEYS * 2,
        }
        assert not cache.is_croppable


# Accounts of what hides its tensors


class Hidden(Layer):
    """Holds tensor subclasses, as libraries do."""

    tensors = ()

    def __init__(self, codes):
        super().__init__()
        self.codes = codes

    def named_tensors(self):
        """Its own names."""
        for tensor in wrapped.tensors_in(self.codes):
            yield "codes", tensor


def test_tensors_inside_tensor_subclasses_are_counted():
    inner = torch.ones(3, 4), torch.ones(3, 4)
    cache = SimpleNamespace(layers=[Hidden([{"packed": TwoTensor(*inner)}])])
    assert cache_bytes(cache) == {"codes": 2 * 3 * 4 * 4}
    shared = torch.ones(3, 4)
    cache = SimpleNamespace(layers=[Hidden(TwoTensor(shared, shared))])
    assert cache_bytes(cache) == {"codes": 3 * 4 * 4}


def test_a_layer_may_read_less_than_it_holds():
    class Paged(Layer):
        def read_bytes(self):
            """A quarter of the rows, and the pages' index."""
            return {"keys_values": 100, "index": 10}

    rows = torch.ones(1, 1, 8, 4)
    paged, plain = Paged(), Layer.__new__(Layer)
    Layer.__init__(plain)
    for layer in (paged, plain):
        layer.append(keys=rows, values=rows)
    dense = 2 * 8 * 4 * 4
    assert cache_traffic(SimpleNamespace(layers=[paged])) == {"keys_values": 100, "index": 10}
    assert cache_traffic(SimpleNamespace(layers=[paged, plain])) == {
        "keys_values": 100 + dense,
        "index": 10,
    }
