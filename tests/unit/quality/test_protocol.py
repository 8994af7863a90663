"""Which tokens are scored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compresskit.errors import InputError, SpecError
from compresskit.quality.protocol import Cut, comparable, openings, plan
from compresskit.text import Text

LETTERS = Text("letters", "abcdefghijklmnopqrstuvwxyz")


@pytest.fixture
def make(system, spec, bytes_tokenizer):
    def build(text=LETTERS, *, bos=False, cache_changed=False, batch_allowed=True, **options):
        chosen = replace(system, tokenizer=bytes_tokenizer(bos=bos))
        return plan(
            chosen, text, spec(**options), cache_changed=cache_changed, batch_allowed=batch_allowed
        )

    return build


def shown(rows):
    return [bytes(token if token < 256 else ord("^") for token in row).decode() for row in rows]


def test_windows_score_every_token_after_the_first_once(make):
    found = make(protocol="window", window=5, tokens=100)
    assert shown(found.rows) == ["abcdef", "fghijk", "klmnop", "pqrstu", "uvwxyz"]
    assert (found.first, found.inputs, found.scored_tokens) == (0, 5, 25)


def test_a_bos_token_stands_in_for_the_token_before_the_window(make):
    found = make(protocol="window", window=8, tokens=100, bos=True)
    assert shown(found.rows) == ["^abcdefgh", "^ijklmnop", "^qrstuvwx"]
    assert "bos=256" in found.protocol_id


def test_tokens_bound_the_scored_ones_and_the_tail_is_dropped(make):
    assert shown(make(protocol="window", window=4, tokens=11).rows) == ["abcde", "efghi"]


def test_a_short_text_is_one_short_window(make):
    found = make(protocol="window", window=512 // 4, tokens=200)
    assert shown(found.rows) == [LETTERS.content]
    assert found.protocol_id.startswith("window-25/disjoint/25/bos=none/text=sha256:")


def test_split_does_not_score_what_the_prefill_predicts(make):
    found = make(protocol="split", prefill=3, continuation=2, windows=4)
    assert shown(found.rows) == ["abcdef", "ghijkl", "nopqrs", "uvwxyz"]
    assert found.cuts(99) == [Cut(0, 3, False), Cut(3, 4, True), Cut(4, 5, True)]
    assert found.scored_tokens == 8  # e f, k l, r s, y z
    assert found.batch == 4
    assert (
        make(protocol="split", prefill=3, continuation=2, windows=4, batch_allowed=False).batch == 1
    )


def test_many_windows_go_through_in_several_batches(make):
    found = make(protocol="split", prefill=1, continuation=1, windows=9, text=Text("t", "x" * 99))
    assert (len(found.rows), found.batch) == (9, 8)


def test_split_with_bos_keeps_the_length(make):
    found = make(protocol="split", prefill=3, continuation=2, windows=9, bos=True)
    assert shown(found.rows) == ["^abcde", "^fghij", "^klmno", "^pqrst", "^vwxyz"]


def test_auto_splits_only_where_the_cache_changed(make):
    assert make(protocol="auto").first == 0
    assert make(protocol="auto", cache_changed=True, prefill=3, continuation=2).first == 3


def test_cuts_cover_each_scored_position_once(make):
    found = make(protocol="window", window=25)
    assert found.cuts(10) == [Cut(0, 10, True), Cut(10, 20, True), Cut(20, 25, True)]
    assert found.cuts(1000) == [Cut(0, 25, True)]


@pytest.mark.parametrize("protocol", ["window", "split"])
def test_scored_bytes_are_of_the_scored_text(make, protocol):
    text = Text("umlauts", "ö" * 40)  # two tokens each
    found = make(
        text, protocol=protocol, window=16, tokens=64, prefill=7, continuation=8, windows=2
    )
    if protocol == "window":  # starts inside the first character, ends inside another
        assert abs(found.scored_bytes(make_system(found)) - 64) <= 4
    else:
        assert found.scored_bytes(make_system(found)) == found.scored_tokens == 16


def make_system(found):
    class Tokenizer:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    class System:
        tokenizer = Tokenizer()

    return System()


def test_too_long_for_the_model_or_the_text(make):
    with pytest.raises(SpecError, match=r"window of 257 .* context of 256\. Lower window"):
        make(protocol="window", window=257, tokens=999)
    with pytest.raises(SpecError, match="Lower prefill"):
        make(protocol="split", prefill=200, continuation=57)
    with pytest.raises(InputError, match="takes 27"):
        make(protocol="split", prefill=16, continuation=10)
    with pytest.raises(InputError, match="single token"):
        make(Text("x", "x"), protocol="window")


def test_ids_tell_apart_whatever_changes_the_number(make):
    base = make(window=8, tokens=24).protocol_id
    others = [
        make(window=6, tokens=24),
        make(window=8, tokens=16),
        make(window=8, tokens=24, bos=True),
        make(Text("other", LETTERS.content.upper()), window=8, tokens=24),
        make(protocol="split", prefill=4, continuation=4),
        make(protocol="split", prefill=3, continuation=5),
        make(protocol="split", prefill=4, continuation=4, windows=1),
    ]
    ids = [base, *(other.protocol_id for other in others)]
    assert len(set(ids)) == len(ids)
    assert comparable(base, make(Text("renamed", LETTERS.content), window=8, tokens=24).protocol_id)
    assert not comparable(base, ids[1])


def test_openings_are_disjoint_and_of_equal_length(make, system, spec):
    small = spec(greedy_prompts=3, prefill=5)
    assert shown(openings(system, make(), small)) == ["abcde", "klmno", "vwxyz"]
    assert openings(system, make(), spec(greedy_prompts=0)) == ()
    # Shorter where the text asks for it.
    assert shown(openings(system, make(), spec(greedy_prompts=8, prefill=5)))[0] == "abc"
    with pytest.raises(SpecError, match="Lower greedy_prompts"):
        openings(system, make(), spec(greedy_tokens=256))
