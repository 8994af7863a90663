"""kv/sink_window: it keeps what it says, and attends as a dense model with the same mask would."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache

from compresskit.decode import pad
from compresskit.errors import RunError
from compresskit.hf.cache import cache_bytes
from compresskit.hf.rotary import Rotary
from compresskit.methods.kv._evict import Rule
from compresskit.methods.kv.sink_window import SinkWindow, SinkWindowLayer, keep
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait

SINK, WINDOW = 3, 8


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def bounded(system, *, sink=SINK, window=WINDOW):
    return SinkWindow(sink=sink, window=window).apply(system, None)


def bounded_layer(*, rotary=None):
    return SinkWindowLayer(
        Rule(tokens=SINK + WINDOW, hold=True, interval=1, sink=SINK, rotary=rotary)
    )


def forced(system, tokens, *, cuts):
    """Logits of all tokens, fed in passes that end at `cuts`."""
    cache, logits, start = system.new_cache(tokens.shape[-1]), [], 0
    for end in (*cuts, tokens.shape[-1]):
        logits.append(system.step(tokens[:, start:end], cache, keep=0))
        start = end
    return torch.cat(logits, dim=1)


def visible(length, *, cuts, sink=SINK, window=WINDOW):
    """Bool `[length, length]`: what each query sees if rows are dropped after each pass."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for end in (*cuts, length):
        for query in range(start, end):
            seen[query, : min(sink, start)] = True
            seen[query, max(start - window, 0) : query + 1] = True
        start = end
    return seen


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


STEPS = [(20, *range(21, 40)), tuple(range(1, 40)), (5, 9, 20, 33, 34), ()]


@pytest.mark.parametrize("cuts", STEPS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2", "mixtral"])
def test_it_equals_a_dense_pass_with_the_mask_spelled_out(lab, name, cuts):
    system = lab.system(name)
    tokens = lab.prompt(40)
    mask = additive(visible(40, cuts=cuts))
    expected = system.model(tokens, attention_mask=mask).logits
    got = forced(bounded(system), tokens, cuts=cuts)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("cuts", STEPS)
def test_sliding_layers_keep_their_own_window(lab, cuts):
    system = lab.system("gemma3_text")
    tokens = lab.prompt(40)
    order = torch.arange(40)
    sliding = (order[:, None] >= order) & (order[:, None] - order < 16)
    masks = {
        "full_attention": additive(visible(40, cuts=cuts)),
        "sliding_attention": additive(sliding),
    }
    expected = system.model(tokens, attention_mask=masks).logits
    got = forced(bounded(system), tokens, cuts=cuts)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()


def test_the_mask_matters(lab):
    """Negative control for the comparison above."""
    system = lab.system("llama")
    tokens = lab.prompt(40)
    expected = system.model(tokens, attention_mask=additive(visible(40, cuts=STEPS[0]))).logits
    wrong = forced(bounded(system, window=WINDOW + 1), tokens, cuts=STEPS[0])
    assert (wrong - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("sink", "window"), [(4, 36), (0, 40), (200, 40)])
def test_a_budget_for_everything_is_bit_equal_to_the_dense_cache(lab, architecture, sink, window):
    system = lab.system(architecture)
    tokens = lab.prompt(40)
    cuts = (25, *range(26, 40))
    dense = forced(system, tokens, cuts=cuts)
    assert torch.equal(forced(bounded(system, sink=sink, window=window), tokens, cuts=cuts), dense)


def test_it_keeps_the_first_and_the_newest_rows():
    rows = torch.arange(2 * 3 * 20 * 2.0).view(2, 3, 20, 2)
    layer = bounded_layer()
    layer.update(rows[..., :12, :], -rows[..., :12, :])
    for index in range(12, 20):
        seen, _ = layer.update(rows[..., index : index + 1, :], -rows[..., index : index + 1, :])
        assert seen.shape[-2] == SINK + WINDOW + 1
    kept = torch.cat((rows[..., :SINK, :], rows[..., -WINDOW:, :]), dim=-2)
    assert torch.equal(layer.keys, kept)
    assert torch.equal(layer.values, -kept)
    assert layer.get_seq_length() == 20
    assert layer.get_mask_sizes(2) == (SINK + WINDOW + 2, 20 - SINK - WINDOW)


def test_no_sinks_is_a_plain_window():
    rows = torch.arange(10.0).view(1, 1, 10, 1)
    assert keep(rows, sink=0, window=4).flatten().tolist() == [6, 7, 8, 9]


def test_the_bytes_stop_growing(lab):
    system = bounded(lab.system("llama"))
    cache = system.new_cache(64)
    system.step(lab.prompt(40), cache)
    full = cache_bytes(cache)
    assert full == {"keys_values": 2 * 2 * 2 * (SINK + WINDOW) * 8 * 4}
    for _ in range(5):
        system.step(lab.prompt(1), cache)
    assert cache_bytes(cache) == full


def test_a_batch_of_equal_lengths_equals_its_rows_alone(lab, architecture):
    system = bounded(lab.system(architecture))
    prompts = [lab.prompt(20, seed=seed) for seed in range(3)]
    together = lab.rows(system.generate(lab.request(torch.cat(prompts), 16)))
    assert together == [lab.rows(system.generate(lab.request(p, 16)))[0] for p in prompts]


def test_padding_would_be_taken_for_sinks(lab):
    """Why PADDED_BATCH is removed: with the check gone, rows decode differently than alone."""
    system = bounded(lab.system("llama"), window=4)
    prompts = [lab.prompt(length, seed=length)[0].tolist() for length in (3, 25)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    request = lab.request(tokens, 16, mask=mask)
    with pytest.raises(RunError, match="no padded batch"):
        list(system.generate(request))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compresskit.methods.kv._evict.refuse_other_masks", lambda call: None)
        together = lab.rows(system.generate(request))
    alone = [lab.rows(system.generate(lab.request(torch.tensor([p]), 16)))[0] for p in prompts]
    assert together != alone


def test_it_refuses_to_take_tokens_back(lab):
    system = bounded(lab.system("llama"))
    cache = system.new_cache(64)
    system.step(lab.prompt(5), cache)
    assert not cache.is_croppable
    with pytest.raises(RunError, match="cannot take tokens back"):
        cache.crop(-1)
    with pytest.raises(RunError, match="SinkWindowLayer"):
        list(NGram().apply(system, None).generate(lab.request(lab.prompt(5), 5)))


def test_a_reset_forgets_the_count_too(lab):
    system = bounded(lab.system("llama"))
    cache = system.new_cache(64)
    first = system.step(lab.prompt(30), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(system.step(lab.prompt(30), cache), first)


def test_batch_members_cover_the_rows_kept():
    rows = torch.randn(3, 1, 20, 2, generator=torch.Generator().manual_seed(0))
    layer = bounded_layer()
    layer.update(rows, rows)
    kept = layer.keys
    layer.reorder_cache(torch.tensor([2, 1, 0]))
    layer.batch_select_indices(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, kept[[2, 2]])
    assert torch.equal(layer.values, kept[[2, 2]])


def test_contiguous_sinks_gather_no_rounding_errors():
    """They move by one place a step: always from where they were, not from where they are."""
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01, 0.001]))
    rows = torch.randn(1, 2, 400, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = bounded_layer(rotary=rotary)
    layer.update(rows[..., :20, :], rows[..., :20, :])
    stepwise = rotary.move(rows[..., :SINK, :], torch.tensor([20 - SINK - WINDOW]))
    for index in range(20, 400):
        layer.update(rows[..., index : index + 1, :], rows[..., index : index + 1, :])
        stepwise = rotary.move(stepwise, torch.tensor([1]))
    moved = rotary.move(rows[..., :SINK, :].float(), torch.tensor([400 - SINK - WINDOW]))
    assert torch.equal(layer.keys[..., :SINK, :], moved.bfloat16())
    assert (stepwise - moved).abs().max() > 10 * (moved.bfloat16() - moved).abs().max()
    assert torch.equal(layer.keys[..., SINK:, :], rows[..., -WINDOW:, :])


def test_the_original_sinks_are_accounted_for_and_follow_the_beams():
    rows = torch.randn(3, 1, 20, 2, generator=torch.Generator().manual_seed(0))
    layer = bounded_layer(rotary=Rotary(torch.ones(1)))
    layer.update(rows, rows)
    rest = 4 * layer.rule.rotary.frequencies.numel()
    held = 3 * 2 * (2 * (SINK + WINDOW) + SINK) * 4
    assert cache_bytes(Cache(layers=[layer])) == {"keys_values": held, "other": rest}
    layer.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(layer.first, rows[[2, 1, 0], :, :SINK])
    layer.reset()
    assert layer.first is None


def test_what_it_leaves_behind():
    effects = SinkWindow().effects()
    assert effects.requires == {
        Trait.OWN_CACHE,
        Trait.DENSE_CACHE,
        Trait.FULL_CONTEXT,
        Trait.ATTENTION_HOOK,
    }
    # No second cache method can follow: it would replace these layers.
    assert Trait.OWN_CACHE not in effects.after(frozenset(Trait))
    assert not effects.after(frozenset(Trait)) & {
        Trait.FULL_CONTEXT,
        Trait.ROLLBACK,
        Trait.PADDED_BATCH,
        Trait.STATIC_SHAPES,
        Trait.LOSSLESS,
    }
