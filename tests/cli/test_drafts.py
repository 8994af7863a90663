"""`compresskit drafts`: recorded, replayed, and refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer import Typer
from typer.testing import CliRunner

from compresskit.cli.drafts import drafts
from compresskit.errors import CompressKitError, Conflict, InputError, UsageError

app = Typer()
app.command()(drafts)


@app.command()
def other() -> None:
    """A second command: typer then keeps the first one's name."""


def invoke(*words: str):
    return CliRunner().invoke(app, ["drafts", *words])


def refusal(*words: str) -> CompressKitError:
    done = invoke(*words)
    assert isinstance(done.exception, CompressKitError), done.output
    assert done.stdout == ""
    return done.exception


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("drafts") / "trace.jsonl"
    done = invoke(
        *("--record", str(path), "--requests", "3", "--prompt-tokens", "40"),
        *("--new-tokens", "50", "--ignore-stop", "--json"),
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["requests"] == 3
    return path


def test_a_recorded_trace_holds_what_it_needs(recorded):
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [len(line["prompt"]) for line in lines] == [40] * 3
    assert [len(line["answer"]) for line in lines] == [50] * 3
    assert {line["model"] for line in lines} == {"tiny"}
    assert all(len(line["tokenizer_sha256"]) == 64 for line in lines)


def test_a_replay_equals_the_run_it_stands_for(recorded, open_stack):
    from compresskit.spec import SamplingSpec
    from compresskit.system import Request

    method = "speculative/suffix:factor=3"
    done = invoke(str(recorded), "--method", method, "--method", "speculative/ngram", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["format"] == "compresskit-drafts-1"
    assert found["models"] == ["tiny"]
    assert [row["name"] for row in found["methods"]] == [method, "speculative/ngram"]
    first = found["methods"][0]
    drafted, accepted = [], []
    import torch

    with open_stack(method) as opened:
        for line in recorded.read_text().splitlines():
            tokens = torch.tensor([json.loads(line)["prompt"]])
            request = Request(tokens, 50, SamplingSpec())
            for chunk in opened.system.generate(request):
                if chunk.drafted:
                    drafted.append(chunk.drafted)
                    accepted.append(chunk.accepted)
    assert first["per_step_drafted"] == drafted
    assert first["per_step_accepted"] == accepted
    assert first["num_generated_tokens"] == 150


def test_for_people(recorded):
    done = invoke(str(recorded), "--method", "speculative/ngram:draft=2")
    assert done.exit_code == 0, done.output
    assert "speculative/ngram:draft=2" in done.stdout
    assert "no time is measured" in done.stdout


def test_prompts_of_a_file_keep_their_category(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "trace.jsonl"
    prompts.write_text('{"prompt": "One, two", "category": "count"}\n\n{"prompt": "The cat"}\n')
    done = invoke("--record", str(out), "--prompts", str(prompts), "--new-tokens", "4")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("category") for line in lines] == ["count", None]
    assert all(line["max_new_tokens"] == 4 for line in lines)
    prompts.write_text('{"prompt": "One"}\n{"prompt": ""}\n')
    error = refusal("--record", str(out), "--prompts", str(prompts))
    assert isinstance(error, InputError)
    assert f"{prompts}, line 2" in str(error)


def test_each_text_is_a_category(tmp_path):
    out = tmp_path / "trace.jsonl"
    done = invoke(
        *("--record", str(out), "--text", "embedded", "--text", "calibration"),
        *("--requests", "2", "--prompt-tokens", "20", "--new-tokens", "4"),
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["category"] for line in lines] == 2 * ["embedded"] + 2 * ["calibration"]
    shown = invoke(str(out), "--method", "speculative/suffix").stdout
    assert "embedded" in shown
    assert "calibration" in shown


def test_bad_requests_are_refused(recorded, tmp_path):
    assert isinstance(refusal(), UsageError)
    assert isinstance(refusal(str(recorded)), UsageError)
    assert isinstance(refusal(str(recorded), "--record", "x.jsonl"), UsageError)
    error = refusal(str(recorded), "--method", "speculative/token_recycling")
    assert "cannot be replayed" in str(error)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    assert "line 1" in str(refusal(str(broken), "--method", "speculative/ngram"))
    error = refusal("--record", str(tmp_path / "x.jsonl"), "--method", "speculative/oracle")
    assert isinstance(error, Conflict)
    assert "synthetic acceptance" in str(error)


def test_a_bad_line_is_told_before_torch_is_loaded(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n")
    code = (
        "import sys\n"
        "from compresskit.cli.app import main\n"
        f"sys.argv = ['compresskit', 'drafts', {str(path)!r}, '--method', 'speculative/ngram']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 2, done.code\n"
        "sys.exit(int('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "line 1" in done.stderr
