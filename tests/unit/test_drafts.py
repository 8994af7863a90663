"""Replay of recorded answers: the counts of the real loop, exactly; figures under vLLM's names."""

from __future__ import annotations

import itertools
import json

import pytest

from compresskit import catalogue
from compresskit.drafts import play, report, trace
from compresskit.drafts.counts import Steps, total
from compresskit.drafts.trace import Entry
from compresskit.errors import InputError, UsageError
from compresskit.methods.speculative.ngram import NGram
from compresskit.methods.speculative.suffix import Suffix

GRIDS = {
    NGram: {"draft": [1, 3, 8], "max_match": [1, 3], "match": ["last", "first"]},
    Suffix: {
        "draft": [1, 8],
        "min_match": [1, 2],
        "factor": [0.5, 4.0],
        "min_probability": [0.0, 0.6],
        "shared": [False, True],
    },
}
CASES = [
    method(**dict(zip(grid, values, strict=True)))
    for method, grid in GRIDS.items()
    for values in itertools.product(*grid.values())
] + [method(length="adaptive", costs="flat") for method in GRIDS]


@pytest.fixture(scope="module")
def asked(lab):
    """Requests of a model, some ended by a stop token, with their answers."""
    system = lab.system("qwen2")
    found = []
    for seed, place in enumerate([None, 5, 17, None]):
        prompt = lab.prompt(10, seed=seed).repeat(1, 2 + seed % 2)
        request = lab.request(prompt, 30)
        (answer,) = lab.rows(system.generate(request))
        if place is not None:
            request = lab.request(prompt, 30, stop=(answer[place],))
            (answer,) = lab.rows(system.generate(request))
        found.append((request, Entry(tuple(prompt[0].tolist()), tuple(answer), 30)))
    return system, found


@pytest.mark.parametrize("method", CASES, ids=lambda method: repr(method.model_dump()))
def test_a_replay_counts_what_the_model_counted(asked, method):
    system, found = asked
    applied = method.apply(system, None)
    real = []
    for request, entry in found:
        chunks = list(applied.generate(request))
        assert [t for chunk in chunks for t in chunk.tokens[0].tolist()] == list(entry.answer)
        real.append(Steps(len(entry.answer), tuple(chunk.drafts[0] for chunk in chunks[1:])))
    assert play.play(method, [entry for _, entry in found]) == real


def test_the_grid_tries_something(asked):
    """Another drafter has other counts, so equality above says something."""
    entries = [entry for _, entry in asked[1]]
    played = [play.play(method, entries) for method in CASES]
    assert len(set(map(str, played))) > 10
    assert sum(accepted for steps in played[-1] for _, accepted in steps.drafts) > 0


def test_another_answer_has_other_counts(asked):
    entries = [entry for _, entry in asked[1]]
    method = NGram()
    changed = [
        Entry(entry.prompt, (*entry.answer[:-9], 299, *entry.answer[-8:]), entry.max_new_tokens)
        for entry in entries[:1]
    ]
    assert play.play(method, changed) != play.play(method, entries[:1])


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("speculative/token_recycling", "the model's logits"),
        ("speculative/oracle", "a verdict of its own"),
        ("speculative/ngram:accept=typical", "how likely a draft is"),
        ("quant/int8", "drafts nothing"),
    ],
)
def test_what_cannot_be_replayed_says_why(method, told):
    (placed,) = catalogue.place([catalogue.parse_method(method)])
    with pytest.raises(UsageError, match=told):
        play.check(placed)


def test_what_can_be_replayed_is_passed_on():
    (placed,) = catalogue.place([catalogue.parse_method("speculative/suffix:draft=3")])
    assert play.check(placed) == Suffix(draft=3)


def test_a_method_that_times_the_model_is_refused(asked):
    with pytest.raises(UsageError, match="times the model's step"):
        play.play(NGram(length="adaptive"), [entry for _, entry in asked[1]])


# Figures


def steps_of(*pairs):
    return Steps(1 + sum(accepted + 1 for _, accepted in pairs), pairs)


def test_published_figures():
    """43 steps of 3 drafted tokens: vLLM's example."""
    pairs = [(3, n) for n, times in enumerate([39, 1, 0, 3]) for _ in range(times)]
    found = total([steps_of(*pairs)], draft=3)
    assert found["acceptance_histogram"] == [39, 1, 0, 3]
    assert (found["num_spec_steps"], found["num_draft_tokens"]) == (43, 129)
    assert found["num_accepted_draft_tokens"] == 10
    assert found["mean_acceptance_length"] == 1.2325581395348837
    assert found["draft_acceptance_rate"] == 0.07751937984496124
    assert found["accepted_per_pos"] == [4, 3, 3]


def test_steps_without_a_draft_are_passes_only():
    found = total([steps_of((3, 2), (0, 0), (3, 0))], draft=3)
    assert (found["num_spec_steps"], found["num_verify_forwards"]) == (2, 3)
    assert found["mean_acceptance_length"] == 2.0
    assert found["draft_acceptance_rate"] == pytest.approx(1 / 3)
    assert found["acceptance_histogram"] == [1, 0, 1, 0]
    assert found["tokens_per_verify_forward"] == pytest.approx(5 / 3)
    assert found["per_step_drafted"] == [3, 3]
    assert found["per_step_accepted"] == [2, 0]


def test_three_rates_by_position():
    found = total([Steps(6, ((2, 2), (1, 0), (0, 0)))], draft=2)
    assert found["acceptance_rate_per_pos_offered"] == [0.5, 1.0]
    found = total([Steps(9, ((2, 2), (2, 1), (2, 0), (1, 1)))], draft=3)
    assert found["accepted_per_pos"] == [3, 1, 0]
    assert found["acceptance_rate_per_pos_unconditional"] == [0.75, 0.25, 0.0]
    assert found["acceptance_rate_per_pos_offered"] == [0.75, 1 / 3, None]
    assert found["acceptance_rate_per_pos_conditional"] == [0.75, 0.5, None]


def test_rates_of_nothing_are_null():
    found = total([Steps(1, ())], draft=2)
    assert found["mean_acceptance_length"] is None
    assert found["draft_acceptance_rate"] is None
    assert found["tokens_per_verify_forward"] is None
    assert found["acceptance_histogram"] == [0, 0, 0]


def test_categories_add_up(asked):
    entries = [
        Entry(e.prompt, e.answer, 30, category=name)
        for (_, e), name in zip(asked[1], ("a", "b", "a", "\x1b[2J"), strict=True)
    ]
    played = [report.Played("ngram", "speculative/ngram", 8, play.play(NGram(), entries))]
    found = report.document(entries, played, source="here")
    (row,) = found["methods"]
    assert list(row["by_category"]) == ["a", "b", "\x1b[2J"]
    for key in ("num_requests", "num_draft_tokens", "num_accepted_draft_tokens", "num_spec_steps"):
        assert sum(part[key] for part in row["by_category"].values()) == row[key] > 0
    json.dumps(found, allow_nan=False)
    printed = "\n".join(report.lines(found))
    assert "\x1b" not in printed
    assert "ngram" in printed


# The file


def line(**changes):
    return json.dumps({"prompt": [1, 2], "answer": [3, 4], **changes})


def test_a_trace_survives_writing_and_reading(tmp_path):
    path = tmp_path / "trace.jsonl"
    entries = (
        Entry((1, 2), (3,), 8, "qa", "tiny", "ab" * 32),
        Entry((5,), (6, 7), 2),
    )
    trace.save(path, entries)
    assert trace.load(path) == entries


def test_the_limit_defaults_to_the_length(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(line() + "\n\n")
    assert trace.load(path) == (Entry((1, 2), (3, 4), 2),)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"answer": [1]}', "'prompt' is missing"),
        ('{"prompt": [1]}', "'answer' is missing"),
        (line(prompt=[]), "'prompt' must be a list of token ids, at least one"),
        (line(prompt="text"), "'prompt' must be a list of token ids"),
        (line(answer=[1, -2]), "'answer' holds -2"),
        (line(answer=[True]), "'answer' holds True"),
        (line(max_new_tokens=1), "from 2 on"),
        (line(max_new_tokens=2.0), "from 2 on"),
        (line(answer=[4, 3, 4], max_new_tokens=9), "is in it before"),
        (line(category=3), "'category' must be text"),
        (line(tokenizer_sha256="other"), "its tokenizer is another"),
        (line(extra=1), "unknown key 'extra'"),
        ("[" * 100_000, "nested too deeply"),
        ("\x80", "not UTF-8"),
    ],
    ids=itertools.count(),
)
def test_a_bad_line_is_named(tmp_path, bad, told):
    path = tmp_path / "trace.jsonl"
    good = line(tokenizer_sha256="one")
    path.write_bytes(f"{good}\n\n{bad}\n".encode("latin-1"))
    with pytest.raises(InputError) as caught:
        trace.load(path)
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert told in message
    assert "--record" in message


def test_files_without_answers_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        trace.load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no answer"):
        trace.load(tmp_path / "empty.jsonl")
