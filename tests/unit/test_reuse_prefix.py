"""Prefix reuse on models: the numbers are the stored ones, and everything else is as without a store."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from compresskit.decode import pad
from compresskit.errors import Conflict, RunError, SpecError
from compresskit.hf.cache import cache_bytes, enable_rollback, roll_back
from compresskit.hf.rows import learn
from compresskit.hf.step import eager_step
from compresskit.methods.kv.int8 import Int8Cache
from compresskit.methods.kv.knorm import Knorm
from compresskit.methods.kv.sink_window import SinkWindow
from compresskit.methods.reuse._blocks import BlockStore
from compresskit.methods.reuse._host import HostTier
from compresskit.methods.reuse._radix import RadixStore
from compresskit.methods.reuse._rows import RowMemory, Tiers
from compresskit.methods.reuse._step import PrefixStep
from compresskit.methods.reuse.prefix_block import PrefixBlock
from compresskit.methods.reuse.prefix_radix import PrefixRadix
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait

FULL_ATTENTION = ("gpt2", "gpt_neox", "llama", "mixtral", "qwen3")
METHODS = [PrefixBlock(block=8, capacity=4_000_000), PrefixRadix(shortest=4, capacity=4_000_000)]
SHARED = 40


@pytest.fixture(params=METHODS, ids=lambda method: type(method).__name__)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def prompts(lab):
    """Two prompts of 60 tokens that share the first 40."""
    first = lab.prompt(60)
    return first, torch.cat((first[:, :SHARED], lab.prompt(20, seed=3)), dim=-1)


def in_bfloat16(system):
    model = copy.deepcopy(system.model).bfloat16()
    return replace(system, model=model, step=eager_step(model))


def rows(cache):
    return [
        getattr(layer, name)
        for layer in cache.layers
        for name in getattr(layer, "tensors", ("keys", "values"))
    ]


@pytest.mark.parametrize("name", FULL_ATTENTION)
@pytest.mark.parametrize("cast", [lambda system: system, in_bfloat16], ids=["float32", "bfloat16"])
def test_reuse_is_bit_equal_to_going_on_from_the_first_prompt(lab, method, name, cast):
    """Prefill of the first prompt, taken back to the shared part, then the rest: 0.0 apart."""
    plain = cast(lab.system(name))
    system = method.apply(plain, None)
    first, second = prompts(lab)
    system.step(first, system.new_cache(80))
    reused = system.new_cache(80)
    logits = system.step(second, reused)
    assert system.step.store.statistics.hit_tokens == SHARED

    recomputed = plain.new_cache(80)
    plain.step(first, recomputed)
    roll_back(recomputed, 60 - SHARED)
    expected = plain.step(second[:, SHARED:], recomputed)
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, rows(reused), rows(recomputed)))
    # One pass over the whole prompt orders its sums otherwise: equal up to rounding.
    whole = plain.step(second, plain.new_cache(80))
    torch.testing.assert_close(logits, whole, rtol=0.1, atol=0.1 if cast is in_bfloat16 else 1e-4)


def test_the_comparison_above_notices_rows_in_wrong_places(lab):
    """Negative control: values one token off. (Keys and values together could be in any order.)"""
    plain = lab.system("llama")
    system = PrefixRadix(shortest=4, capacity=4_000_000).apply(plain, None)
    first, second = prompts(lab)
    system.step(first, system.new_cache(80))
    read = system.step.memory.read

    def off_by_one(slots, count):
        keys_and_values = read(slots, count)
        return [tensor.roll(place % 2, dims=2) for place, tensor in enumerate(keys_and_values)]

    system.step.memory.read = off_by_one
    wrong = system.step(second, system.new_cache(80))
    whole = plain.step(second, plain.new_cache(80))
    assert (wrong - whole).abs().max() > 1e-2 * whole.abs().max()


def test_tokens_are_those_without_a_store(lab, method):
    plain = lab.system("llama")
    system = method.apply(plain, None)
    for prompt in (*prompts(lab), *prompts(lab)):
        request = lab.request(prompt, 16)
        assert lab.rows(system.generate(request)) == lab.rows(plain.generate(request))
    assert system.step.store.statistics.hits == 3


def test_a_prompt_that_is_stored_whole_computes_its_last_token(lab, method):
    plain = lab.system("llama")
    system = method.apply(plain, None)
    prompt = lab.prompt(64)
    system.step(prompt, system.new_cache(64))
    again = system.step(prompt, system.new_cache(64))
    assert system.step.store.statistics.hit_tokens == 63
    torch.testing.assert_close(again, plain.step(prompt, plain.new_cache(64)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("keep", "hit"), [(1, 63), (5, 59), (0, 0)])
def test_positions_whose_logits_are_wanted_are_computed(lab, keep, hit):
    plain = lab.system("llama")
    system = PrefixRadix(shortest=1, capacity=4_000_000).apply(plain, None)
    prompt = lab.prompt(64)
    system.step(prompt, system.new_cache(64))
    logits = system.step(prompt, system.new_cache(64), keep=keep)
    assert system.step.store.statistics.hit_tokens == hit
    expected = plain.step(prompt, plain.new_cache(64), keep=keep)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_request_gets_copies(lab, method):
    """What a request does to its cache is not seen by the next one."""
    system = method.apply(lab.system("llama"), None)
    prompt = lab.prompt(64)
    caches = [system.new_cache(64) for _ in range(3)]
    system.step(prompt, caches[0])
    system.step(prompt, caches[1])
    for tensor in rows(caches[1]):
        tensor.zero_()
    system.step(prompt, caches[2])
    assert torch.equal(rows(caches[2])[0][:, :, :60], rows(caches[0])[0][:, :, :60])
    # Nor does the cache keep the store's memory alive, or count it as its own.
    assert cache_bytes(caches[2]) == cache_bytes(caches[0])


def test_eviction_never_changes_an_answer(lab):
    """A store of three blocks under many prompts: rows are overwritten again and again."""
    plain = lab.system("llama")
    system = PrefixBlock(block=8, capacity=3 * 8 * 256).apply(plain, None)
    shared = lab.prompt(8)
    for seed in range(12):
        prompt = torch.cat((shared, lab.prompt(20, seed=seed % 4)), dim=-1)
        request = lab.request(prompt, 6)
        assert lab.rows(system.generate(request)) == lab.rows(plain.generate(request))
    statistics = system.step.store.statistics
    assert statistics.evicted_tokens > 0
    assert statistics.hit_tokens > 0


def test_padded_and_several_rows_pass_by(lab, method):
    plain = lab.system("llama")
    system = method.apply(plain, None)
    texts = [lab.prompt(length, seed=length)[0].tolist() for length in (30, 50)]
    tokens, mask = pad(texts, device=torch.device("cpu"))
    for _ in range(2):
        together = lab.rows(system.generate(lab.request(tokens, 8, mask=mask)))
    assert together == lab.rows(plain.generate(lab.request(tokens, 8, mask=mask)))
    statistics = system.step.store.statistics
    assert (statistics.bypassed, statistics.lookups) == (2, 0)
    assert system.step.store.stored_tokens == 0


def test_positions_of_the_callers_own_pass_by(lab, method):
    plain = lab.system("llama")
    system = method.apply(plain, None)
    prompt, shifted = lab.prompt(40), torch.arange(7, 47).unsqueeze(0)
    system.step(prompt, system.new_cache(40))
    logits = system.step(prompt, system.new_cache(40), positions=shifted)
    assert torch.equal(logits, plain.step(prompt, plain.new_cache(40), positions=shifted))


def test_salts_keep_requests_apart(lab, method):
    system = method.apply(lab.system("llama"), None)
    prompt = lab.prompt(40)
    statistics = system.step.store.statistics
    with system.step.salted("a"):
        system.step(prompt, system.new_cache(40))
    system.step(prompt, system.new_cache(40))
    assert statistics.hits == 0
    with system.step.salted("a"):
        system.step(prompt, system.new_cache(40))
    assert statistics.hits == 1


def test_a_short_match_is_computed_again(lab):
    system = PrefixRadix(shortest=16, capacity=4_000_000).apply(lab.system("llama"), None)
    first = lab.prompt(40)
    second = torch.cat((first[:, :15], lab.prompt(20, seed=5)), dim=-1)
    for prompt in (first, second):
        system.step(prompt, system.new_cache(64))
    assert system.step.store.statistics.hits == 0
    assert system.step.store.stored_tokens == 60


def test_a_failing_pass_leaves_nothing_behind(lab, method):
    system = method.apply(lab.system("llama"), None)
    inner = system.step.inner

    def broken(tokens, cache, **options):
        raise RunError("the device is gone")

    system.step.inner = broken
    with pytest.raises(RunError, match="gone"):
        system.step(lab.prompt(40), system.new_cache(40))
    assert system.step.store.stored_tokens == 0
    system.step.inner = inner
    system.step(lab.prompt(40), system.new_cache(40))
    assert system.step.store.statistics.hits == 0


def test_an_int8_cache_is_stored_as_codes(lab, method):
    """The rows are the codes and scales, and reuse is bit-equal here too."""
    plain = Int8Cache().apply(lab.system("llama"), None)
    system = method.apply(plain, None)
    dense = method.apply(lab.system("llama"), None)
    size = "bytes_per_token"
    assert system.facts["prefix_store"][size] < dense.facts["prefix_store"][size]
    first, second = prompts(lab)
    system.step(first, system.new_cache(80))
    reused = system.new_cache(80)
    logits = system.step(second, reused)
    assert system.step.store.statistics.hit_tokens == SHARED
    recomputed = plain.new_cache(80)
    plain.step(first, recomputed)
    roll_back(recomputed, 60 - SHARED)
    assert torch.equal(logits, plain.step(second[:, SHARED:], recomputed))
    assert all(map(torch.equal, rows(reused), rows(recomputed)))


def test_tokens_can_be_taken_back_from_a_seeded_cache(lab, method):
    system = method.apply(lab.system("llama"), None)
    prompt = lab.prompt(40)
    caches = [system.new_cache(64) for _ in range(3)]
    for cache in caches:
        system.step(prompt, cache)
    enable_rollback(caches[1])
    system.step(lab.prompt(3, seed=9), caches[1])
    roll_back(caches[1], 3)
    probe = lab.prompt(1, seed=4)
    assert torch.equal(system.step(probe, caches[1]), system.step(probe, caches[2]))


def test_speculation_goes_on_from_a_stored_prefix(lab, method):
    plain = lab.system("llama")
    system = NGram().apply(method.apply(plain, None), None)
    request = lab.request(lab.prompt(40), 12)
    expected = lab.rows(plain.generate(request))
    assert [lab.rows(system.generate(request)) for _ in range(2)] == [expected, expected]
    assert system.step.store.statistics.hits == 1


def test_sliding_layers_are_refused(lab, method):
    with pytest.raises(Conflict, match=r"layer 0 .*Sliding.*does not hold every token"):
        method.apply(lab.system("gemma3_text"), None)


@pytest.mark.parametrize("evicting", [SinkWindow(sink=2, window=8), Knorm()])
def test_evicting_layers_are_refused(lab, method, evicting):
    """By traits before anything is loaded, and again by looking."""
    assert Trait.FULL_CONTEXT not in evicting.effects().after(frozenset(Trait))
    assert Trait.FULL_CONTEXT in method.effects().requires
    with pytest.raises(Conflict, match="drops tokens or codes them together"):
        method.apply(evicting.apply(lab.system("llama"), None), None)


def test_layers_without_a_row_for_each_token_are_refused(lab, method):
    """Such as one that codes in groups behind a tail of floats, or reserves places."""
    from compresskit.hf.cache import Layer, factory

    class Tail(Layer):
        """Moves rows to `old` in groups of four."""

        tensors = ("keys", "values", "old_keys", "old_values")

        def update(self, key_states, value_states, *_, **__):
            self.lazy_initialization(key_states, value_states)
            self.append(keys=key_states, values=value_states)
            return self.keys, self.values

    class Reserved(Tail):
        tensors = ("keys", "values")

        def update(self, key_states, value_states, *_, **__):
            seen = super().update(key_states, value_states)
            self.spare = torch.zeros(1, 2, 99, 8)
            return seen

    class Drifting(Tail):
        tensors = ("keys", "values")

        def update(self, key_states, value_states, *_, **__):
            if self.keys is not None:
                self.keys = self.keys * 1.5
            return super().update(key_states, value_states)

    class Counting(Tail):
        tensors = ("keys", "values")
        seen = 0

        def update(self, key_states, value_states, *_, **__):
            self.seen += key_states.shape[-2]
            return super().update(key_states, value_states)

    class Elsewhere(Tail):
        """Keeps what matters where nobody looks."""

        tensors = ("keys", "values")

        def __init__(self):
            super().__init__()
            self.box = type("Box", (), {})()

        def update(self, key_states, value_states, *_, **__):
            keys, values = super().update(key_states, value_states)
            self.box.first = getattr(self.box, "first", key_states[..., :1, :])
            return keys - 3 * self.box.first * keys, values

    plain = lab.system("llama")
    for kind, reason in (
        (Tail, "'old_keys' have no row for each token"),
        (Reserved, "'spare' changes from pass to pass"),
        (Drifting, "rows of its 'keys' change"),
        (Counting, "'seen' changes from pass to pass"),
    ):
        system = replace(plain, new_cache=factory(plain.model.config, lambda index, k=kind: k()))
        with pytest.raises(Conflict, match=reason):
            method.apply(system, None)
    system = replace(plain, new_cache=factory(plain.model.config, lambda index: Elsewhere()))
    with pytest.raises(Conflict, match="keep something elsewhere"):
        method.apply(system, None)


def test_a_store_of_another_model_is_refused(lab):
    """Other weights, another type, another cache method: other identities."""
    system = lab.system("llama")
    layout = learn(system)
    assert learn(system).identity == layout.identity
    altered = in_bfloat16(system)
    altered.model.float()
    others = [
        learn(altered).identity,
        learn(in_bfloat16(system)).identity,
        learn(Int8Cache().apply(system, None)).identity,
        learn(lab.system("qwen3")).identity,
    ]
    assert len({layout.identity, *others}) == 5
    store = RadixStore(10, others[0])
    memory = RowMemory(layout, slots=10, unit=1, device=torch.device("cpu"))
    with pytest.raises(Conflict, match="rows of another model"):
        PrefixStep(system.step, layout=layout, store=store, memory=memory)


def test_a_cache_of_another_kind_is_refused(lab, method):
    system = method.apply(lab.system("llama"), None)
    other = Int8Cache().apply(lab.system("llama"), None)
    with pytest.raises(RunError, match=r"Int8Layer.*DynamicLayer"):
        system.step(lab.prompt(8), other.new_cache(8))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PrefixBlock(block=16, capacity=4095), "4095 bytes .*one block of 16 tokens .* 4096 bytes"),
        (PrefixRadix(capacity=255), "255 bytes .*one token .* 256 bytes"),
    ],
)
def test_a_capacity_for_less_than_one_block_is_refused(lab, method, message):
    # 2 layers x keys and values x 2 heads x 8 numbers x 4 bytes = 256 bytes a token
    with pytest.raises(SpecError, match=message):
        method.apply(lab.system("llama"), None)
    enough = method.model_copy(update={"capacity": method.capacity + 1})
    assert enough.apply(lab.system("llama"), None).facts["prefix_store"]["slots"] == 1


def test_a_host_tier_on_a_cpu_is_refused(lab):
    with pytest.raises(Conflict, match=r"host_capacity.*CPU"):
        PrefixBlock(host_capacity=1_000_000).apply(lab.system("llama"), None)


def test_blocks_that_went_to_the_host_come_back_unchanged(lab):
    """The tiers of a GPU, both of them in this machine's memory."""
    plain = lab.system("llama")
    layout = learn(plain)
    cpu = torch.device("cpu")
    device, host = (RowMemory(layout, slots=n, unit=8, device=cpu) for n in (5, 20))
    store = BlockStore(5, 8, layout.identity, HostTier(20, Tiers(device, host)))
    step = PrefixStep(plain.step, layout=layout, store=store, memory=device)
    first, other = lab.prompt(40), lab.prompt(40, seed=8)
    stored = plain.new_cache(40)
    step(first, stored)
    step(other, plain.new_cache(40))
    again = plain.new_cache(40)
    step(first, again)
    assert store.statistics.spilled_tokens >= 40
    assert store.statistics.fetched_tokens == 40
    assert store.statistics.hit_tokens == 39
    for held, expected in zip(rows(again), rows(stored), strict=True):
        assert torch.equal(held[:, :, :39], expected[:, :, :39])


def test_the_memory_is_what_was_asked_for(lab):
    method = PrefixBlock(block=8, capacity=100_000)
    system = method.apply(lab.system("llama"), None)
    taken = sum(slab.untyped_storage().nbytes() for slab in system.step.memory._slabs)
    assert taken == system.facts["prefix_store"]["bytes"]
    assert 100_000 - 8 * 256 < taken <= 100_000


def test_traits(method):
    effects = method.effects()
    assert effects.requires == {Trait.OWN_CACHE, Trait.FULL_CONTEXT, Trait.OWN_LOOP}
    after = effects.after(frozenset(Trait))
    # A cache method after it would change what the rows are; a second store finds no cache to fill.
    assert Trait.OWN_CACHE not in after
    assert {Trait.ROLLBACK, Trait.LOSSLESS, Trait.PADDED_BATCH, Trait.FRESH} <= after
