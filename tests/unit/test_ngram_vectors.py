"""speculative/ngram gives vLLM's drafts on vLLM's own examples, with match=first."""

from __future__ import annotations

import pytest

from compresskit.methods.speculative.ngram import Lookup


def lookup(text, *, shortest, longest, draft, match="first"):
    index = Lookup(longest=longest, shortest=shortest, match=match, draft=draft)
    index.observe(text)
    return index.draft(99).tokens


@pytest.mark.parametrize(
    ("text", "n", "draft", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, 3, [4, 1, 2]),
        ([1, 3, 6, 2, 3, 4, 1, 2, 3], 2, 3, [4, 1, 2]),
        ([1, 3, 6, 2, 3, 4, 1, 2, 3], 1, 2, [6, 2]),
        ([1, 2, 3, 100, 1, 2, 3, 200, 1, 2, 3, 300, 1, 2, 3], 3, 2, [100, 1]),
        ([1, 2, 3, 4, 5], 2, 3, []),
    ],
)
def test_vllms_examples(text, n, draft, expected):
    assert lookup(text, shortest=n, longest=n, draft=draft) == expected


def test_the_longest_size_with_a_match_decides():
    # Sizes 1 to 4: nothing of four tokens recurs, three do.
    assert lookup([7, 1, 2, 3, 8, 1, 2, 3], shortest=1, longest=4, draft=1) == [8]


def test_by_default_the_last_match_is_followed_instead():
    text = [1, 2, 3, 100, 1, 2, 3, 200, 1, 2, 3, 300, 1, 2, 3]
    assert lookup(text, shortest=3, longest=3, draft=2, match="last") == [300, 1]


def test_a_draft_goes_round_where_vllms_ends_with_the_text():
    # vLLM drafts what stands between the match and the end, here one token; ours goes on as a loop.
    assert lookup([5, 4, 4], shortest=1, longest=1, draft=3) == [4, 4, 4]
