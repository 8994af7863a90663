"""`compresskit export --model`: the folder as a user makes it, uses it, and is told off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from compresskit.cli.app import app
from compresskit.errors import CompressKitError, Conflict, Exit, UsageError

RECORDS = Path(__file__).parents[1] / "golden" / "records" / "v2"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def done(*words: str) -> Result:
    result = invoke(*words)
    assert result.exit_code == Exit.DONE, result.output + repr(result.exception)
    return result


def told_off(*words: str) -> CompressKitError:
    result = invoke(*words)
    assert isinstance(result.exception, CompressKitError), repr(result.exception)
    assert result.stdout == ""
    return result.exception


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny-w4a16"
    told = done(
        "export", "-m", "tiny", "--method", "quant/int4:symmetric=true,head=false",
        "--evaluate", "--out", str(out),
    ).stdout  # fmt: skip
    assert "vLLM: supported scheme CompressedTensorsWNA16" in told
    assert "28 x W4A16 (group 64, symmetric)" in told
    assert "left dense   1: lm_head" in told
    return out


def test_the_folder_is_complete_and_has_a_measured_card(folder: Path) -> None:
    source = {"chat_template.jinja", "generation_config.json", "tokenizer.json"}
    assert source | {"config.json", "model.safetensors", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    card = (folder / "README.md").read_text()
    assert "KL from the dense model" in card and "Not measured" not in card
    assert "quant/int4" in card and "Apache-2.0" in card


def test_the_folder_is_a_model_for_the_other_commands(folder: Path) -> None:
    told = done("generate", "-m", str(folder), "--prompt", "Once upon a time", "--json",
                "--max-new-tokens", "8").stdout  # fmt: skip
    answer = json.loads(told)
    assert answer["new_tokens"] == 8
    assert list(answer["kernels"]) == ["grouped_matmul"]
    told = done("evaluate", "-m", str(folder), "--tokens", "64", "--greedy-prompts", "0",
                "--protocol", "window", "--json").stdout  # fmt: skip
    assert json.loads(told)["quality"]["likelihood"]["scored_tokens"] > 0


def test_json_is_one_document(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = done("export", "-m", "tiny", "--method", "quant/int8", "--out", str(out), "--json",
                "--records", str(RECORDS)).stdout  # fmt: skip
    document: dict[str, Any] = json.loads(told)
    assert document["format"] == "pack-quantized"
    assert document["vllm"]["supported"]
    assert document["records_matched"] is False and not document["measured"]
    assert document["files"].keys() == {path.name for path in out.iterdir()}
    assert 8 < document["effective_bits_per_parameter"] < 12


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    error = told_off("export", "-m", "tiny", "--method", "quant/int8", "--out", str(folder))
    assert "not overwritten" in str(error)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to export"),
        (("results",), "--to is missing"),
        (("results", "--to", "vllm", "--method", "quant/int8"), "give --model too"),
        (("--evaluate", "results", "--to", "vllm"), "--evaluate belongs"),
        (("-m", "tiny", "results", "--method", "quant/int8", "--out", "x"), "neither RESULTS"),
        (("-m", "tiny", "--to", "vllm"), "nor --to"),
        (("-m", "tiny", "--out", "x"), "--method"),
        (("-m", "tiny", "--method", "quant/int8"), "--out DIR"),
    ],
)
def test_mixed_requests_are_explained(words: tuple[str, ...], said: str) -> None:
    error = told_off("export", *words)
    assert isinstance(error, UsageError)
    assert said in str(error)


@pytest.mark.parametrize(
    ("method", "said"),
    [("quant/int4", "zero_point=integer"), ("kv/int8", "acts while the model runs")],
)
def test_what_has_no_form_leaves_no_folder(method: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    error = told_off("export", "-m", "tiny", "--method", method, "--out", str(out))
    assert isinstance(error, Conflict)
    assert said in str(error)
    assert not out.exists()


def test_records_are_exported_as_before() -> None:
    told = done("export", str(RECORDS / "synthetic-int8.json"), "--to", "llama-bench").stdout
    assert json.loads(told.splitlines()[0])


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "compresskit", "export", "--model", "tiny", "--to", "vllm"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == Exit.USAGE
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr
