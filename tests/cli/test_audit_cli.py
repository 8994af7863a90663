"""`compresskit audit` as a user meets it."""

from __future__ import annotations

import json

import jsonschema
import pytest
from typer.testing import CliRunner

from compresskit import catalogue, runner, store
from compresskit.audit.document import Audit
from compresskit.cli.app import app
from compresskit.errors import Exit
from compresskit.spec import ProtocolSpec, RunSpec, WorkloadSpec

QUICK = ("--prompts", "4", "--draws", "200", "--detect", "0.3")
NGRAM = ("--method", "speculative/ngram:draft=4")


def call(*words: str):
    return CliRunner().invoke(app, ["audit", *words])


def test_a_sound_loop_is_lossless_and_the_document_is_kept(tmp_path):
    done = call(*NGRAM, *QUICK, "--batch", "2", "--top-p", "0.9", "--out", str(tmp_path), "--json")
    assert done.exit_code == Exit.DONE, done.output
    printed = Audit.model_validate_json(done.stdout)
    assert printed.verdict == "lossless"
    assert printed.asked.sampling.top_p == 0.9
    assert printed.rule is not None
    (file,) = tmp_path.iterdir()
    assert file.name == "speculative-ngram-draft=4-t1-p0.9-b2.audit.json"
    assert Audit.model_validate_json(file.read_text()) == printed
    schema = CliRunner().invoke(app, ["schema", "audit"])
    jsonschema.validate(json.loads(done.stdout), json.loads(schema.stdout))


def test_a_lossy_loop_fails_and_says_why():
    done = call("--method", "speculative/ngram:draft=4,accept=typical", *QUICK)
    assert done.exit_code == Exit.FAILED
    assert "lossy" in done.stdout
    assert "chi-square" in done.stdout
    assert "not checked: rule" in done.stdout


def test_too_few_draws_are_inconclusive():
    done = call(*NGRAM, "--prompts", "2", "--draws", "30")
    assert done.exit_code == Exit.INVALID
    assert "inconclusive" in done.stdout
    assert "Draw more" in done.stdout


def test_greedy_alone():
    done = call(*NGRAM, "--prompts", "3", "--temperature", "0", "--json")
    assert done.exit_code == Exit.DONE
    found = json.loads(done.stdout)
    assert found["sampled"] is None
    assert found["greedy"]["equal"] == found["greedy"]["prompts"] == 3
    assert any("draws nothing" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "this stack has none"),
        (("--method", "quant/int8"), "this stack has none"),
        ((*NGRAM, "--method", "kv/sink_window"), "rollback"),
    ],
)
def test_what_cannot_be_audited_is_one_error(words, said):
    done = call(*words)
    assert done.exit_code != 0
    assert said in f"{done.output}{done.exception}"


def test_the_verdict_goes_into_a_record_of_the_same_stack(tmp_path):
    spec = RunSpec(
        device="auto",
        stack=(catalogue.parse_method(NGRAM[1]),),
        protocol=ProtocolSpec(passes=("latency",), warmups=0, repeats=1),
        workload=WorkloadSpec(prompt_tokens=16, new_tokens=4),
    )
    path = store.save(runner.run(spec), tmp_path)
    before = store.load(path)
    done = call(*NGRAM, *QUICK, "--record", str(path))
    assert done.exit_code == Exit.DONE, f"{done.output}{done.exception}"
    after = store.load(path)
    assert after.facts["audit"]["verdict"] == "lossless"
    assert after.facts["audit"]["draws"] == 200
    assert after.model_copy(update={"facts": before.facts}) == before
    # Another stack's record is left alone.
    other = call("--method", "speculative/ngram:draft=3", *QUICK, "--record", str(path))
    assert "another stack" in f"{other.output}{other.exception}"
    assert store.load(path) == after
