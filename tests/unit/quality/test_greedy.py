"""Where two continuations part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compresskit.quality.greedy import compare, continue_greedily, first_divergence


def digits(text):
    return [int(digit) for digit in text]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("129456", "123456", 2),
        ("91234", "1234", 0),
        ("1234", "1234", None),
        ("123", "12123", 2),  # the longest common *prefix*, not the longest common block
        ("12", "123", 2),
        ("123", "12", 2),
        ("", "", None),
    ],
)
def test_first_divergence_is_the_common_prefix(ours, theirs, expected):
    assert first_divergence(digits(ours), digits(theirs)) == expected


def test_a_long_text_with_one_change_is_not_written_off():
    a = list(range(300))
    b = [*a[:150], -1, *a[151:]]
    assert first_divergence(a, b) == 150


def test_summary():
    found = compare([digits("123"), digits("12")], [digits("123"), digits("1345")], 8)
    assert found.outputs_sha256[0] != found.outputs_sha256[1]
    assert (
        found.outputs_sha256 == compare([digits("123"), digits("12")], [[1], [1]], 8).outputs_sha256
    )
    assert found.model_dump(exclude={"outputs_sha256"}) == {
        "prompts": 2,
        "max_new_tokens": 8,
        "exact_match": 0.5,
        "first_divergence": (None, 1),
        "length_ratio": 5 / 7,
    }


def test_rows_end_at_their_own_stop_token(system, bytes_tokenizer):
    prompts = [list(b"one two "), list(b"bananas ")]
    free = continue_greedily(system, prompts, 12)
    assert [len(row) for row in free] == [12, 12]
    stop = free[0][4]
    stopping = replace(system, tokenizer=bytes_tokenizer(eos_ids=(stop,)))
    for row, whole in zip(continue_greedily(stopping, prompts, 12), free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 12
        assert row == whole[:end]
