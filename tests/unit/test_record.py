"""Records: what is stored comes back, and what was tampered with is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from compresskit import store
from compresskit.errors import RecordError, RunError
from compresskit.record import SCHEMA, Estimated, Measured, Reading, Record, Unavailable
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"


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
    with pytest.raises(RecordError, match="is not JSON"):
        store.load(stored)


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
    with pytest.raises(RecordError, match=r"schema 2; this version reads 1\. Update"):
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
    damage(stored, lambda d: d["blocks"][0]["passes"]["memory"].update(cache_bytes=1))
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
