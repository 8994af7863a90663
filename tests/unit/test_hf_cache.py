"""Caches: what is replaced, what rolls back exactly, and how many bytes are really held."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import (
    Layer,
    build_cache,
    cache_bytes,
    enable_rollback,
    factory,
    new_dynamic,
    roll_back,
    static,
)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class PlainLayer(Layer):
    """The dense cache, written with `Layer`."""

    def update(self, key_states, value_states, *_, **__):
        self.lazy_initialization(key_states, value_states)
        self.append(keys=key_states, values=value_states)
        return self.keys, self.values


def fill(system, cache, tokens, *, first=None):
    """Feed `tokens` in one pass, or `first` tokens in one and the rest one by one."""
    first = first or tokens.shape[-1]
    logits = [system.step(tokens[:, :first], cache, keep=0)]
    logits += [system.step(tokens[:, i : i + 1], cache) for i in range(first, tokens.shape[-1])]
    return torch.cat(logits, dim=1)


def test_only_full_attention_layers_are_replaced(lab):
    config = lab.system("gemma3_text").model.config
    cache = build_cache(config, lambda index: PlainLayer())
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, PlainLayer, DynamicSlidingWindowLayer]
    assert cache.layers[0].sliding_window == 16
    assert [type(layer) for layer in new_dynamic(config).layers][1] is DynamicLayer


def test_make_layer_is_told_the_index(lab):
    seen = []
    build_cache(lab.system("gemma3_text").model.config, lambda i: seen.append(i) or PlainLayer())
    assert seen == [1]


def test_a_model_without_full_attention_is_refused_before_the_run():
    config = MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(Conflict, match=r"mistral has no full-attention layer.*SlidingWindow"):
        factory(config, lambda index: PlainLayer())


def test_a_layer_of_ours_that_keeps_everything_is_bit_equal_to_the_dense_cache(lab, architecture):
    system = lab.system(architecture)
    tokens = lab.prompt(40)
    ours = fill(system, build_cache(system.model.config, lambda i: PlainLayer()), tokens, first=30)
    assert torch.equal(ours, fill(system, system.new_cache(40), tokens, first=30))


def test_generate_continues_from_a_prefilled_cache_of_ours(lab, architecture):
    system = lab.system(architecture)
    tokens = lab.prompt(30)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    cache = build_cache(system.model.config, lambda index: PlainLayer())
    fill(system, cache, tokens[:, :29])
    fresh = system.model.generate(tokens, **options)
    assert torch.equal(system.model.generate(tokens, past_key_values=cache, **options), fresh)


def test_every_member_covers_every_tensor_held():
    class Marked(PlainLayer):
        tensors = ("keys", "values", "marks")

    layer = Marked()
    keys = torch.arange(24.0).view(2, 1, 3, 4)
    layer.update(keys, keys + 100)
    layer.append(marks=keys[..., :1])
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.marks, keys.flip(0)[..., :1])
    layer.batch_repeat_interleave(2)
    assert [len(getattr(layer, name)) for name in layer.tensors] == [4, 4, 4]
    assert torch.equal(layer.keys[0], layer.keys[1])
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.marks[0], keys[0, ..., :1])
    layer.crop(-2)
    assert [getattr(layer, name).shape[-2] for name in layer.tensors] == [1, 1, 1]
    layer.crop(-5)
    assert layer.get_seq_length() == 0
    with pytest.raises(RunError, match="minus"):
        layer.crop(3)
    layer.reset()
    assert [getattr(layer, name) for name in layer.tensors] == [None] * 3
    assert layer.get_seq_length() == 0


def test_appended_rows_share_no_storage_with_the_model():
    layer = PlainLayer()
    fused = torch.zeros(1, 2, 5, 12)
    layer.update(fused[..., :4], fused[..., 4:8])
    assert layer.keys.untyped_storage().nbytes() == 2 * 5 * 4 * 4


# Taking tokens back


def undone(system, tokens, rejected, *, cache, size=5):
    """Logits after a block that was taken back, and without it; both bit for bit alike."""
    fill(system, cache, tokens)
    enable_rollback(cache)
    for start in range(0, rejected.shape[-1], size):
        block = rejected[:, start : start + size]
        fill(system, cache, block)
        roll_back(cache, block.shape[-1])
    return fill(system, cache, rejected[:, :3])


@pytest.mark.parametrize("length", [4, 12, 15, 16, 17, 40])
def test_a_rollback_leaves_no_trace(lab, architecture, length):
    system = lab.system(architecture)
    tokens, rejected = lab.prompt(length), lab.prompt(15, seed=9)
    after = undone(system, tokens, rejected, cache=system.new_cache(64))
    fresh = system.new_cache(64)
    fill(system, fresh, tokens)
    assert torch.equal(after, fill(system, fresh, rejected[:, :3]))


@pytest.mark.parametrize("length", [10, 40])
def test_partial_rollbacks_equal_recomputation(lab, architecture, length):
    system = lab.system(architecture, double=True)
    text = lab.prompt(length + 30)
    cache = system.new_cache(0)
    fill(system, cache, text[:, :length])
    enable_rollback(cache)
    at = length
    for accepted in (1, 3, 0, 2, 4, 1, 0, 5):
        block = torch.cat(
            (text[:, at : at + 1 + accepted], lab.prompt(5 - accepted, seed=at)), dim=-1
        )
        fill(system, cache, block)
        roll_back(cache, 5 - accepted)
        at += 1 + accepted
        assert cache.get_seq_length() == at
    expected = system.step(text[:, : at + 1], system.new_cache(0))
    assert (system.step(text[:, at : at + 1], cache) - expected).abs().max() < 1e-9


def test_a_sliding_layer_is_trimmed_by_a_rollback_of_zero(lab):
    system = lab.system("gemma3_text")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(40))
    enable_rollback(cache)
    for _ in range(3):
        fill(system, cache, lab.prompt(4))
        roll_back(cache, 0)
    assert cache.layers[0].keys.shape[-2] == 15
    assert cache.layers[1].keys.shape[-2] == 52


def test_a_sliding_layer_without_recording_refuses_and_stays_whole(lab):
    system = lab.system("gemma3_text")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(40))
    with pytest.raises(RunError, match="enable_rollback"):
        roll_back(cache, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40, 40]


def test_a_rollback_beyond_what_was_recorded_is_refused(lab):
    system = lab.system("gemma3_text")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(40))
    enable_rollback(cache)
    fill(system, cache, lab.prompt(4))
    with pytest.raises(RunError, match="of 5 tokens it can only restore 4"):
        roll_back(cache, 5)
    roll_back(cache, 4)


@pytest.mark.parametrize("n", [-1, 7])
def test_nonsense_rollbacks_are_refused(lab, n):
    system = lab.system("llama")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(6))
    with pytest.raises(RunError, match="take"):
        roll_back(cache, n)


def test_a_static_cache_with_windows_says_that_it_cannot_roll_back(lab):
    enable_rollback(static(lab.system("llama").model.config, 32))
    cache = static(lab.system("gemma3_text").model.config, 32)
    with pytest.raises(RunError, match=r"layer 0 \(StaticSlidingWindowLayer\)"):
        enable_rollback(cache)


# Bytes


@pytest.mark.parametrize(("batch", "length"), [(1, 9), (3, 20)])
def test_a_dense_cache_holds_what_the_formula_says(lab, batch, length):
    system = lab.system("llama")
    cache = system.new_cache(64)
    assert cache_bytes(cache) == {}
    fill(system, cache, lab.prompt(length).expand(batch, -1), first=5)
    config = system.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert cache_bytes(cache) == {"keys_values": per_token * batch * length}


def test_bytes_per_token_of_a_135m_model_match_the_reference_figure():
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, **heads)
    cache = new_dynamic(config)
    rows = torch.zeros(1, 3, 7, 64)
    for index in range(30):
        cache.update(rows, rows, index)
    assert cache_bytes(cache) == {"keys_values": 46_080 * 7}


def test_a_sliding_layer_holds_its_window_once_steps_have_run(lab):
    system = lab.system("gemma3_text")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(40), first=30)
    # torch.cat of 15 rows and the new one; the layer keeps a view of the newest 15. 8: its window.
    row = 2 * 2 * 8 * 4
    assert cache_bytes(cache) == {
        "keys_values": 2 * 15 * row + 40 * row,
        "slack": 2 * row,
        "other": 2 * 8,
    }


def test_views_are_charged_for_the_storage_they_keep_alive(lab):
    system = lab.system("llama")
    cache = system.new_cache(64)
    fill(system, cache, lab.prompt(20))
    assert set(cache_bytes(cache)) == {"keys_values"}
    full = cache_bytes(cache)["keys_values"]
    roll_back(cache, 12)
    assert cache_bytes(cache) == {"keys_values": full * 8 // 20, "slack": full * 12 // 20}


def test_shared_storage_counts_once_and_other_attributes_not_at_all():
    layer = PlainLayer()
    layer.keys = torch.zeros(1, 1, 8, 4)
    layer.values = layer.keys[..., :2, :]
    layer.states = {0: [torch.zeros(3), None], 1: (7, "x")}
    cache = new_dynamic(LlamaConfig(num_hidden_layers=1))
    cache.layers[0] = layer
    assert cache_bytes(cache) == {"keys_values": 8 * 4 * 4, "other": 3 * 4}


def test_a_layer_says_what_it_holds():
    class Coded(PlainLayer):
        tensors = ("keys", "values", "marks")
        holds = MappingProxyType({"keys": "codes", "values": "codes", "marks": "index"})

    layer = Coded()
    rows = torch.zeros(1, 1, 8, 4)
    layer.update(rows, rows)
    layer.append(marks=rows[..., :1])
    layer.spare = torch.zeros(5)
    cache = new_dynamic(LlamaConfig(num_hidden_layers=1))
    cache.layers[0] = layer
    assert cache_bytes(cache) == {"codes": 2 * 128, "index": 32, "other": 20}


def test_two_caches_that_share_their_rows_hold_them_once():
    layer = PlainLayer()
    layer.keys = layer.values = torch.zeros(1, 1, 8, 4)
    first = new_dynamic(LlamaConfig(num_hidden_layers=1))
    second = new_dynamic(LlamaConfig(num_hidden_layers=1))
    first.layers[0] = second.layers[0] = layer
    assert cache_bytes(first, second) == {"keys_values": 128}


def test_a_cache_that_keeps_one_token_too_many_shows():
    class OneMore(PlainLayer):
        """Forgets everything but the newest two rows, or so it says."""

        def update(self, key_states, value_states, *_, **__):
            seen = super().update(key_states, value_states)
            self.each(lambda held: held[..., -3:, :].clone())
            return seen

    layer = OneMore()
    layer.update(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4))
    cache = new_dynamic(LlamaConfig(num_hidden_layers=1))
    cache.layers[0] = layer
    row = 2 * 4 * 4
    assert cache_bytes(cache)["keys_values"] == 2 * row + row


def test_a_static_cache_is_charged_for_its_capacity(lab):
    system = lab.system("llama")
    cache = static(system.model.config, 32)
    system.step(lab.prompt(5), cache)
    held = cache_bytes(cache)
    assert held.pop("keys_values") == 2 * 2 * 2 * 32 * 8 * 4
    assert sum(held.values()) <= 2 * 8
