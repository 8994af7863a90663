"""The suffix automaton and its drafts, held against a search through the text."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings, strategies as st

from compresskit.methods.speculative import _automaton
from compresskit.methods.speculative._automaton import ROOT, Automaton
from compresskit.methods.speculative.suffix import Suffix, SuffixRow

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def built(text):
    automaton = Automaton()
    automaton.extend(text)
    return automaton


def pieces(text):
    """Every piece of `text`, and how often it occurs."""
    return Counter(
        tuple(text[start:end])
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def state_of(automaton, piece):
    state = ROOT
    for token in piece:
        state = automaton.following[state][token]
    return state


def repeated(text):
    """Length of the longest end of `text` that also ends earlier."""
    return max(
        (
            size
            for size in range(1, len(text))
            if any(text[end - size : end] == text[-size:] for end in range(size, len(text)))
        ),
        default=0,
    )


def search(text, *, draft, min_match, factor, min_probability):
    """What Suffix should draft, by looking through the whole text at every token."""
    size = repeated(text)
    if size < min_match:
        return []
    context, probability, found = list(text[len(text) - size :]), 1.0, []
    while len(found) < min(draft, int(factor * size)):
        while True:
            ends = range(len(context), len(text))
            places = [end for end in ends if text[end - len(context) : end] == context]
            if places:
                break
            context = context[1:]
            if len(context) < min_match:
                return found
        counts = Counter(text[end] for end in places)
        latest = {text[end]: end for end in places}
        token = max(counts, key=lambda token: (counts[token], latest[token]))
        probability *= counts[token] / len(places)
        if probability < min_probability:
            return found
        found.append(token)
        context.append(token)
    return found


@given(text=texts)
def test_it_knows_every_piece_and_counts_it(text):
    automaton = built(text)
    for piece, times in pieces(text).items():
        assert automaton.count[state_of(automaton, piece)] == times


@given(text=texts)
def test_it_knows_no_other_piece(text):
    automaton = built(text)
    known = pieces(text)
    for piece in [(), *known]:
        following = automaton.following[state_of(automaton, piece)]
        assert {(*piece, token) for token in following} <= set(known)


@given(text=st.lists(st.integers(0, 3), max_size=80))
def test_it_stays_small(text):
    automaton = built(text)
    assert len(automaton.link) <= max(2 * len(text), 1)
    assert automaton.size == len(text)
    for state in range(1, len(automaton.link)):
        assert automaton.length[automaton.link[state]] < automaton.length[state]
    steps = sum(map(len, automaton.following))
    assert steps <= max(3 * len(text) - 1, 0)


@given(text=texts)
def test_the_longest_repeated_end(text):
    assert built(text).repeated().length == repeated(text)


@given(text=texts, tail=texts)
def test_the_longest_end_of_another_text(text, tail):
    known = pieces(text)
    ends = [size for size in range(1, len(tail) + 1) if tuple(tail[-size:]) in known]
    assert built(text).find(tail).length == max(ends, default=0)


CASES = {
    "text": texts,
    "draft": st.integers(1, 9),
    "min_match": st.integers(1, 4),
    "factor": st.sampled_from([0.4, 1.0, 2.5]),
    "min_probability": st.sampled_from([0.0, 0.3, 0.6, 1.0]),
}


def agrees(text, **parameters):
    row = SuffixRow(Suffix(**parameters), None)
    row.observe(text[:1])
    row.observe(text[1:])
    return row.draft(99).tokens == search(text, **parameters)


@settings(max_examples=400, deadline=None)
@given(**CASES)
def test_drafts_equal_a_search(text, **parameters):
    assert agrees(text, **parameters)


def test_wrong_counts_are_seen(monkeypatch):
    """Negative control: counting the longest piece alone changes drafts."""
    text = [0, 1, 0, 1, 0, 2, 0]
    options = {"draft": 1, "min_match": 1, "factor": 1.0, "min_probability": 0.0}
    # After 0 came 1 twice and 2 once, later.
    assert search(text, **options) == [1]
    assert agrees(text, **options)
    monkeypatch.setattr(_automaton, "NESTED", 1)
    assert not agrees(text, **options)


def test_separators_never_follow():
    automaton = built([5, 6, -1, 5, 6, -2])
    match = automaton.find([5, 6])
    assert match.length == 2
    assert automaton.likeliest(match.state) is None
    assert automaton.follow(match, tokens=4, shortest=1, min_probability=0) == []
    assert automaton.find([6, 5]).length == 1


def test_the_empty_text():
    automaton = Automaton()
    assert automaton.repeated() == (ROOT, 0)
    assert automaton.find([1, 2]) == (ROOT, 0)
    assert automaton.likeliest(ROOT) is None
    assert SuffixRow(Suffix(), None).draft(4).tokens == []
