"""Loss against bytes of the cache: points, order and picture, from the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import UsageError
from compresskit.report import join, table
from compresskit.report.held import by_cache
from compresskit.report.plot import cache

RESULTS = Path(__file__).parents[2] / "results" / "amd-epyc-2c-af34"


@pytest.fixture(scope="module")
def built():
    return table.build(join.load([RESULTS / "kv-tiny"]))


def test_points_are_losses_at_shares_of_the_full_cache(built):
    (group,) = built.groups
    found = {point.name: point for point in cache.points(group, cache.VIEWS[0])}
    row = next(row for row in group.rows if row.label == "kv/random")
    delta, ratio = row.cells["task_delta_aware"], row.cells["cache_achieved_ratio"]
    point = found["kv/random"]
    assert point.share == pytest.approx(100 / ratio.value)
    assert point.loss == pytest.approx(-100 * delta.value)
    assert point.low == pytest.approx(-100 * delta.high)
    assert point.high == pytest.approx(-100 * delta.low)
    assert "dense" not in found


def test_the_measured_tasks_separate_methods_from_the_control(built):
    """At equal bytes the intervals of the control and of what looks at queries do not meet."""
    (group,) = built.groups
    found = {point.name: point for point in cache.points(group, cache.VIEWS[0])}
    for method in ("kv/snapkv:window=16", "kv/h2o"):
        assert found[method].share == pytest.approx(found["kv/random"].share)
        assert found[method].high < found["kv/random"].low
    # And not everything is better: an eviction that looks at norms alone is worse than chance here.
    assert found["kv/knorm"].low > found["kv/random"].high


def test_rows_in_the_order_of_what_is_held(built):
    (group,) = by_cache(built).groups
    assert group.rows[0].dense
    held = [row.cells["cache_achieved_ratio"].value for row in group.rows if not row.dense]
    assert held == sorted(held)
    assert held != sorted(held, reverse=True)


def test_the_picture_names_every_row(built, tmp_path):
    pytest.importorskip("matplotlib")
    cache.draw(built, tmp_path / "cache.svg")
    text = (tmp_path / "cache.svg").read_text(encoding="utf-8")
    assert text.count("bytes held") >= len(cache.VIEWS)
    again = tmp_path / "again.svg"
    cache.draw(built, again)
    assert again.read_text(encoding="utf-8") == text


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    weights = table.build(join.load([RESULTS / "quantization-gemma"]))
    with pytest.raises(UsageError, match="cache methods"):
        cache.draw(weights, tmp_path / "none.svg")
