"""kv/quest: bounds hold, the right rows are read, nothing is lost, and a step reads less."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compresskit.decode import pad
from compresskit.errors import RunError
from compresskit.hf.attention import Call
from compresskit.hf.cache import cache_bytes, roll_back
from compresskit.measure.memory.moved import cache_traffic
from compresskit.methods.kv import quest
from compresskit.methods.kv._pages import buffer, capacity, extend, gather
from compresskit.methods.kv.quest import Quest, QuestLayer, best_pages, bounds_of, page_scores
from compresskit.methods.speculative.ngram import NGram
from compresskit.traits import Trait

PAGE, BUDGET = 4, 12


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def paged(system, *, budget=BUDGET, page=PAGE, dense_layers=0):
    return Quest(budget=budget, page=page, dense_layers=dense_layers).apply(system, None)


def chosen(keys, query, *, budget, page):
    """Tokens that a query reads of one head's keys `[S, D]`, found by numbering the values."""
    layer = QuestLayer(budget, page)
    rows = torch.arange(len(keys), dtype=torch.float32).view(1, 1, -1, 1)
    layer.update(keys[None, None, :-1], rows[:, :, :-1])
    handed, values = layer.update(keys[None, None, -1:], rows[:, :, -1:])
    read = []

    class Spy(Call):
        def dense(self):
            read.extend(self.values.flatten().int().tolist())
            return self.values[:, :1]

    layer.attend(Spy(torch.nn.Module(), query[None, None, None], handed, values, None, 1.0, {}))
    return sorted(read)


def test_page_scores_worked_by_hand():
    """The numbers of this test and the next are those of KVCache-Factory's tests."""
    bounds = torch.tensor([[[[4.0, 1, 0, -5], [3, 6, 2, -1]]]])
    assert page_scores(torch.tensor([[[2.0, -3]]]), bounds).tolist() == [[[23, 9]]]
    keys = torch.tensor([[4.0, 0], [3, 1], [-1, 5], [0, 6]])[None, None]
    for query, page in (([1.0, 0], 0), ([0.0, 1], 1)):
        scores = page_scores(torch.tensor([[query]]), bounds_of(keys, 2))
        assert best_pages(scores, 1).tolist() == [[[page]]]


def test_the_newest_token_and_the_best_page_are_read():
    keys = torch.tensor([[4.0, 0], [3, 1], [-1, 5], [0, 6], [9, 9]])
    assert chosen(keys, torch.tensor([0.0, 1]), budget=3, page=2) == [2, 3, 4]
    # One dimension, an unfinished page: four tokens, none of them beyond the end.
    last = chosen(torch.tensor([[1.0], [2], [3], [4], [100]]), torch.ones(1), budget=4, page=4)
    assert len(last) == 4
    assert 4 in last
    assert max(last) < 5


@pytest.mark.parametrize("seed", range(5))
def test_a_page_score_is_no_less_than_any_product_inside(seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, 24, 8, generator=generator)
    query = torch.randn(2, 4, 8, generator=generator)
    scores = page_scores(query, bounds_of(keys, PAGE))
    products = query.view(2, 2, 2, 8) @ keys.transpose(-1, -2)
    inside = products.amax(2).view(2, 2, 6, PAGE).amax(-1)
    assert (scores >= inside - 1e-5).all()
    # Negative control: the middle of a page bounds nothing.
    middle = torch.cat((keys.view(2, 2, 6, PAGE, 8).mean(3),) * 2, -1)
    assert not (page_scores(query, middle) >= inside - 1e-5).all()


def test_a_page_that_one_query_head_wants_is_read_for_its_group():
    bounds = bounds_of(torch.eye(4)[None, None].repeat_interleave(2, dim=2), 2)
    query = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0, 0, 0, 9.0]]])
    assert best_pages(page_scores(query, bounds), 1).item() == 3


@pytest.mark.parametrize("budget", [40, 41, 400])
def test_a_budget_for_everything_is_bit_equal_to_the_dense_cache(lab, architecture, budget):
    dense = lab.system(architecture)
    system = paged(dense, budget=budget)
    tokens = lab.prompt(40)
    caches = dense.new_cache(40), system.new_cache(40)
    for part in (tokens[:, :25], tokens[:, 25:28], *tokens[:, 28:].split(1, dim=1)):
        expected, got = (
            one.step(part, cache, keep=0)
            for one, cache in zip((dense, system), caches, strict=True)
        )
        assert torch.equal(expected, got)


def test_it_equals_a_dense_pass_over_the_rows_it_reads(lab):
    """Attention over a mask that hides everything but the pages chosen, made without gathering."""
    layer = QuestLayer(BUDGET, PAGE)
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, 31, 8, generator=generator) for _ in range(2))
    query = torch.randn(2, 4, 1, 8, generator=generator)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    handed, rows = layer.update(keys[:, :, -1:], values[:, :, -1:])
    module = lab.system("llama").model.model.layers[0].self_attn
    got = layer.attend(Call(module, query, handed, rows, None, 0.35, {}))

    wanted = torch.zeros(2, 2, 31, dtype=torch.bool)
    scores = (query.view(2, 2, 2, 1, 8) * keys[:, :, :28].view(2, 2, 1, 28, 8)).view(
        2, 2, 2, 7, PAGE, 8
    )
    # The bound by its definition: the larger product with the two ends of each channel.
    upper = scores.amax(4).sum(-1).amax(2)
    best = upper.topk(3).indices
    room = BUDGET - 3
    for batch in range(2):
        for head in range(2):
            order = best[batch, head].tolist()
            tokens = [page * PAGE + at for page in order for at in range(PAGE)]
            # The page of the lowest score loses its oldest rows to the budget.
            dropped = [order[-1] * PAGE + at for at in range(3 * PAGE - room)]
            wanted[batch, head, [one for one in tokens if one not in dropped]] = True
    wanted[..., 28:] = True
    assert wanted.sum(-1).eq(BUDGET).all()
    logits = (query.view(2, 2, 2, 8) @ keys.transpose(-1, -2)) * 0.35
    weights = logits.masked_fill(~wanted.unsqueeze(2), -torch.inf).softmax(-1)
    expected = (weights @ values).view(2, 4, 1, 8).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    # Negative control: reading everything is something else.
    everything = (logits.softmax(-1) @ values).view(2, 4, 1, 8).transpose(1, 2)
    assert (everything - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_tokens_of_a_short_pass_choose_as_they_would_alone(lab, name):
    """A draft of several tokens is checked by the cache that would have decoded them."""
    system = paged(lab.system(name))
    tokens = lab.prompt(44)
    alone, together = system.new_cache(50), system.new_cache(50)
    for cache in (alone, together):
        system.step(tokens[:, :40], cache)
    expected = [system.step(tokens[:, at : at + 1], alone) for at in range(40, 44)]
    got = system.step(tokens[:, 40:], together, keep=0)
    torch.testing.assert_close(got, torch.cat(expected, dim=1))


@pytest.mark.parametrize("taken", [1, 3, 9, 30])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2", "mixtral"])
def test_tokens_taken_back_leave_no_trace(lab, name, taken):
    system = paged(lab.system(name))
    straight, detour = system.new_cache(99), system.new_cache(99)
    system.step(lab.prompt(41), straight)
    system.step(lab.prompt(41), detour)
    for at in range(taken):
        system.step(lab.prompt(1, seed=at + 5), detour)
    roll_back(detour, taken)
    for one, other in zip(straight.layers, detour.layers, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.tensors)
    probe = lab.prompt(1, seed=77)
    assert torch.equal(system.step(probe, detour), system.step(probe, straight))


def test_speculation_gives_its_own_greedy_tokens(lab):
    system = paged(lab.system("llama"))
    request = lab.request(lab.prompt(40).repeat(1, 2), 24)
    expected = lab.rows(system.generate(request))
    assert lab.rows(NGram().apply(system, None).generate(request)) == expected


def test_plain_generate_gives_the_same_tokens(lab):
    system = paged(lab.system("llama"))
    tokens = lab.prompt(40)
    expected = lab.rows(system.generate(lab.request(tokens, 12)))
    got = system.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=system.new_cache(52),
        max_new_tokens=12,
        do_sample=False,
    )
    assert got[:, 40:].tolist() == expected


def test_a_batch_of_equal_lengths_equals_its_rows_alone(lab, architecture):
    system = paged(lab.system(architecture))
    prompts = [lab.prompt(40, seed=seed) for seed in range(2)]
    together = lab.rows(system.generate(lab.request(torch.cat(prompts), 12)))
    assert together == [lab.rows(system.generate(lab.request(p, 12)))[0] for p in prompts]


def test_a_padded_batch_is_refused(lab):
    system = paged(lab.system("llama"))
    prompts = [lab.prompt(length)[0].tolist() for length in (10, 30)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    with pytest.raises(RunError, match="padded batch"):
        list(system.generate(lab.request(tokens, 4, mask=mask)))


def test_beams_and_batches_move_the_index_too(lab):
    system = paged(lab.system("llama"))
    tokens = torch.cat((lab.prompt(30), lab.prompt(30, seed=1)))
    ahead, swapped = system.new_cache(40), system.new_cache(40)
    for cache in (ahead, swapped):
        system.step(tokens, cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    for seed in range(6):
        step = torch.cat((lab.prompt(1, seed=seed), lab.prompt(1, seed=seed + 50)))
        expected, got = system.step(step, ahead), system.step(step.flip(0), swapped)
        torch.testing.assert_close(got, expected.flip(0))


def test_a_reset_leaves_nothing(lab):
    system = paged(lab.system("llama"))
    cache = system.new_cache(64)
    first = [system.step(lab.prompt(30), cache), system.step(lab.prompt(1), cache)]
    cache.reset()
    assert cache_bytes(cache) == {}
    again = [system.step(lab.prompt(30), cache), system.step(lab.prompt(1), cache)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_bytes_held_and_read_are_those_of_the_formula():
    """4096 rows in pages of 16, 1024 read: a quarter of the rows and a sixteenth for the index."""
    layer = QuestLayer(1024, 16)
    rows = torch.zeros(1, 2, 4097, 8)
    layer.update(rows, rows)
    held = 2 * 2 * 4097 * 8 * 4
    index = 2 * 256 * 2 * 8 * 4
    assert layer.read_bytes() == {"keys_values": held // 4097 * 1024, "index": index}
    assert sum(layer.read_bytes().values()) / held == pytest.approx(0.3125, rel=1e-3)
    assert layer.copied_bytes() == held // 4097 * 1024
    dense = QuestLayer(None, 16)
    dense.update(rows, rows)
    assert dense.read_bytes() == {"keys_values": held}
    assert dense.copied_bytes() == 0
    assert QuestLayer(1024, 16).read_bytes() == {}


def test_a_step_touches_no_page_but_those_it_says(lab, monkeypatch):
    """Counted where pages are fetched: the rows that attention gets are `budget`, in every layer."""
    system = paged(lab.system("llama"), dense_layers=1)
    cache = system.new_cache(99)
    system.step(lab.prompt(60), cache)
    pages: list[int] = []

    def counted(held, chosen, *, page):
        pages.append(chosen.shape[-1])
        return gather(held, chosen, page=page)

    monkeypatch.setattr(quest, "gather", counted)
    system.step(lab.prompt(1), cache)
    # Row 61 begins a page of its own: 11 of 12 rows are left, which three pages hold.
    assert pages == [4, 4]
    read = [layer.read_bytes() for layer in cache.layers]
    row = 2 * 2 * 8 * 4
    assert read == [{"keys_values": 61 * row}, {"keys_values": 12 * row, "index": 15 * row}]
    traffic = cache_traffic(cache)
    assert traffic["keys_values"] == 73 * row
    assert traffic["copy"] == 12 * row


def test_appending_writes_where_there_is_room():
    rows = torch.arange(40.0).view(1, 1, 40, 1).expand(2, 3, 40, 5)
    held = extend(None, rows[:, :, :32], page=4)
    place = held.data_ptr()
    assert capacity(held) == 36
    for at in range(32, 36):
        held = extend(held, rows[:, :, at : at + 1], page=4)
    assert held.data_ptr() == place
    held = extend(held, rows[:, :, 36:], page=4)
    assert held.data_ptr() != place
    assert torch.equal(held, rows)
    assert torch.equal(gather(held, torch.full((2, 3, 1), 9), page=4), rows[:, :, 36:])


def test_copies_of_rows_are_no_buffers():
    """What beams or a move between devices leave behind has no room, whatever its strides say."""
    rows = torch.randn(1, 1, 30, 5)
    held = extend(None, rows, page=4)
    assert capacity(held) == 32
    copies = (
        held.clone(),
        held.index_select(0, torch.tensor([0])),
        held[..., 4:, :],
        held.repeat_interleave(2, dim=0),
        torch.randn(1, 30, 1, 5).transpose(1, 2),
    )
    for copied in copies:
        assert capacity(copied) == copied.shape[2]
        longer = extend(copied, copied[:, :, :1], page=4)
        assert torch.equal(longer[:, :, :-1], copied)
        assert buffer(longer).shape[2] % 4 == 0


def test_what_cannot_be_asked_for():
    with pytest.raises(ValidationError, match="no place for the newest page"):
        Quest(budget=8, page=16)


def test_what_it_leaves_behind():
    after = Quest().effects().after(frozenset(Trait))
    assert {Trait.ROLLBACK, Trait.FULL_CONTEXT, Trait.BATCH} <= after
    assert not after & {Trait.LOSSLESS, Trait.PADDED_BATCH, Trait.STATIC_SHAPES, Trait.OWN_CACHE}
