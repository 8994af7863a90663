"""Records: what is stored comes back, and what was tampered with is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from compresskit import store
from compresskit.errors import RecordError, RunError
from compresskit.record import SCHEMA, Estimated, Measured, Reading, Record, Unavailable
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"


@pytest.fixture
def stored(tmp_path) -> Path:
    """A copy of the synthetic dense record that a test may damage."""
    path = tmp_path / "record.json"
    path.write_text((GOLDEN / "synthetic-dense.json").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def damage(path: Path, change, *, sign: bool = False) -> None:
    """Edit a stored record by hand; with `sign`, as a newer version of the tool would write it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    if sign:
        document["checksum"] = store.checksum(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_a_record_survives_storing_and_loading(stored, tmp_path):
    record = store.load(stored)
    path = store.save(record, tmp_path / "deep" / "folder")
    assert path.name == f"{record.digest}.json"
    assert store.load(path) == record
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_spec_changed_by_hand_is_refused(stored):
    damage(stored, lambda d: d["spec"]["workload"].update(new_tokens=17))
    with pytest.raises(RecordError, match=r"digest .* does not belong .* edited"):
        store.load(stored)


def test_a_digest_changed_by_hand_is_refused(stored):
    damage(stored, lambda d: d.update(digest="0" * 12))
    with pytest.raises(RecordError, match="edited"):
        store.load(stored)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(stored, constant):
    text = stored.read_text(encoding="utf-8")
    stored.write_text(
        text.replace('"load_seconds": 1.5', f'"load_seconds": {constant}'), encoding="utf-8"
    )
    assert constant in stored.read_text(encoding="utf-8")
    with pytest.raises(
        RecordError, match=r"not a readable record \((expected value|invalid number) at line"
    ):
        store.load(stored)


def test_a_number_that_no_float_can_hold_is_refused(stored):
    text = stored.read_text(encoding="utf-8")
    stored.write_text(
        text.replace('"load_seconds": 1.5', '"load_seconds": 1e999'), encoding="utf-8"
    )
    with pytest.raises(RecordError, match="a number is too large"):
        store.load(stored)


def test_endless_nesting_is_refused(stored):
    stored.write_text('{"schema_version":' * 100_000, encoding="utf-8")
    with pytest.raises(RecordError, match="not a readable record"):
        store.load(stored)


def _first_sample(document):
    return document["blocks"][0]["passes"]["latency"]["samples"][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: _first_sample(d)["arrivals"][0].__setitem__(0, -0.1), "a chunk arrived before"),
        (lambda d: _first_sample(d)["arrivals"].reverse(), "a chunk arrived before"),
        (lambda d: d["setup"].update(apply_seconds=-1.0), "setup.apply_seconds is negative"),
        (
            lambda d: d["blocks"][0]["passes"]["energy"]["generate"][0].update(window_seconds=-10),
            "an energy window is negative",
        ),
    ],
)
def test_times_that_no_clock_gave_are_refused_even_where_the_checksum_fits(
    stored, change, sentence
):
    damage(stored, change, sign=True)
    with pytest.raises(RecordError, match=sentence):
        store.load(stored)


def test_a_record_is_read_from_its_own_bytes_and_equals_the_document(stored):
    """The fast way gives what validating the parsed document would give."""
    document = json.loads(stored.read_text(encoding="utf-8"))
    assert store.load(stored) == Record.model_validate_json(json.dumps(document))


def test_a_truncated_file_is_refused(stored):
    text = stored.read_text(encoding="utf-8")
    stored.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(RecordError, match="not a readable record"):
        store.load(stored)


def test_bytes_that_are_not_text_are_refused(stored):
    stored.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not a readable record"):
        store.load(stored)


def test_a_record_from_the_future_is_refused(stored):
    damage(stored, lambda d: d.update(schema_version=SCHEMA + 1))
    with pytest.raises(RecordError, match=r"schema 3; this version reads 1 to 2\. Update"):
        store.load(stored)


@pytest.mark.parametrize("text", ["[]", "{}", '"record"', '{"digest": "x"}'])
def test_other_json_is_not_a_record(stored, text):
    stored.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match="not a compresskit record"):
        store.load(stored)


def test_a_missing_field_is_named(stored):
    damage(stored, lambda d: d.pop("status"), sign=True)
    with pytest.raises(RecordError, match="status: Field required"):
        store.load(stored)


def test_a_key_of_a_newer_minor_version_is_ignored(stored):
    before = store.load(stored)
    damage(stored, lambda d: d.update(later="something"), sign=True)
    assert store.load(stored) == before


def test_an_edited_sample_is_refused(stored):
    damage(stored, lambda d: d["blocks"][0]["passes"]["memory"].update(cache_bytes={"held": 1}))
    with pytest.raises(RecordError, match="checksum"):
        store.load(stored)


def test_a_missing_file_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match="not a readable record"):
        store.load(tmp_path / "none.json")


def test_records_are_immutable(stored):
    with pytest.raises(ValidationError, match="frozen"):
        store.load(stored).status = "failed"


def test_nan_cannot_even_be_constructed():
    with pytest.raises(ValidationError, match="finite"):
        Measured(value=float("nan"), unit=Unit.JOULE, source="test")


def test_readings_are_told_apart_by_kind_and_the_unknown_is_null():
    adapter = TypeAdapter(Reading)
    for reading in (
        Measured(value=1.0, unit=Unit.JOULE, source="counter"),
        Estimated(value=2.0, unit=Unit.JOULE, model="guess"),
        Unavailable(reason="no counter"),
    ):
        assert adapter.validate_json(adapter.dump_json(reading)) == reading
    assert json.loads(Unavailable(reason="x").model_dump_json())["value"] is None


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        store.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_field_docstrings_reach_the_schema():
    definitions = Record.model_json_schema()["$defs"]
    assert "Bytes" in definitions["MemoryPass"]["properties"]["cache_bytes"]["description"]
    assert "nats" in definitions["Fidelity"]["properties"]["delta_nll"]["description"]


@pytest.mark.parametrize("huge", ["1e25", "-1e300", "9" * 30, "-" + "9" * 30])
def test_a_number_that_nothing_can_measure_is_refused_even_where_the_checksum_fits(stored, huge):
    damage(stored, lambda d: d["setup"].update(compile_seconds=json.loads(huge)), sign=True)
    with pytest.raises(RecordError, match=r"a number is larger than 1e\+24"):
        store.load(stored)


def test_long_names_and_large_seeds_are_no_large_numbers(stored):
    """The fast search for large numbers may be wrong; what it finds is looked at."""

    def rename(document):
        document["label"] = "e+300 :" + "9" * 40
        document["facts"] = {"seconds": 1e23}

    damage(stored, rename, sign=True)
    assert store.load(stored).facts == {"seconds": 1e23}


def test_a_time_below_what_any_clock_resolves_is_refused(stored):
    damage(stored, lambda d: _first_sample(d)["arrivals"][0].__setitem__(0, 1e-300), sign=True)
    with pytest.raises(RecordError, match="less than 1e-12 s"):
        store.load(stored)


@pytest.mark.parametrize("was_on", [True, False])
def test_reading_many_records_leaves_the_collector_as_it_was(stored, was_on):
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(RecordError), store.many():
            assert not gc.isenabled()
            store.load(stored)
            store.load(stored / "none")
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()
