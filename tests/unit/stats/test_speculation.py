"""The cost model against the tables of its paper, worked out by hand, and its edge cases."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from compresskit.stats.speculation import (
    FLAT,
    Costs,
    best_length,
    expected_tokens,
    speed_up,
)

CHEAP = Costs(draft=0.05)


def sloped(most: int) -> Costs:
    return Costs(
        passes=((1, 1.0), *((g + 1, 1 + 0.13 * g) for g in range(1, most + 1))), draft=0.05
    )


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.6, (1.6, 1.96, 2.3056, 2.4748)),
        (0.8, (1.8, 2.44, 3.3616, 4.3289)),
        (0.9, (1.9, 2.71, 4.0951, 6.1258)),
    ],
)
def test_tokens_per_pass_of_equal_acceptance(rate, expected):
    for length, tokens in zip((1, 2, 4, 8), expected, strict=True):
        assert expected_tokens([rate] * length) == pytest.approx(tokens, abs=5e-5)
        closed = (1 - rate ** (length + 1)) / (1 - rate)
        assert expected_tokens([rate] * length) == pytest.approx(closed, rel=1e-12)
    assert expected_tokens([0.8] * 5) == pytest.approx(3.6893, abs=5e-5)


def test_certain_drafts_are_all_accepted():
    assert expected_tokens([1.0] * 5) == 6


@given(st.lists(st.floats(0, 1), max_size=8))
def test_a_pass_gives_one_token_at_least_and_one_more_than_drafted_at_most(rates):
    assert 1 <= expected_tokens(rates) <= len(rates) + 1
    assert expected_tokens(rates[:-1]) <= expected_tokens(rates)


def test_speed_up_with_free_and_with_dearer_passes():
    four = [0.8] * 4
    assert speed_up(four, CHEAP) == pytest.approx(2.801, abs=5e-4)
    dearer = Costs(passes=((1, 1.0), (5, 1.5)), draft=0.05)
    assert speed_up(four, dearer) == pytest.approx(1.977, abs=5e-4)
    assert speed_up([], CHEAP) == 1


def test_what_a_pass_costs_decides_how_long_to_draft():
    assert best_length([0.8] * 8, CHEAP) == 8
    assert best_length([0.8] * 8, sloped(8)) == 4
    assert speed_up([0.8] * 4, sloped(8)) == pytest.approx(1.95, abs=5e-3)


def test_no_draft_where_none_pays():
    assert best_length([0.0] * 8, FLAT) == 0
    assert best_length([0.3] * 8, Costs(passes=((1, 1.0), (2, 1.6)))) == 0
    assert best_length([], FLAT) == 0


def test_between_known_widths_is_a_straight_line_and_beyond_them_the_last_slope():
    costs = Costs(passes=((1, 1.0), (2, 1.6), (4, 1.5)))
    assert [costs.verify(n) for n in (1, 2, 3, 4, 6)] == pytest.approx([1, 1.6, 1.55, 1.5, 1.4])
    assert [Costs().verify(n) for n in (1, 9)] == [1, 1]
    assert FLAT.verify(9) == pytest.approx(1.16)


def test_a_padded_pass_costs_what_the_next_width_does():
    costs = Costs(passes=((1, 1.0), (5, 1.2), (9, 1.3)), padded=True)
    assert [costs.verify(n) for n in (1, 2, 5, 6, 9, 12)] == [1.0, 1.2, 1.2, 1.3, 1.3, 1.3]
    # Once a pass is wide, its tokens are free: all or nothing.
    assert best_length([0.6] * 4, costs) == 4


def test_the_host_makes_short_drafts_worse():
    busy = Costs(passes=FLAT.passes, host=1.0)
    rates = [0.5] * 4
    assert speed_up(rates[:1], busy) < speed_up(rates[:1], FLAT)
    assert best_length(rates, busy) >= best_length(rates, FLAT)
