"""A worse clock is measured again; a baseline is replaced record by record."""

from __future__ import annotations

import pytest

from compresskit.compare import again, baseline, compare, load
from compresskit.errors import Incomparable, RunError


def test_a_slowdown_that_stays_is_believed(bench):
    base = bench.golden("int8")
    slow = bench.later(bench.slower(base, 2.0))
    first = compare([base], [slow])
    assert again.doubtful(first) == [slow.spec]
    found = again.confirm(first, compare([base], [slow]))
    assert len(found.failures()) == len(first.failures())
    assert "worse again in a second session (ratio" in found.failures()[0][1].reason


def test_a_slowdown_that_goes_away_is_withdrawn_and_said(bench):
    base = bench.golden("int8")
    first = compare([base], [bench.later(bench.slower(base, 2.0))])
    found = again.confirm(first, compare([base], [bench.later(base)]))
    assert not found.failures()
    outcome = next(o for _, o in found.outcomes() if o.metric == "tpot_s")
    assert outcome.word == "inconclusive"
    assert outcome.reason.startswith("worse at first (ratio 2.00), same in a second session")


def test_what_cannot_be_measured_again_stays_worse(bench):
    base = bench.golden("int8")
    first = compare([base], [bench.later(bench.slower(base, 2.0))])
    found = again.confirm(first, compare([base], [bench.golden("dense")]))
    assert len(found.failures()) == len(first.failures())
    assert "could not be measured again" in found.failures()[0][1].reason


def test_counts_and_quality_need_no_second_session(bench):
    base = bench.golden("int8")
    first = compare([base], [bench.memory(base, parameters=7)])
    assert again.doubtful(first) == []
    found = again.confirm(first, compare([base], [base]))
    assert {o.tier for _, o in found.failures()} == {"exact"}


def test_an_update_replaces_equal_specs_and_keeps_the_rest(bench, tmp_path):
    dense, int8 = bench.golden("dense"), bench.golden("int8")
    assert baseline.update(tmp_path, {}, [dense, int8], machine="here").added
    before = load(tmp_path)
    new = bench.memory(int8, parameters=7)
    written = baseline.update(tmp_path, before, [new], machine="here")
    assert (len(written.replaced), len(written.added)) == (1, 0)
    after = load(tmp_path)
    assert after.keys() == before.keys()
    assert {record.digest: record for record in after.values()} == {
        dense.digest: before[tmp_path / f"{dense.digest}.json"],
        int8.digest: new,
    }


def test_an_update_leaves_the_records_of_another_machine_alone(bench, tmp_path):
    theirs = bench.golden("int8")
    theirs = theirs.model_copy(
        update={"device": theirs.device.model_copy(update={"name": "Another CPU"})}
    )
    baseline.update(tmp_path, {}, [theirs], machine="there")
    ours = bench.golden("int8")
    written = baseline.update(tmp_path, load(tmp_path), [ours], machine="here")
    assert written.added == [tmp_path / "here" / f"{ours.digest}.json"]
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize(("name", "error"), [("failed", RunError), ("short", Incomparable)])
def test_nothing_is_written_unless_every_record_is_sound(bench, tmp_path, name, error):
    with pytest.raises(error, match="the baseline stays as it is"):
        baseline.update(tmp_path, {}, [bench.golden("int8"), bench.golden(name)], machine="here")
    assert not list(tmp_path.iterdir())
