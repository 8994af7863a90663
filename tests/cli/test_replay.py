"""`compresskit replay`: traces made, read and refused; the report against what was asked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer import Typer
from typer.testing import CliRunner

from compresskit.cli.replay import replay
from compresskit.errors import CompressKitError, Conflict, InputError, SpecError, UsageError
from compresskit.replay import make, report, trace
from compresskit.replay.play import Turn

app = Typer()
app.command()(replay)


@app.command()
def other() -> None:
    """A second command: typer then keeps the first one's name."""


def invoke(*words: str):
    return CliRunner().invoke(app, ["replay", *words])


def refusal(*words: str) -> CompressKitError:
    done = invoke(*words)
    assert isinstance(done.exception, CompressKitError), done.output
    assert done.stdout == ""
    return done.exception


@pytest.fixture
def few(tmp_path):
    """Eight prompts of which the first 60 words are the same."""
    path = tmp_path / "few.jsonl"
    done = invoke(
        *("--make", "few_shot", "--out", str(path), "--requests", "8"),
        *("--shared", "60", "--own", "6", "--new-tokens", "3"),
    )
    assert done.exit_code == 0, done.output
    return path


def test_help_has_examples():
    assert "compresskit replay --make few_shot" in invoke("--help").stdout


@pytest.mark.parametrize("store", ["block", "radix"])
def test_a_trace_is_replayed_and_accounted_for(few, store):
    done = invoke(str(few), "--store", store, "--capacity", "4MB", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["format"] == report.FORMAT
    counted, turns = found["statistics"], found["turns"]
    assert found["requests"] == counted["lookups"] == len(turns) == 8
    # The first prompt misses, all later ones hit.
    assert [turn["hit_tokens"] > 0 for turn in turns] == [False] + 7 * [True]
    assert counted["hit_tokens"] == sum(turn["hit_tokens"] for turn in turns)
    assert counted["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in turns)
    assert counted["hit_ratio"] == counted["hit_tokens"] / counted["prompt_tokens"] > 0.5
    assert found["answers"] == {"compared": 8, "identical": 8}
    sizes = found["store"]
    assert counted["stored_bytes"] == counted["stored_tokens"] * sizes["bytes_per_token"]
    assert counted["stored_bytes"] <= sizes["bytes"] <= 4_000_000
    assert found["ttft"]["hit"]["requests"] == 7
    assert found["ttft"]["hit"]["speedup"] > 0
    assert (sizes["tokens_per_slot"] == 1) == (store == "radix")


def test_without_comparison_and_for_people(few):
    done = invoke(str(few), "--no-compare", "--method", "kv/int8")
    assert done.exit_code == 0, done.output
    assert "kv/int8 + reuse/prefix_block on tiny" in done.stdout
    assert "hit ratio" in done.stdout
    assert "without the store" not in done.stdout
    assert "identical" not in done.stdout


def test_bad_lines_are_named_or_counted(few):
    good = few.read_text(encoding="utf-8")
    few.write_text(good + '{"prompt": "half a li\n', encoding="utf-8")
    error = refusal(str(few))
    assert isinstance(error, InputError)
    assert f"{few}, line 9: not JSON" in str(error)
    done = invoke(str(few), "--skip-bad", "--no-compare", "--json")
    found = json.loads(done.stdout)
    assert found["requests"] == 8
    assert [line.startswith(f"{few}, line 9: ") for line in found["skipped_lines"]] == [True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('["a"]', "not a JSON object"),
        ('{"prompt": "a"}', "'new_tokens' is missing"),
        ('{"new_tokens": 1}', "'prompt' is missing"),
        ('{"prompt": "", "new_tokens": 1}', "the prompt is empty"),
        ('{"prompt": [], "new_tokens": 1}', "the prompt is empty"),
        ('{"prompt": [1, -2], "new_tokens": 1}', "'prompt' holds -2"),
        ('{"prompt": [1, true], "new_tokens": 1}', "'prompt' holds True"),
        ('{"prompt": 5, "new_tokens": 1}', "neither text nor a list"),
        ('{"prompt": "\\ud800", "new_tokens": 1}', "half a character"),
        ('{"prompt": "a", "new_tokens": 0}', "'new_tokens' must be"),
        ('{"prompt": "a", "new_tokens": "2"}', "'new_tokens' must be"),
        ('{"prompt": "a", "new_tokens": 1, "salt": 3}', "'salt' must be text"),
        ('{"prompt": "a", "new_tokens": 1, "at": NaN}', "'at' must be a number"),
        ('{"prompt": "a", "new_tokens": 1, "at": 1}', "'at' goes back from 2.0 to 1"),
        ('{"prompt": "a", "new_tokens": 1, "slat": "b"}', "unknown key 'slat'"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path, line, reason):
    path = tmp_path / "t.jsonl"
    first = '{"prompt": "ok", "new_tokens": 1, "at": 2}'
    path.write_text(f"{first}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        trace.load(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert reason in str(caught.value)
    kept = trace.load(path, skip_bad=True)
    assert [entry.prompt for entry in kept.entries] == ["ok"]
    assert len(kept.skipped) == 1


def test_a_trace_that_is_no_text_or_not_there_or_empty(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "new_tokens": 1}\n')
    with pytest.raises(InputError, match="line 1: not UTF-8 at byte 12"):
        trace.load(path)
    with pytest.raises(InputError, match=r"holds no request .1 bad"):
        trace.load(path, skip_bad=True)
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        trace.load(tmp_path / "none.jsonl")


def test_a_trace_survives_being_written(tmp_path):
    entries = [
        trace.Entry("Grüße\n\u2028", 3, salt="a", at=0.5),
        trace.Entry((1, 2, 3), 1),
    ]
    trace.save(tmp_path / "t.jsonl", entries)
    read = trace.load(tmp_path / "t.jsonl").entries
    assert [entry.document() for entry in read] == [entry.document() for entry in entries]
    assert [entry.line for entry in read] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": [5, 999999], "new_tokens": 1}', "line 2: token 999999 is not in"),
        ('{"prompt": "a", "new_tokens": 999999}', "line 2: prompt of .* context"),
    ],
)
def test_requests_that_do_not_fit_the_model_stop_everything(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "ok", "new_tokens": 1}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        raise refusal(str(path))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ((), UsageError, "give a trace"),
        (("--make", "chat"), UsageError, "--out FILE"),
        (("TRACE", "--out", "x"), UsageError, "--out is for --make"),
        (("TRACE", "--capacity", "lots"), UsageError, "--capacity: 'lots' is no number of bytes"),
        (("TRACE", "--capacity", "1kB"), SpecError, "one block of 16 tokens"),
        (("TRACE", "--host-capacity", "1MB", "--device", "cpu"), Conflict, "host_capacity"),
        (("TRACE", "--store", "radix", "--host-capacity", "1MB"), UsageError, "one tier only"),
        (("TRACE", "--method", "kv/sink_window"), Conflict, "'own_cache'|'full_context'"),
    ],
)
def test_bad_input_is_one_error(few, words, kind, message):
    error = refusal(*(str(few) if word == "TRACE" else word for word in words))
    assert isinstance(error, kind)
    with pytest.raises(kind, match=message):
        raise error


@pytest.mark.parametrize("kind", ["chat", "few_shot", "agent"])
def test_made_traces_share_what_they_say(kind):
    shape = make.Shape(requests=9, shared=20, own=5, groups=3)
    entries = make.make(kind, shape, seed=1)
    prompts = [str(entry.prompt) for entry in entries]
    assert len(prompts) == len(set(prompts)) == 9
    head = " ".join(prompts[0].split()[:20])
    assert all(prompt.startswith(head) for prompt in prompts)
    # A few-shot prompt continues none of the others; turns of a chat and steps of an agent do.
    longer = sum(
        any(b != a and b.startswith(a) for a in prompts[:place]) for place, b in enumerate(prompts)
    )
    assert longer == (0 if kind == "few_shot" else 6)
    assert make.make(kind, shape, seed=1) == entries
    assert make.make(kind, shape, seed=2) != entries


def test_a_trace_longer_than_the_text_is_refused():
    with pytest.raises(InputError, match="too few for this trace"):
        make.make("few_shot", make.Shape(requests=10, own=10**6))
    with pytest.raises(InputError, match="9 groups cannot share 3 requests"):
        make.make("chat", make.Shape(requests=3, groups=9))


def test_times_are_compared_request_by_request():
    """Two hits, 4 and 9 times as fast, are together the geometric mean, 6 times."""
    turns = [
        Turn(1, 100, 90, 1e-5, 1.0, 4.0, True),
        Turn(2, 100, 90, 1e-5, 3.0, 27.0, True),
        Turn(3, 100, 0, 1e-5, 2.0, 1.0, False),
    ]
    hit = report._side(turns[:2], "")
    assert hit["speedup"] == pytest.approx(6.0)
    assert hit["seconds_median"] == 2.0
    assert report._side(turns[2:], "")["speedup"] == pytest.approx(0.5)
    assert report._side([], "none")["unavailable"] == "none"
    alone = [Turn(1, 100, 90, 1e-5, 1.0, None, None)]
    assert report._side(alone, "")["speedup"] is None


def test_the_command_is_registered_and_a_bad_line_exits_with_two(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("nonsense\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "compresskit", "replay", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}, line 1: not JSON")
    assert done.stdout == ""
