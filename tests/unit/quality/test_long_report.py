"""Tasks in specs, tables and comparisons."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from compresskit import store, suite
from compresskit.cli import task_options
from compresskit.compare import compare
from compresskit.errors import SpecError
from compresskit.metrics.tasks import findings, overall
from compresskit.record import Quality, TaskAnswers, TaskQuality, TaskResult
from compresskit.report import csv as spreadsheet, document, join, markdown, table, tasks, terminal
from compresskit.spec import RunSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "records" / "v2"


def answers(*scores, length=3):
    return TaskAnswers(
        scores=scores,
        lengths=(length,) * len(scores),
        outputs_sha256=tuple(f"{score}/{length}" for score in scores),
    )


def result(task, ours, full, *, recut=None, removed=(0.0,) * 4, length=3):
    return TaskResult(
        task=task,
        prompt_tokens=(100,) * len(full),
        depths=(0.0, 0.5, 1.0, None),
        answers={"aware": answers(*ours, length=length)},
        reference={"aware": answers(*full), "agnostic": answers(*(recut or full))},
        controls={"removed": answers(*removed), "truncated_aware": answers(0.0, 0.0, 1.0, 1.0)},
    )


@pytest.fixture
def quality():
    return TaskQuality(
        protocol_id="tasks-plain/1",
        baseline_digest="0123456789ab",
        results=(
            result("niah_single", (1.0, 0.0, 0.0, 1.0), (1.0,) * 4, length=5),
            result("niah_multivalue", (0.75, 1.0, 1.0, 1.0), (1.0, 0.5, 1.0, 1.0)),
            result("common_words", (0.0,) * 4, (0.25, 0.0, 0.5, 0.25)),
            result("niah_multikey", (0.0,) * 4, (1.0,) * 4, removed=(1.0,) * 4),
        ),
    )


def test_findings_are_arithmetic_over_the_answers(quality):
    single, values, words, keys = findings(quality)
    assert (single.score, single.reference, single.delta.value) == (0.5, 1, -0.5)
    assert (single.lost, single.won, single.identical, single.length_delta) == (2, 0, 0, 2)
    assert single.delta.low < -0.5 < single.delta.high
    assert (values.lost, values.won, values.identical) == (1, 1, 2)
    assert values.delta.value == pytest.approx(1 / 16)
    assert (single.truncated, single.removed) == (0.5, 0)
    assert [one.standing for one in (single, values, words, keys)] == [
        "ok",
        "ok",
        "uninformative",
        "invalid",
    ]
    assert words.reason == "the full cache itself scores 25%"
    assert keys.reason == "the full cache scores 100% without the needles and 100% with them"


def test_mean_and_worst_leave_out_what_says_nothing(quality):
    found = overall(findings(quality), "aware")
    assert (found.tasks, found.worst.task) == (2, "niah_single")
    assert found.delta.value == pytest.approx((-0.5 + 1 / 16) / 2)
    assert found.delta.low < found.delta.value < found.delta.high
    # Controls of the same two tasks: 0 and 0.5 instead of 1 and 0.875.
    assert found.removed == pytest.approx((-1 - 0.875) / 2)
    assert found.truncated == pytest.approx((-0.5 - 0.375) / 2)
    assert (found.floor, found.prompts) == (0, 8)
    assert overall(findings(quality), "agnostic") is None


def test_a_loss_within_the_noise_floor_is_called_so():
    full = (1.0, 1.0, 1.0, 1.0)
    noisy = result("niah_single", (1.0, 0.0, 1.0, 1.0), full, recut=(0.0, 1.0, 1.0, 1.0))
    quiet = result("niah_single", (1.0, 0.0, 1.0, 1.0), full)
    for one, within in ((noisy, True), (quiet, False)):
        (found,) = findings(
            TaskQuality(protocol_id="x", baseline_digest="0123456789ab", results=(one,))
        )
        assert found.floor == within
        assert found.within_noise is within
        (line,) = [
            line
            for line in tasks.lines(
                TaskQuality(protocol_id="x", baseline_digest="0123456789ab", results=(one,))
            )
            if line.startswith("  niah")
        ]
        assert ("within the noise floor" in line) is within


def test_an_evaluation_says_everything_in_words(quality):
    text = "\n".join(tasks.lines(quality))
    assert "aware: mean Δ -21.9 [" in text
    assert "worst niah single -50.0 [" in text
    assert "2 lost, 0 won, answers +2.0 tokens" in text
    assert "newest tokens of equal bytes 50%" in text
    assert "UNINFORMATIVE: the full cache itself scores 25%" in text
    assert "INVALID: the full cache scores 100% without the needles" in text


def test_an_evaluation_in_which_no_task_means_anything_has_no_mean(quality):
    useless = quality.model_copy(update={"results": quality.results[2:]})
    text = "\n".join(tasks.lines(useless))
    assert "aware: n/a, no task means anything for this model" in text
    assert "mean Δ" not in text


# Specs and records


def test_a_run_without_tasks_is_the_run_it_always_was():
    """The field is not even written, so digests of stored runs stay what they were."""
    assert "tasks" not in RunSpec().model_dump_json()
    assert "tasks" not in Quality().model_dump_json()
    for path in sorted(GOLDEN.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert store.load(path).digest == stored["digest"]


def test_every_field_of_the_tasks_changes_the_digest():
    changes = {
        "names": ["niah_single"],
        "tokens": 640,
        "samples": 7,
        "depths": [0.3],
        "needles": 5,
        "questions": ["aware"],
        "style": "plain",
        "chat": True,
    }
    specs = [
        RunSpec.decode({"quality": {"tasks": change}}, where="t")
        for change in ({}, *({key: value} for key, value in changes.items()))
    ]
    assert set(changes) == set(
        specs[0].quality.tasks.model_fields_set | set(type(specs[0].quality.tasks).model_fields)
    )
    assert len({RunSpec().digest(), *(spec.digest() for spec in specs)}) == len(changes) + 2
    for spec in specs:
        again = RunSpec.model_validate_json(spec.model_dump_json())
        assert again == spec
        assert again.baseline().quality.tasks == spec.quality.tasks


@pytest.mark.parametrize(
    ("tasks_", "said"),
    [
        ({"names": []}, "at least 1 item"),
        ({"names": ["niah"]}, "niah_single"),
        ({"depths": [1.5]}, "less than or equal to 1"),
        ({"tokens": 8}, "greater than or equal to 32"),
        ({"token": 800}, "Did you mean 'tokens'"),
    ],
)
def test_a_wrong_task_is_one_clear_error(tasks_, said):
    with pytest.raises(SpecError, match=said):
        RunSpec.decode({"quality": {"tasks": tasks_}}, where="command line")


def test_flags_become_a_spec_only_if_a_task_is_named():
    assert task_options.document(None, 512, 20, None, chat=False) == {}
    found = task_options.document(["niah_single"], 300, 5, [0.5], chat=True)
    spec = RunSpec.decode({"quality": found}, where="t").quality.tasks
    assert (spec.names, spec.tokens, spec.samples) == (("niah_single",), 300, 5)
    assert (spec.depths, spec.chat) == ((0.5,), True)
    every = task_options.document(["all"], 512, 20, None, chat=False)
    assert len(RunSpec.decode({"quality": every}, where="t").quality.tasks.names) == 5


# Tables


@pytest.fixture
def records(quality):
    """The dense and a quantised record of the examples, with tasks."""
    found = {path.stem: store.load(path) for path in sorted(GOLDEN.glob("*.json"))}
    ran = [record for record in found.values() if record.status == "ok" and record.quality]
    dense = next(r for r in ran if not r.spec.stack)
    other = next(r for r in ran if r.spec.stack and r.spec.model == dense.spec.model)
    own = quality.model_copy(update={"baseline_digest": None})
    return [
        record.model_copy(update={"quality": record.quality.model_copy(update={"tasks": part})})
        for record, part in ((dense, own), (other, quality))
    ]


def test_a_table_shows_tasks_with_their_mean_and_worst(records):
    built = table.build(join.of(records))
    out = io.StringIO()
    terminal.render(built, Console(file=out, width=140, color_system=None))
    text = out.getvalue()
    for shown in (
        "needles",
        "-93.8",
        "-43.8",
        "0 of 8",
        "niah single",
        "mean Δ",
        "worst Δ",
        "-21.9 [",
        "common words is uninformative",
    ):
        assert shown in text
    assert "tasks: mean share of what was asked for" in text
    assert "mean Δ aware" in markdown.render(built)


def test_files_have_the_numbers(records):
    built = table.build(join.of(records))
    rows = [row for group in document.render(built)["groups"] for row in group["rows"]]
    cell = next(r for r in rows if not r["dense"])["cells"]["task_worst_delta_aware"]
    assert cell["value"] == -0.5
    assert cell["low"] < -0.5 < cell["high"]
    assert "niah single" in cell["reason"]
    lines = list(csv.DictReader(io.StringIO(spreadsheet.render(built))))
    assert {line["niah_single_aware"] for line in lines} == {"0.5"}


def test_a_table_of_runs_without_tasks_has_no_such_columns(records):
    bare = [
        r.model_copy(update={"quality": r.quality.model_copy(update={"tasks": None})})
        for r in records
    ]
    built = table.build(join.of(bare))
    assert not any(group.section("tasks") for group in built.groups)
    assert "tasks" not in markdown.render(built)
    mixed = table.build(join.of([bare[0], records[1]]))
    (row,) = [row for group in mixed.groups for row in group.rows if row.dense]
    assert row.cells["niah_single_aware"].kind == "unavailable"


# Comparisons


def outcome(base, new):
    (row,) = compare([base], [new], tiers=("quality",)).rows
    return next(o for o in row.outcomes if o.metric == "task_score_aware").word


def with_scores(record, *scores):
    quality = TaskQuality(
        protocol_id="tasks-plain/1",
        baseline_digest="0123456789ab",
        results=(result("niah_single", scores, (1.0,) * len(scores)),),
    )
    part = record.quality.model_copy(update={"tasks": quality})
    return record.model_copy(update={"quality": part})


def test_a_comparison_sees_lost_answers(records):
    record = records[1]
    good = with_scores(record, *[1.0] * 20)
    assert outcome(good, good) == "same"
    assert outcome(good, with_scores(record, *[0.0, 1.0] * 10)) == "worse"
    assert outcome(with_scores(record, *[0.0, 1.0] * 10), good) == "better"


def test_answers_to_different_prompts_are_not_compared(records):
    base = records[1]
    tasks_ = base.quality.tasks.model_copy(update={"protocol_id": "tasks-plain/2"})
    new = base.model_copy(update={"quality": base.quality.model_copy(update={"tasks": tasks_})})
    (refused,) = compare([base], [new]).refused
    assert "task prompts differs" in refused.reason


def test_a_suite_names_tasks_and_sweeps_their_length(tmp_path):
    path = tmp_path / "long.toml"
    path.write_text(
        '[quality.tasks]\nnames = ["niah_single"]\n[[variant]]\nstack = ["kv/knorm"]\n'
        '[variant.sweep]\n"quality.tasks.tokens" = [256, 512]\n'
    )
    specs = suite.resolve(suite.read(path))
    lengths = [(bool(spec.stack), spec.quality.tasks.tokens) for spec in specs]
    assert lengths == [(False, 256), (False, 512), (True, 256), (True, 512)]
