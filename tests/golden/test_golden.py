"""Stored records stay readable and render to the same tables, byte for byte."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from compresskit.record import Record
from compresskit.report import csv, document, join, markdown, reading, table, terminal
from compresskit.store import dumps, load
from compresskit.validity import VERSION, judge

RECORDS = Path(__file__).parent / "records" / "v2"
PATHS = sorted(RECORDS.glob("*.json"))


@pytest.fixture(scope="module")
def built():
    return table.build(join.load([RECORDS]))


def _printed(built, width: int) -> str:
    out = io.StringIO()
    terminal.render(built, Console(file=out, width=width, color_system=None, legacy_windows=False))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_record_of_todays_schema_is_read_back_unchanged(path):
    assert dumps(load(path)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_record_obeys_the_published_schema(path):
    schema = Record.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    document_ = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document_)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_stored_verdict_is_what_the_rules_say_now(path):
    """The examples are frozen with the version of the rules that they were judged by."""
    stored, now = load(path).validity, judge(load(path))
    assert (stored.verdict, stored.reasons) == (now.verdict, now.reasons)
    assert stored.rules <= now.rules == VERSION


def test_the_terminal_table(built, same_as_golden):
    same_as_golden("table-120.txt", _printed(built, 120))


def test_the_terminal_table_breaks_between_columns_where_it_is_narrow(built, same_as_golden):
    text = _printed(built, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    same_as_golden("table-80.txt", text)


def test_the_markdown_table(built, same_as_golden):
    same_as_golden("table.md", markdown.render(built))


def test_the_csv_table(built, same_as_golden):
    same_as_golden("table.csv", csv.render(built))


def test_the_json_table(built, same_as_golden):
    text = json.dumps(document.render(built), allow_nan=False, ensure_ascii=False, indent=1)
    same_as_golden("table.json", text + "\n")


def test_the_reading(built, same_as_golden):
    same_as_golden("reading.txt", reading.read(built) + "\n")
