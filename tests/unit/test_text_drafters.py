"""speculative/suffix and speculative/token_recycling: the model's tokens, in fewer passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compresskit.decode import pad
from compresskit.errors import InputError, SpecError
from compresskit.hf.cache import roll_back
from compresskit.methods.speculative import _base, _rows
from compresskit.methods.speculative._draft import NOTHING, ROOT, Draft, Evidence
from compresskit.methods.speculative._history import History
from compresskit.methods.speculative._verify import Verdict
from compresskit.methods.speculative.suffix import HELD, Suffix, SuffixRow
from compresskit.methods.speculative.token_recycling import (
    Recycler,
    Table,
    TokenRecycling,
    template,
)
from compresskit.traits import Trait

METHODS = {
    "suffix": Suffix(draft=5, factor=3.0, min_probability=0.0),
    "suffix, shared": Suffix(draft=5, factor=3.0, shared=True),
    "recycling": TokenRecycling(draft=4, nodes=12, successors=3),
    "recycling, shared": TokenRecycling(draft=3, nodes=9, successors=4, shared=True),
}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def allowed(method, architecture):
    """A window goes by slots, so no tree fits in it."""
    if method.trees and architecture == "gemma3_text":
        pytest.skip("needs 'slot_masks', which a sliding window does not have")


def plain(lab, system, request):
    return lab.rows(system.generate(request))


# Lossless


@METHOD
@pytest.mark.parametrize("length", [1, 24])
def test_greedy_tokens_equal_plain_decoding(lab, architecture, method, length):
    allowed(method, architecture)
    system = lab.system(architecture)
    applied = method.apply(system, None)
    accepted = 0
    # Twice each: the second time a shared store knows the answer.
    for tokens in 2 * (lab.prompt(length), lab.prompt(length, seed=1).repeat(1, 2)):
        request = lab.request(tokens, 40)
        chunks = list(applied.generate(request))
        assert lab.rows(chunks) == plain(lab, system, request)
        accepted += sum(chunk.accepted for chunk in chunks)
    assert accepted > 0, "nothing was ever drafted well, so nothing was tested"


@METHOD
def test_a_ragged_batch_gives_each_row_what_it_gives_alone(lab, method):
    system = lab.system("llama")
    rows = [lab.prompt(n, seed=n)[0].tolist() for n in (1, 5, 12, 30)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    together = lab.rows(method.apply(system, None).generate(lab.request(tokens, 40, mask=mask)))
    for row, ids in enumerate(rows):
        request = lab.request(torch.tensor([ids]), 40)
        assert [together[row]] == lab.rows(method.apply(system, None).generate(request))
        assert [together[row]] == plain(lab, system, request)


@METHOD
@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_a_draft_never_goes_beyond_the_answer(lab, method, new):
    # The context has room for the answer and not for a token more.
    system = replace(lab.system("llama"), context=20 + new)
    applied = method.apply(system, None)
    request = lab.request(lab.prompt(20), new)
    for _ in range(2):
        chunks = list(applied.generate(request))
        assert lab.rows(chunks) == plain(lab, system, request)
    with pytest.raises(InputError, match="more than the model's context"):
        list(applied.generate(lab.request(lab.prompt(20), new + 1)))


@METHOD
def test_a_stop_token_ends_the_answer(lab, method):
    system = lab.system("llama")
    answer = plain(lab, system, lab.request(lab.prompt(9), 30))[0]
    request = lab.request(lab.prompt(9), 30, stop=(answer[4],))
    assert lab.rows(method.apply(system, None).generate(request)) == plain(lab, system, request)


@METHOD
def test_accepting_without_a_check_changes_the_tokens(lab, method, monkeypatch):
    def gullible(logits, drafts, sampling, generator):
        """Take the first branch as it stands."""
        verdicts = []
        for row, draft in enumerate(drafts):
            path, at = [], ROOT
            for place, parent in enumerate(draft.follows()):
                if parent == at:
                    path.append(place)
                    at = place
            last = int(logits[row, path[-1] + 1 if path else 0].argmax())
            verdicts.append(Verdict([*(draft.tokens[place] for place in path), last], path))
        return verdicts

    monkeypatch.setattr(_base, "verify", gullible)
    system = lab.system("llama")
    request = lab.request(lab.prompt(8).repeat(1, 3), 40)
    assert lab.rows(method.apply(system, None).generate(request)) != plain(lab, system, request)


@pytest.mark.parametrize("seed", range(3))
def test_keeping_the_first_slots_instead_of_the_path_changes_the_tokens(lab, monkeypatch, seed):
    """A cache that holds another branch of the tree than the text does is seen."""
    system = lab.system("llama")
    applied = METHODS["recycling, shared"].apply(system, None)
    request = lab.request(lab.prompt(30, seed=seed), 60)
    expected = plain(lab, system, request)
    # The first time fills the table, so that branches hold the second time.
    assert lab.rows(applied.generate(request)) == expected
    branched = []

    def first_slots(cache, new, kept):
        branched.append(list(kept) != list(range(len(kept))))
        roll_back(cache, new - len(kept))

    monkeypatch.setattr(_rows, "keep", first_slots)
    assert lab.rows(applied.generate(request)) != expected
    assert any(branched)


def test_traits_and_widths():
    before = frozenset(Trait)
    for method in METHODS.values():
        assert method.effects().after(before) == before
    assert METHODS["suffix"].widest() == 5
    assert METHODS["recycling"].widest() == 12
    assert Trait.SLOT_MASKS in METHODS["recycling"].effects().requires
    # Fewer places than asked for where depth and successors have no more.
    assert TokenRecycling(draft=2, nodes=100, successors=3).widest() == 3 + 9


@pytest.mark.parametrize(
    ("method", "params", "told"),
    [
        (Suffix, {"draft": 0}, "draft: Input should be greater than or equal to 1"),
        (Suffix, {"factor": 0}, "factor"),
        (Suffix, {"min_probability": 1.5}, "min_probability"),
        (Suffix, {"capacity": 3}, "capacity"),
        (TokenRecycling, {"draft": 0}, "draft"),
        (TokenRecycling, {"nodes": 0}, "nodes"),
        (TokenRecycling, {"successors": 0}, "successors"),
    ],
)
def test_parameters_are_checked(method, params, told):
    with pytest.raises(SpecError, match=told):
        method.decode(params, where="speculative")


# What is kept from request to request


def passes(system, request):
    return len(list(system.generate(request)))


def test_a_shared_history_shortens_what_was_answered_before(lab):
    system = lab.system("llama")
    request = lab.request(lab.prompt(30), 40)
    alone, shared = (
        Suffix(factor=8.0, shared=shared).apply(system, None) for shared in (False, True)
    )
    assert passes(alone, request) == passes(alone, request)
    first = passes(shared, request)
    assert first == passes(alone, request)
    assert passes(shared, request) < first
    assert alone.facts["suffix_history"] == {"shared": False}
    assert "warnings" not in alone.facts
    assert shared.facts["suffix_history"] == {"shared": True, "capacity_tokens": 65536}
    assert "answers from request to request" in shared.facts["warnings"][0]


def test_order_decides_and_repeats(lab):
    """The same requests in the same order draft the same; what came before makes a difference."""
    system = lab.system("llama")
    one, two = (lab.request(lab.prompt(30, seed=seed), 24) for seed in (0, 5))

    def counts(*requests):
        applied = Suffix(factor=8.0, shared=True).apply(system, None)
        return [passes(applied, request) for request in requests]

    assert counts(one, two, one) == counts(one, two, one)
    assert counts(one, two, one)[2] < counts(two, one)[1]


def test_each_applied_method_has_a_history_of_its_own(lab):
    system, method = lab.system("llama"), Suffix(shared=True)
    first, second = method.apply(system, None), method.apply(system, None)
    assert first.held[HELD] is not second.held[HELD]
    assert HELD not in system.held
    request = lab.request(lab.prompt(30), 40)
    assert passes(first, request) == passes(second, request)


def test_the_oldest_is_forgotten_first():
    history = History(capacity=20)
    answers = [[10 * n + i for i in range(4)] for n in range(1, 6)]
    for answer in answers:
        history.begin([answer])
        assert sum(history.sizes()) <= 20
    history.begin([])
    found = [history.find(answer[:2])[1].length for answer in answers]
    # Four tokens and a mark each: two to a half, so the fifth answer pushed out the first two.
    assert found == [0, 0, 2, 2, 2]


def test_no_match_reaches_from_one_answer_into_another():
    history = History(capacity=100)
    history.begin([[1, 2], [3, 4]])
    history.begin([])
    assert history.find([2, 3])[1].length == 1
    store, match = history.find([1, 2])
    assert match.length == 2
    assert store.follow(match, tokens=4, shortest=1, min_probability=0) == []


def test_a_long_answer_leaves_its_end():
    history = History(capacity=8)
    history.begin([list(range(50))])
    history.begin([])
    assert history.find([48, 49])[1].length == 2
    assert history.find([45, 46])[1].length == 0
    assert sum(history.sizes()) <= 8


def test_an_answer_that_was_broken_off_is_kept_as_far_as_it_went(lab):
    applied = Suffix(shared=True).apply(lab.system("llama"), None)
    chunks = applied.generate(lab.request(lab.prompt(30), 40))
    said = [next(chunks) for _ in range(3)]
    chunks.close()
    list(applied.generate(lab.request(lab.prompt(20, seed=9), 1)))
    # The last chunk was on its way to the drafter.
    answer = lab.rows(said[:-1])[0]
    assert applied.held[HELD].find(answer)[1].length == len(answer)


# The tree


@pytest.mark.parametrize("nodes", [1, 2, 7, 60])
@pytest.mark.parametrize("successors", [1, 3, 8])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_templates_are_trees(nodes, successors, depth):
    places = template(nodes=nodes, successors=successors, depth=depth)
    assert 1 <= len(places) <= nodes
    assert len({(node.parent, node.rank) for node in places}) == len(places)
    for index, node in enumerate(places):
        assert ROOT <= node.parent < index
        above = 0 if node.parent == ROOT else places[node.parent].depth
        assert node.depth == above + 1 <= depth
        assert 0 <= node.rank < successors
    assert [node.depth for node in places] == sorted(node.depth for node in places)


def test_a_template_takes_what_is_likeliest():
    def chance(places, node):
        own = 0.5 ** (node.rank + 1)
        return own if node.parent == ROOT else own * chance(places, places[node.parent])

    large = template(nodes=200, successors=5, depth=5)
    small = template(nodes=20, successors=5, depth=5)
    best = sorted((chance(large, node) for node in large), reverse=True)[:20]
    assert sorted((chance(small, node) for node in small), reverse=True) == best


def say(vocabulary, *successors):
    """Logits after one token each, so that these are its successors, best first."""
    logits = torch.zeros(1, len(successors), vocabulary)
    for place, best in enumerate(successors):
        for rank, token in enumerate(best):
            logits[0, place, token] = 9 - rank
    return logits


def recycler(**shape):
    return Recycler(template(**shape), Table(shape["successors"]))


def test_the_table_holds_what_was_said_last():
    drafter = recycler(nodes=6, successors=2, depth=2)
    drafter.observe([[3]])
    drafter.observe([[1]], Evidence([[3]], say(6, [1, 2]), [[0]]))
    # Of 1 nothing is known yet.
    assert drafter.draft([9]) == [NOTHING]
    drafter.observe([[3]], Evidence([[1, 4, 2]], say(6, [3, 5], [0, 1], [4, 0]), [[0]]))
    (draft,) = drafter.draft([9])
    assert draft == Draft([1, 2, 3, 5, 4, 0], parents=[ROOT, ROOT, 0, 0, 1, 1])
    # A limit cuts whole levels, an unknown token its own branch.
    assert drafter.draft([1]) == [Draft([1, 2], parents=[ROOT, ROOT])]
    assert drafter.draft([0]) == [NOTHING]
    drafter.observe([[4]], Evidence([[3]], say(6, [4, 5]), [[0]]))
    assert drafter.draft([9]) == [Draft([0, 1, 3, 5], parents=[ROOT, ROOT, 1, 1])]


def test_what_the_text_kept_outweighs_what_it_rejected():
    drafter = recycler(nodes=2, successors=2, depth=1)
    drafter.observe([[3]])
    # Token 3 is in the block twice: place 0 stays, place 1 is rejected.
    evidence = Evidence([[3, 3]], say(6, [1, 2], [4, 5]), [[0]])
    drafter.observe([[3]], evidence)
    assert drafter.draft([9])[0].tokens == [1, 2]
    drafter.observe([[3]], evidence._replace(kept=[[0, 1]]))
    assert drafter.draft([9])[0].tokens == [4, 5]


def test_a_row_that_has_ended_teaches_nothing():
    drafter = recycler(nodes=2, successors=2, depth=1)
    drafter.observe([[3]])
    drafter.observe([[]], Evidence([[3]], say(6, [1, 2]), [[]]))
    assert drafter.draft([9]) == [NOTHING]


def test_a_vocabulary_smaller_than_the_table_is_wide():
    drafter = recycler(nodes=9, successors=8, depth=2)
    drafter.observe([[1]])
    drafter.observe([[1]], Evidence([[1]], say(3, [2, 0, 1]), [[0]]))
    (draft,) = drafter.draft([1])
    assert draft.tokens == [2, 0, 1]


def test_the_table_is_told_in_bytes(lab):
    system = lab.system("llama")
    method = TokenRecycling(successors=4)
    applied = method.apply(system, None)
    assert applied.facts["recycling_table"] == {
        "shared": False,
        "bytes": 300 * 4 * 4,
        "tokens": 300,
    }
    shared = TokenRecycling(successors=4, shared=True).apply(system, None)
    list(shared.generate(lab.request(lab.prompt(5), 8)))
    (table,) = shared.held.values()
    assert table.rows.nbytes == shared.facts["recycling_table"]["bytes"]


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_drafters_tell_what_they_hold(lab, name):
    told = []
    system = replace(lab.system("llama"), tell=lambda name, value: told.append((name, value)))
    applied = METHODS[name].apply(system, None)
    list(applied.generate(lab.request(lab.prompt(40), 20)))
    ((what, held),) = told
    assert what == "drafter_bytes"
    if name == "recycling":
        assert held == applied.facts["recycling_table"]["bytes"]
    else:
        assert 59 * 300 < held < 60 * 900


def test_a_shared_history_is_not_counted_as_nothing(lab):
    told = []
    system = replace(lab.system("llama"), tell=lambda name, value: told.append(value))
    list(METHODS["suffix, shared"].apply(system, None).generate(lab.request(lab.prompt(9), 9)))
    assert told == []


def test_a_match_says_how_long_it_was():
    row = SuffixRow(Suffix(), None)
    row.observe([1, 2, 3, 4, 9, 2, 3])
    assert row.draft(9) == Draft([4, 9], match=2)


def test_a_shared_table_is_faster_the_second_time(lab):
    system = lab.system("llama")
    request = lab.request(lab.prompt(30), 40)
    fresh, shared = (TokenRecycling(shared=kept).apply(system, None) for kept in (False, True))
    assert passes(fresh, request) == passes(fresh, request)
    assert passes(shared, request) > passes(shared, request)
