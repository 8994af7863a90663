"""`compresskit sensitivity`: the table, the document, the picture and the suite that it suggests."""

from __future__ import annotations

import io
import json
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from compresskit import suite
from compresskit.cli.memory import memory
from compresskit.cli.sensitivity import sensitivity
from compresskit.errors import CompressKitError, SpecError, UsageError
from compresskit.report import sensitivity as report
from compresskit.report.plot import sensitivity as picture

QUICK = ("--granularity", "kind", "--choices", "2,4,8", "--samples", "2", "--length", "16")
app = Typer()
app.command()(sensitivity)
app.command()(memory)


def invoke(*words: str):
    return CliRunner().invoke(app, ["sensitivity", *words])


DOCUMENT = {
    "model": "m", "choices": [2, 4], "budget_bits": 4.0, "reached_bits": 3.9, "tokens": 32,
    "text": "calibration", "predicted_kl_nats": 0.25, "measured_kl_nats": 0.3,
    "parts": [
        {"part": "model.layers.0.mlp", "layers": 3, "parameters": 10, "bits": 4,
         "kl_nats": {"2": 1.0, "4": 0.05}},
        {"part": "lm_head", "layers": 1, "parameters": 10, "bits": 2,
         "kl_nats": {"2": 0.2, "4": 0.0}},
    ],
}  # fmt: skip


def test_the_whole_command_on_the_tiny_model(tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke("--budget", "4.6", "--out", str(tmp_path), *QUICK)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "sensitivity.json").read_text(encoding="utf-8"))
    assert found["format"] == report.FORMAT
    assert [part["part"] for part in found["parts"]][-1] == "lm_head"
    assert len(found["parts"]) == 8
    assert found["reached_bits"] <= 4.6
    for part in found["parts"]:
        losses = list(part["kl_nats"].values())
        assert losses[0] > losses[1] > losses[2] > 0
    assert (tmp_path / "sensitivity.svg").read_text(encoding="utf-8").startswith("<?xml")
    # What is printed and written can be pasted into a suite.
    pasted = tmp_path / "pasted.toml"
    pasted.write_text('model = "tiny"\n' + found["variant"], encoding="utf-8")
    (run,) = [spec for spec in suite.resolve(suite.read(pasted)) if spec.stack]
    widths = {part["bits"] for part in found["parts"]}
    given = {int(layer.rpartition("=")[2]) for layer in run.stack[0].params["layers"]}
    assert given | {run.stack[0].params["bits"]} == widths
    assert found["variant"] in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--choices", "wide"), "list widths of 2 to 8 bits"),
        (("--choices", "2,9"), "choices"),
        (("--budget", "1"), "budget"),
        (("--budget", "2.2", *QUICK), "Raise the budget"),
        (("--text", "embedded"), "quality is measured on"),
    ],
)
def test_bad_input_is_one_error(words, message):
    done = invoke(*words)
    assert isinstance(done.exception, CompressKitError)
    assert message in str(done.exception)
    assert done.stdout == ""
    if message != "Raise the budget":
        assert isinstance(done.exception, SpecError)


def test_without_matplotlib_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke("--out", str(tmp_path), *QUICK)
    assert isinstance(done.exception, UsageError)
    assert "pip install matplotlib" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_parts_widths_and_what_was_chosen(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    picture.draw(DOCUMENT, path)
    text = path.read_text(encoding="utf-8")
    for words in ("0.mlp", "lm_head", "2 bits", "4 bits", "chosen", "nats per token"):
        assert words in text
    first = path.read_bytes()
    picture.draw(DOCUMENT, path)
    assert path.read_bytes() == first


def test_no_number_is_cut_on_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=20)
    report.render(DOCUMENT, console)
    printed = console.file.getvalue()
    for words in ("1.00", "[0.0500]", "[0.200]", "lm_head", "model.layers.*"):
        assert words in printed


def test_a_variant_without_overrides_is_one_line():
    text = report.suite_variant({"bits": 4, "group": 32, "layers": []})
    (variant,) = tomllib.loads(text)["variant"]
    assert variant["stack"] == [{"name": "quant/intn", "bits": 4, "group": 32}]
    assert text.count("\n") == 2


def test_records_without_an_audit_say_so():
    records = Path(__file__).parents[1] / "golden" / "records" / "v2"
    done = CliRunner().invoke(app, ["memory", str(records), "--modules"])
    assert done.exit_code == 0, done.output
    assert "no audit" in done.stdout
    done = CliRunner().invoke(app, ["memory", str(records), "--modules", "--json"])
    assert json.loads(done.stdout)["records"][0]["audit"] == []
