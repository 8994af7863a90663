"""The corpus of the tiny models: the same text for ever, splits apart, answers where it says."""

from __future__ import annotations

import pytest

from benchmarks.tiny import corpus
from benchmarks.tiny.corpus import CALIBRATION, MIX, TEST, TRAIN, VALIDATION, document, documents
from benchmarks.tiny.dice import Dice
from compresskit.assets import text_path

# Changing the corpus changes every trained model: retrain, then put the new digest here.
DIGESTS = {
    "train": (TRAIN, "fb36b077ca326fccfb4c91b83b896c787ad47814f9abf0ef6bf1ac18ed8bad98"),
    "validation": (VALIDATION, "9484310fe5d62ad21100cbf0f63fda31c88a350aa5a6b9073e0f118f5fc17596"),
    "test": (TEST, "69052b834d20c126c769f153b6b3d253c62a6f0f64ee136f4f89b1f14ea9af1d"),
}


@pytest.mark.parametrize("split", DIGESTS)
def test_the_corpus_never_changes(split):
    indices, expected = DIGESTS[split]
    assert corpus.digest(documents(indices[:1000])) == expected


def test_an_index_always_gives_the_same_document():
    assert document(TEST[7]) == document(TEST[7])
    assert document(TEST[7]) != document(TEST[8])


def test_no_document_is_in_two_splits():
    for one, other in ((TRAIN, VALIDATION), (VALIDATION, TEST), (TRAIN, TEST)):
        assert one.stop <= other.start or other.stop <= one.start
    assert CALIBRATION.start in TRAIN
    assert CALIBRATION.stop == TRAIN.stop


def test_different_indices_rarely_write_the_same_text():
    # Short counting and pattern lists repeat by chance; anything longer must not.
    train = {text.text for text in documents(TRAIN[:3000])}
    repeated = [t for t in documents(TEST[:500]) if t.text in train and len(t.text) > 200]
    assert repeated == []


@pytest.mark.parametrize("domain", MIX)
def test_every_domain_fills_about_the_size_it_was_given(domain):
    lengths = [len(document(index, 1000, domain).text) for index in TEST[:100]]
    assert min(lengths) > 10
    assert max(lengths) < 2000


@pytest.mark.parametrize("domain", ["recall", "drill", "pairs", "chat"])
def test_an_answer_repeats_what_was_stated_before_it(domain):
    asked = 0
    for text in documents(TEST[:100], domain=domain):
        for answer in text.answers:
            length = answer.stop - answer.start
            assert answer.stated + length <= answer.start
            value = text.text[answer.start : answer.stop]
            assert text.text[answer.stated : answer.stated + length] == value
            asked += 1
    assert asked >= 100


def test_shipped_texts_are_those_of_the_recipe():
    heldout = text_path("heldout").read_text()
    calibration = text_path("calibration").read_text()
    assert heldout == corpus.plain_text(TEST, corpus.HELDOUT_BYTES)
    assert calibration == corpus.plain_text(CALIBRATION, corpus.CALIBRATION_BYTES)
    assert "What is the code of" in heldout
    assert "What is the code of" in calibration


def test_heldout_and_calibration_text_share_no_document():
    parts = [
        {part for part in text_path(name).read_text().split(corpus.SEPARATOR) if len(part) > 200}
        for name in ("heldout", "calibration")
    ]
    assert parts[0].isdisjoint(parts[1])


def test_dice_keep_their_promises():
    dice = Dice(3)
    assert all(2 <= dice.number(2, 5) <= 5 for _ in range(200))
    assert {dice.even("abc") for _ in range(200)} == set("abc")
    picks = [dice.pick("abc") for _ in range(600)]
    assert picks.count("a") > picks.count("b") > picks.count("c") > 0
    assert sorted(dice.sample("abcd", 4)) == list("abcd")
    with pytest.raises(IndexError):
        dice.even("")
