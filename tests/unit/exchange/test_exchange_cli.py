"""`compresskit export` and `compresskit import`, through typer."""

from __future__ import annotations

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from compresskit.cli.export import Target, export
from compresskit.cli.import_ import Origin, import_
from compresskit.errors import Exit, Incomparable, RecordError, UsageError
from compresskit.exchange import formats

from .conftest import FOREIGN, RECORDS

app = typer.Typer()
app.command("export")(export)
app.command("import")(import_)


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_knows_every_format():
    assert [one.value for one in Target] == list(formats.EXPORTERS)
    assert [one.value for one in Origin] == list(formats.IMPORTERS)


def test_export_to_stdout_is_nothing_but_the_export():
    result = invoke("export", RECORDS, "--to", "llama-bench")
    assert result.exit_code == Exit.DONE
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["n_gen"] for line in lines} == {0, 15}
    assert "is INVALID" in result.stderr
    assert "was skipped" in result.stderr


def test_export_to_a_file(tmp_path):
    result = invoke("export", RECORDS, "--to", "vllm", "--out", tmp_path / "v.jsonl")
    assert result.stdout == ""
    assert (tmp_path / "v.jsonl").read_text().count("\n") == 7


def test_a_format_of_one_run_wants_a_folder(tmp_path):
    refused = invoke("export", RECORDS, "--to", "optimum-benchmark")
    assert isinstance(refused.exception, UsageError)
    assert "holds one run and here are 4" in str(refused.exception)
    invoke("export", RECORDS, "--to", "optimum-benchmark", "--out", tmp_path)
    assert len(list(tmp_path.rglob("benchmark_report.json"))) == 4
    one = invoke("export", RECORDS / "synthetic-dense.json", "--to", "optimum-benchmark")
    assert json.loads(one.stdout)["decode"]["throughput"]["unit"] == "tokens/s"


def test_export_of_invalid_results_has_their_exit_code():
    result = invoke("export", RECORDS / "synthetic-short.json", "--to", "vllm")
    assert isinstance(result.exception, Incomparable)
    assert result.exception.exit_code == Exit.INVALID


def test_import_writes_peers_and_says_so(tmp_path):
    result = invoke(
        "import", FOREIGN / "mlperf-interactive.txt", "--from", "mlperf", "--out", tmp_path,
        "--model", "llama2-70b", "--device", "8xMI300X",
    )  # fmt: skip
    assert result.exit_code == Exit.DONE
    assert result.stdout == ""
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert path.name == f"mlperf-{document['file']['sha256'][:12]}-0.peer.json"
    assert document["given"] == ["device", "model"]


def test_show_prints_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("import", FOREIGN / "vllm.json", "--from", "vllm", "--show", "-f", "md")
    assert result.stdout.startswith("**imported from vllm")
    assert list(tmp_path.iterdir()) == []


def test_import_without_a_place_goes_to_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("import", FOREIGN / "vllm.json", "--from", "vllm")
    assert len(list((tmp_path / "results" / "imported").glob("*.peer.json"))) == 1


def test_stored_peers_are_shown_again(tmp_path):
    invoke("import", FOREIGN / "lm-eval.json", "--from", "lm-eval", "--out", tmp_path)
    document = json.loads(invoke("import", tmp_path, "--json").stdout)
    assert len(document["imported"]) == 2
    assert "bits_per_byte" in document["definitions"]
    assert "bits_per_byte" in invoke("import", tmp_path, "-f", "csv").stdout
    assert "acc" in invoke("import", tmp_path, "--show").stdout


def test_one_bad_file_imports_nothing(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    result = invoke(
        "import", FOREIGN / "vllm.json", bad, "--from", "vllm", "--out", tmp_path / "out"
    )
    assert isinstance(result.exception, RecordError)
    assert not (tmp_path / "out").exists()


def test_files_without_a_tool_are_refused(tmp_path):
    shutil.copy(FOREIGN / "vllm.json", tmp_path)
    result = invoke("import", tmp_path / "vllm.json", "--show")
    assert isinstance(result.exception, UsageError)
    assert "--from" in str(result.exception)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_path_that_is_not_there_is_one_clear_error(tmp_path, command):
    option = ["--to", "vllm"] if command == "export" else []
    result = invoke(command, tmp_path / "none", *option)
    assert isinstance(result.exception, UsageError)
    assert "no such file or folder" in str(result.exception)
