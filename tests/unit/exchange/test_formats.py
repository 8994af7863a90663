"""Which records may leave, and what happens to the rest."""

from __future__ import annotations

import pytest

from compresskit.errors import Incomparable, RecordError, UnknownName, UsageError
from compresskit.exchange import formats

from .conftest import FOREIGN, golden

EVERYTHING = ("dense", "int8", "ngram", "short", "simulated", "skipped", "failed")


def test_only_numbers_that_stand_are_exported():
    kept, notes = formats.usable(map(golden, EVERYTHING))
    assert [record.label for record in kept] == ["dense", "quant/int8", golden("ngram").label]
    assert len(notes) == 4
    assert any("INVALID" in note for note in notes)
    assert any("simulates" in note for note in notes)


def test_nothing_but_invalid_results_is_an_error_of_its_own():
    with pytest.raises(Incomparable, match="INVALID"):
        formats.usable([golden("short")])


def test_nothing_to_export_is_a_usage_error():
    with pytest.raises(UsageError, match="skipped"):
        formats.usable([golden("skipped")])


def test_an_unknown_format_suggests_a_known_one():
    with pytest.raises(UnknownName, match="Did you mean 'vllm'"):
        formats.exporter("vlm")
    with pytest.raises(UnknownName, match="Known: llama-bench"):
        formats.read(FOREIGN / "vllm.json", "asv")


def test_a_file_that_is_not_there_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        formats.read(tmp_path / "none.json", "vllm")
    with pytest.raises(RecordError, match="cannot be read"):
        formats.read(tmp_path, "vllm")


def test_an_endless_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_FILE", 10)
    path = tmp_path / "large.json"
    path.write_text("{}" * 6)
    with pytest.raises(RecordError, match="larger than 10 bytes"):
        formats.read(path, "vllm")
