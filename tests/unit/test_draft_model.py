"""speculative/draft_model: a second model guesses, and nothing but the number of passes changes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from compresskit.decode import pad
from compresskit.errors import Conflict, InputError
from compresskit.hf.cache import cache_bytes, static
from compresskit.hf.step import eager_step
from compresskit.hf.view import keeping
from compresskit.measure.memory.weights import weight_bytes
from compresskit.method import Context
from compresskit.methods.speculative._model_drafter import ModelDrafter
from compresskit.methods.speculative._reader import Reader, shared
from compresskit.methods.speculative.draft_model import DraftModel
from compresskit.methods.speculative.layer_skip import viewed
from compresskit.sampling import generator_for, probabilities
from compresskit.spec import SamplingSpec
from compresskit.traits import Trait


def drafted(system, helper, **options):
    """`system` with `helper` as what DraftModel loads."""
    context = Context(load=lambda *_: helper, calibration=None, seed=0, dtype="float32")
    return DraftModel(**options).apply(system, context)


def contrary(system):
    """A draft that always says what the target finds least likely."""

    def step(tokens, cache, **options):
        return -system.step(tokens, cache, **options)

    return replace(system, step=step)


def ask(lab, system, request):
    """Chunks and the tokens of each row."""
    chunks = list(system.generate(request))
    return chunks, lab.rows(chunks)


# Lossless


@pytest.mark.parametrize("draft", [1, 4])
@pytest.mark.parametrize("length", [1, 14])
def test_greedy_tokens_equal_plain_decoding(lab, architecture, length, draft):
    system = lab.system(architecture)
    request = lab.request(lab.prompt(length), 25)
    _, plain = ask(lab, system, request)
    helped = drafted(system, viewed(system, [0]), draft=draft)
    chunks, tokens = ask(lab, helped, request)
    assert tokens == plain
    assert all(chunk.accepted <= chunk.drafted <= draft for chunk in chunks)


@pytest.mark.parametrize("target", ["llama", "gpt2", "gpt_neox", "olmo2", "mixtral"])
@pytest.mark.parametrize("helper", ["half", "itself", "contrary"])
def test_rows_of_a_batch_get_what_they_get_alone(lab, target, helper):
    # Double precision: a batch multiplies in another order, and a near tie would tell about that.
    system = lab.system(target, double=True)
    draft = {
        "half": lambda: viewed(system, [0]),
        "itself": lambda: system,
        "contrary": lambda: contrary(system),
    }[helper]()
    helped = drafted(system, draft, draft=3)
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (1, 5, 12, 30)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    _, together = ask(lab, helped, lab.request(tokens, 17, mask=mask))
    for row, ids in zip(together, rows, strict=True):
        assert [row] == ask(lab, system, lab.request(torch.tensor([ids]), 17))[1]


@pytest.mark.parametrize("place", range(1, 8))
def test_a_stop_token_inside_a_block_ends_the_answer_there(lab, place):
    system = lab.system("llama")
    answer = ask(lab, system, lab.request(lab.prompt(9), 20))[1][0]
    request = lab.request(lab.prompt(9), 20, stop=(answer[place],))
    chunks, tokens = ask(lab, drafted(system, system, draft=4), request)
    assert tokens == [answer[: answer.index(answer[place]) + 1]]
    # What was accepted are the draft's tokens that were emitted, the stop token among them.
    assert all(chunk.accepted <= int(chunk.lengths) for chunk in chunks)


# Counts


@pytest.mark.parametrize(
    ("new", "draft", "last"), [(20, 4, (4, 4)), (22, 4, (1, 1)), (23, 4, (2, 2)), (7, 1, (0, 0))]
)
def test_a_draft_that_is_the_target_is_always_right(lab, new, draft, last):
    """One token comes from the prompt; the `new` after it take ceil(new / (draft + 1)) passes."""
    system = lab.system("qwen3")
    request = lab.request(lab.prompt(9), new + 1)
    chunks, tokens = ask(lab, drafted(system, system, draft=draft), request)
    assert tokens == ask(lab, system, request)[1]
    assert len(chunks) == 1 + math.ceil(new / (draft + 1))
    assert all(chunk.accepted == chunk.drafted for chunk in chunks)
    assert chunks[-1].drafts == (last,)


def test_a_draft_that_is_never_right_costs_a_pass_a_token(lab):
    system = lab.system("llama")
    request = lab.request(lab.prompt(9), 20)
    chunks, tokens = ask(lab, drafted(system, contrary(system), draft=4), request)
    assert tokens == ask(lab, system, request)[1]
    assert len(chunks) == 20
    assert [chunk.drafts for chunk in chunks[1:15]] == [((4, 0),)] * 14


def test_the_draft_reads_each_token_once_and_its_last_guess_only_if_it_stays(lab):
    system = lab.system("llama")
    passes = []

    def step(tokens, cache, **options):
        passes.append(tokens.shape[1])
        return system.step(tokens, cache, **options)

    ask(lab, drafted(system, replace(system, step=step), draft=3), lab.request(lab.prompt(9), 9))
    # Prompt and first token; two guesses; the third with the target's own; two guesses.
    assert passes == [10, 1, 1, 2, 1, 1]


# Trees


@pytest.mark.parametrize("target", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("helper", ["half", "itself", "contrary"])
def test_trees_change_no_token_in_rows_of_any_length(lab, target, helper):
    system = lab.system(target, double=True)
    draft = {"half": viewed(system, [0]), "itself": system, "contrary": contrary(system)}[helper]
    helped = drafted(system, draft, draft=3, branches=2)
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (1, 5, 12)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    together = ask(lab, helped, lab.request(tokens, 14, mask=mask))[1]
    for row, ids in zip(together, rows, strict=True):
        request = lab.request(torch.tensor([ids]), 14)
        assert [row] == ask(lab, system, request)[1] == ask(lab, helped, request)[1]


def test_a_tree_follows_the_best_first_tokens_each_by_its_arg_max(lab):
    system = lab.system("llama", double=True)
    helped = drafted(system, system, draft=3, branches=4)
    text = lab.prompt(9)[0].tolist()
    drafter = helped.decode.__self__.drafter(helped, lab.request(torch.tensor([text]), 20))
    with torch.inference_mode():
        drafter.observe([text])
        (tree,) = drafter.draft([2])
        best = (
            system.step(torch.tensor([text]), system.new_cache(0))[0, -1].topk(4).indices.tolist()
        )
    assert tree.parents == [-1] * 4 + [0, 1, 2, 3]
    assert tree.tokens[:4] == best
    for first, second in zip(best, tree.tokens[4:], strict=True):
        request = lab.request(torch.tensor([[*text, first]]), 1)
        assert ask(lab, system, request)[1] == [[second]]


def test_a_tree_of_the_targets_own_is_right_all_the_way(lab):
    system = lab.system("qwen3")
    chunks, _ = ask(
        lab, drafted(system, system, draft=4, branches=3), lab.request(lab.prompt(9), 21)
    )
    assert [chunk.drafts for chunk in chunks] == [((0, 0),)] + [((12, 4),)] * 4


def test_branches_find_what_one_chain_misses(lab):
    """The second-best first token, where the draft finds the target's best least likely but one."""
    system = lab.system("llama")

    def step(tokens, cache, **options):
        logits = system.step(tokens, cache, **options).clone()
        best, second = logits.topk(2, -1).indices.unbind(-1)
        low = logits.gather(-1, second[..., None]) - 0.1
        return logits.scatter(-1, best[..., None], low)

    wrong = replace(system, step=step)
    request = lab.request(lab.prompt(9), 20)
    counts = {}
    for branches in (1, 2):
        chunks, tokens = ask(lab, drafted(system, wrong, draft=1, branches=branches), request)
        assert tokens == ask(lab, system, request)[1]
        counts[branches] = sum(chunk.accepted for chunk in chunks)
    assert counts == {1: 0, 2: 9}


def test_trees_need_slots_that_can_be_masked():
    assert Trait.SLOT_MASKS in DraftModel(branches=2).effects().requires
    assert Trait.SLOT_MASKS not in DraftModel().effects().requires
    assert DraftModel(branches=2, draft=3).widest() == 6


# Texts that the draft cannot follow


def test_a_text_longer_than_the_drafts_context_gets_no_drafts_any_more(lab):
    system = lab.system("llama")
    seen = []
    short = lab.system("gpt2")

    def step(tokens, cache, **options):
        logits = short.step(tokens, cache, **options)
        seen.append(cache.get_seq_length())
        return logits

    helped = drafted(system, replace(short, step=step, context=24), draft=4)
    request = lab.request(lab.prompt(9), 30)
    chunks, tokens = ask(lab, helped, request)
    assert tokens == ask(lab, system, request)[1]
    assert max(seen) <= 24
    held = list(itertools.accumulate(int(chunk.lengths) for chunk in chunks))
    for before, chunk in zip(held, chunks[1:], strict=False):
        assert chunk.drafted == max(0, min(4, 24 + 1 - (9 + before), 30 - before - 1))


def test_a_prompt_longer_than_the_drafts_context_is_never_read(lab):
    system = lab.system("llama")
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (40, 6)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    request = lab.request(tokens, 9, mask=mask)
    chunks, answers = ask(lab, drafted(system, replace(system, context=20), draft=2), request)
    assert answers == ask(lab, system, request)[1]
    assert all(chunk.drafts[0] == (0, 0) for chunk in chunks)
    assert sum(chunk.drafts[1][1] for chunk in chunks) > 0
    alone = replace(system, context=3)
    chunks, _ = ask(lab, drafted(system, alone, draft=2), lab.request(lab.prompt(9), 9))
    assert not any(chunk.drafted for chunk in chunks)


@pytest.mark.parametrize("sizes", [(300, 200), (200, 300)])
@pytest.mark.parametrize("sampling", [SamplingSpec(), SamplingSpec(temperature=2.0)])
def test_embeddings_of_other_sizes_work_and_unknown_ids_stop_the_drafts(lab, sizes, sampling):
    system, draft = (lab.system("llama", vocabulary=size) for size in sizes)
    helped = drafted(system, draft, draft=3)
    used = 0
    for seed in range(6):
        prompt = lab.prompt(9, vocabulary=200, seed=seed)
        request = lab.request(prompt, 25, sampling=sampling, seed=seed)
        chunks, tokens = ask(lab, helped, request)
        if sampling.temperature == 0:
            assert tokens == ask(lab, system, request)[1]
        known = True
        for chunk, after in itertools.pairwise(chunks):
            known &= all(token < sizes[1] for token in chunk.tokens[0].tolist())
            assert known or not after.drafted
            used += after.drafted
    assert used > 0


# What is distributed how

V, LENGTH = 5, 3
PLAIN = SamplingSpec(temperature=1.0)
FILTERED = SamplingSpec(temperature=1.3, top_k=4, top_p=0.9, min_p=0.02)


@torch.inference_mode()
def joint(system, prompt, sampling):
    """Exact probability of every answer of `LENGTH` tokens, by enumeration."""
    answers = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    texts = torch.cat((prompt.expand(len(answers), -1), answers), dim=-1)
    logits = system.step(texts, system.new_cache(0), keep=LENGTH + 1)[:, :-1]
    return probabilities(logits, sampling).gather(-1, answers.unsqueeze(-1)).double().prod(1)[:, 0]


def p_value(lab, helped, sampling, *, rows, requests):
    """Chi-square of rows x requests answers against the exact joint; rare answers are pooled."""
    prompt = lab.prompt(6, vocabulary=V, seed=4)
    counts = torch.zeros(V**LENGTH, dtype=torch.double)
    for seed in range(requests):
        request = lab.request(prompt.expand(rows, -1), LENGTH, sampling=sampling, seed=seed)
        answers = torch.tensor(lab.rows(helped.generate(request)))
        counts += torch.bincount(answers @ torch.tensor([V**2, V, 1]), minlength=V**LENGTH)
    expected = joint(helped, prompt, sampling) * rows * requests
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed, wanted = (
        torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts, expected)
    )
    real = wanted > 0
    wanted = wanted[real] * observed.sum() / wanted[real].sum()
    return stats.chisquare(observed[real].numpy(), wanted.numpy()).pvalue


@pytest.fixture(scope="module")
def pair(lab):
    system = lab.system("llama", vocabulary=V)
    return drafted(system, lab.system("gpt2", vocabulary=V), draft=2)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("sampling", [PLAIN, FILTERED])
@pytest.mark.parametrize(("rows", "requests"), [(1, 250), (40, 40)])
def test_the_joint_of_three_tokens_is_the_targets(lab, pair, sampling, rows, requests, branches):
    if branches > 1:
        pair = drafted(pair, pair.drafts[-1], draft=2, branches=branches)
    assert p_value(lab, pair, sampling, rows=rows, requests=requests) > 1e-3


def most_likely(self, logits, laws):
    laws.append(probabilities(logits, self.sampling))
    return laws[-1].argmax(-1).tolist()


def unfiltered(self, logits, laws):
    drawn = probabilities(logits, self.sampling)
    laws.append((logits / self.sampling.temperature).softmax(-1))
    return torch.multinomial(drawn, 1, generator=self.generator)[:, 0].tolist()


NARROW = SamplingSpec(temperature=1.5, top_k=2)


@pytest.mark.parametrize("wrong", [most_likely, unfiltered])
def test_a_q_that_was_not_drawn_from_is_caught(lab, pair, wrong, monkeypatch):
    assert p_value(lab, pair, NARROW, rows=40, requests=60) > 1e-3
    monkeypatch.setattr(ModelDrafter, "_choose", wrong)
    assert p_value(lab, pair, NARROW, rows=40, requests=60) < 1e-6


def test_guesses_and_verdicts_have_random_numbers_of_their_own(lab, pair):
    request = lab.request(lab.prompt(6, vocabulary=V), 5, sampling=PLAIN, seed=2**63 - 1)
    drafter = pair.decode.__self__.drafter(pair, request)
    ours, theirs = drafter.generator, generator_for(request.seed, torch.device("cpu"), PLAIN)
    assert not torch.equal(torch.rand(8, generator=ours), torch.rand(8, generator=theirs))


def test_the_same_seed_gives_the_same_tokens(lab, pair):
    def run(seed):
        request = lab.request(lab.prompt(6, vocabulary=V), 30, sampling=PLAIN, seed=seed)
        return ask(lab, pair, request)[1]

    assert run(5) == run(5)
    assert run(5) != run(6)


# The reader


def test_what_two_texts_share():
    assert shared([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert shared([], [1]) == 0
    assert shared([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_a_reader_follows_texts_wherever_they_turn(lab, rows):
    system = lab.system("llama", double=True)
    generator = torch.Generator().manual_seed(rows)

    def random(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    reader = Reader(system, room=80)
    texts = [[random(1, 300) for _ in range(random(2, 9))] for _ in range(rows)]
    for turn in range(40):
        logits = reader.read(texts)
        for row, text in enumerate(texts):
            wanted = system.step(torch.tensor([text]), system.new_cache(0))[0, -1]
            torch.testing.assert_close(logits[row], wanted)
        if turn % 3:
            reader.say([random(1, 300) if random(0, 2) else None for _ in texts[1:]] + [7])
        for row, text in enumerate(texts):
            # Now and then nothing of a text stays.
            stays = 0 if turn % 13 == 12 else max(1, len(text) - random(0, 4))
            new = [random(1, 300) for _ in range(random(1, 5))]
            texts[row] = (text[:stays] + new)[-60:] if len(text) < 50 else text[:20]


# Around it


def test_the_draft_and_its_bytes_can_be_reached(lab):
    system = lab.system("llama")
    helped = drafted(system, lab.system("gpt2"), draft=2)
    assert [draft.model.config.model_type for draft in helped.drafts] == ["gpt2"]
    held = sum(weight_bytes(helped.drafts[-1].model).values())
    parameters = helped.drafts[-1].model.num_parameters()
    assert helped.facts["draft_model"] == {
        "name": "tiny:draft",
        "parameters": parameters,
        "weight_bytes": 4 * parameters,
    }
    assert held >= 4 * parameters  # buffers beside the parameters
    assert helped.widths == (1, 3)
    drafter = helped.decode.__self__.drafter(helped, lab.request(lab.prompt(9), 5))
    assert drafter.memory_bytes() == 0
    with torch.inference_mode():
        drafter.observe([lab.prompt(9)[0].tolist()])
        drafter.draft([2])
    # Nine tokens and one guess, two layers of keys and values of 32 floats.
    assert drafter.memory_bytes() == 10 * 2 * 2 * 32 * 4
    assert drafter.memory_bytes() == sum(cache_bytes(drafter.reader.rows.cache).values())


def test_batches_need_a_draft_without_windows(lab):
    system = lab.system("llama")
    helped = drafted(system, lab.system("gemma3_text"))
    with pytest.raises(InputError, match="sliding windows of the draft"):
        list(helped.generate(lab.request(lab.prompt(9).expand(2, -1), 5)))
    request = lab.request(lab.prompt(30), 20)
    assert ask(lab, helped, request)[1] == ask(lab, system, request)[1]


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("tiny:draft", "model=tiny", "the draft tiny is larger than tiny:draft"),
        ("tiny", 'methods=["kv/sink_window:window=8"]', "needs 'rollback', which kv/sink_window"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(open_stack, model, options, complaint):
    with (
        pytest.raises(Conflict, match=complaint),
        open_stack(f"speculative/draft_model:{options}", model=model),
    ):
        pass


def test_a_quantised_draft_keeps_the_targets_tokens(open_stack, lab):
    tokens = lab.prompt(20, vocabulary=500)
    with open_stack() as opened:
        plain = lab.rows(opened.system.generate(lab.request(tokens, 20)))
    with open_stack('speculative/draft_model:methods=["quant/int8"]') as opened:
        (draft,) = opened.system.drafts
        kinds = {type(module).__name__ for module in draft.model.modules()}
        assert "PackedLinear" in kinds
        assert lab.rows(opened.system.generate(lab.request(tokens, 20))) == plain


def fixed(system):
    """As compiled, but for the compiler: preallocated caches, and passes of a few widths only."""
    config, widths = system.model.config, set(system.widths)

    def step(tokens, cache, **options):
        if cache.get_seq_length():
            assert tokens.shape[1] in widths
        if options.get("mask") is not None and cache.get_seq_length():
            room = cache.get_max_length() - options["mask"].shape[-1]
            options["mask"] = torch.nn.functional.pad(options["mask"], (0, room))
        return system.step(tokens, cache, **options)

    return replace(
        system, step=step, new_cache=lambda size: static(config, size), fixed_widths=True
    )


@pytest.mark.parametrize("options", [{"draft": 3}, {"draft": 3, "branches": 2}, {"draft": 1}])
def test_fixed_shapes_give_the_same_steps(lab, options):
    """Compiled modes fill blocks up to the widths that they have graphs for, in the draft as well."""
    system = lab.system("llama", double=True)
    helper = replace(system, model=keeping(system.model, [0]))
    helper = replace(helper, step=eager_step(helper.model))
    context = Context(
        load=lambda *_: helper, calibration=None, seed=0, dtype="float32", finish=fixed
    )
    helped = DraftModel(**options).apply(system, context)
    assert helped.drafts[-1].fixed_widths
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (3, 9, 20)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    for request in (lab.request(tokens, 20, mask=mask), lab.request(tokens[-1:], 20)):
        plain = ask(lab, system, request)[1]
        chunks, answers = ask(lab, fixed(helped), request)
        assert answers == plain
        free = drafted(system, viewed(system, [0]), **options)
        assert [c.drafts for c in chunks] == [c.drafts for c in ask(lab, free, request)[0]]
