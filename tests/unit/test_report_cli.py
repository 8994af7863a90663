"""The commands `table` and `schema`, through typer."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from compresskit.cli.schema import schema
from compresskit.cli.table import table
from compresskit.errors import Exit, UsageError
from compresskit.report import join
from compresskit.store import dumps, load, save

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"

app = typer.Typer()
app.command()(table)
app.command()(schema)


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("style", "start"),
    [("md", "**synthetic"), ("csv", "model,revision"), ("json", "{"), ("rich", "synthetic")],
)
def test_a_table_in_every_format(style, start):
    result = invoke("table", str(GOLDEN), "--format", style)
    assert result.exit_code == Exit.DONE
    assert result.stdout.startswith(start)


def test_json_is_one_document_even_with_warnings(tmp_path):
    save(join.load([GOLDEN]).rows[0].record, tmp_path)
    (tmp_path / "broken.json").write_text("{")
    result = invoke("table", str(tmp_path), "-f", "json")
    assert json.loads(result.stdout)["warnings"]
    assert "broken.json" in result.stderr


def test_csv_has_one_line_per_run():
    rows = list(csv.reader(io.StringIO(invoke("table", str(GOLDEN), "-f", "csv").stdout)))
    assert len(rows) == 1 + len(list(GOLDEN.glob("*.json")))
    assert len({len(row) for row in rows}) == 1


def test_nothing_but_invalid_rows_has_an_exit_code_of_its_own():
    result = invoke("table", str(GOLDEN / "synthetic-short.json"))
    assert result.exit_code == Exit.INVALID


def test_an_empty_folder_is_a_usage_error(tmp_path):
    result = invoke("table", str(tmp_path))
    assert isinstance(result.exception, UsageError)
    assert str(tmp_path) in str(result.exception)


def test_prices_on_the_command_line_bring_columns_of_money():
    bare = invoke("table", str(GOLDEN), "-f", "md").stdout
    words = ("--price-per-hour", "2.5", "--currency", "CHF")
    rented = invoke("table", str(GOLDEN), "-f", "md", *words).stdout
    assert "rent/Mtok out" not in bare
    assert "rent/Mtok out" in rented
    assert re.search(r"\| \d+\.\d CHF \|", rented)
    assert "electricity" not in rented.partition("Prices as given")[0]


@pytest.mark.parametrize(
    "words", [("--price-per-hour", "-1"), ("--price-per-kwh", "nan"), ("--pue", "0.5")]
)
def test_a_price_that_makes_no_sense_is_a_usage_error(words):
    result = invoke("table", str(GOLDEN), *words)
    assert isinstance(result.exception, UsageError)
    assert "prices" in str(result.exception)


@pytest.mark.parametrize("what", ["record", "spec"])
def test_the_schema_is_one_document_and_the_same_every_time(what):
    first, second = invoke("schema", what), invoke("schema", what)
    document = json.loads(first.stdout)
    jsonschema.Draft202012Validator.check_schema(document)
    assert first.stdout == second.stdout


def test_the_printed_schema_accepts_records_and_refuses_other_things():
    validator = jsonschema.Draft202012Validator(json.loads(invoke("schema").stdout))
    record = json.loads(dumps(load(GOLDEN / "synthetic-int8.json")))
    assert validator.is_valid(record)
    assert not validator.is_valid({**record, "status": "perhaps"})
    del record["spec"]
    assert not validator.is_valid(record)


def test_a_table_needs_no_torch():
    code = (
        "import sys\n"
        "from compresskit.cli import schema, table\n"
        "from compresskit.report import csv, document, join, markdown, reading, table, terminal\n"
        "heavy = {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_a_command_imports_nothing_but_typer():
    code = (
        "import sys, compresskit.cli.table, compresskit.cli.schema\n"
        "sys.exit(', '.join({'pydantic', 'numpy'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
