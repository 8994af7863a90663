"""`table --by speculation`: which rows, which columns, and the footnotes that are left."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from compresskit import store
from compresskit.cli.table import table as command
from compresskit.record import StepCosts
from compresskit.report import csv, document, join, markdown, table, terminal
from compresskit.report.speculation import COLUMNS, by_speculation

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"
app = Typer()
app.command()(command)


def golden(name):
    return store.load(GOLDEN / f"synthetic-{name}.json")


def stepwise():
    """The n-gram record as it is measured now: with its steps, their parts and the probed passes.

    Chunks of 3, 1, 4, 2, 5 tokens after 4 drafted ones, steps of 55 ms.
    """
    record = golden("ngram")
    block = record.blocks[0]
    probe = block.passes.latency
    accepted = (0, 2, 0, 3, 1, 4)
    samples = tuple(
        one.model_copy(
            update={
                "per_step_drafted": ((0, 4, 4, 4, 4, 4),),
                "per_step_accepted": (accepted,),
                "parts": {
                    "draft": (0.001,) * 5,
                    "verify": (0.05,) * 5,
                    "judge": (0.001,) * 6,
                },
            }
        )
        for one in probe.samples
    )
    passes = block.passes.model_copy(
        update={"latency": probe.model_copy(update={"samples": samples})}
    )
    costs = StepCosts(
        batch=1, tokens_in_cache=32, widths=(1, 5), seconds=((0.045,) * 7, (0.05,) * 7)
    )
    stack = [{"name": "speculative/ngram", "params": {"draft": 4}}]
    spec = record.spec.replace(stack=stack)
    return record.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": passes}),),
            "setup": record.setup.model_copy(update={"step_costs": costs}),
            "spec": spec,
            "digest": spec.digest(),
        }
    )


@pytest.fixture
def folder(tmp_path):
    for record in (golden("dense"), golden("int8"), golden("skipped"), stepwise()):
        store.save(record, tmp_path)
    return tmp_path


@pytest.fixture
def built(folder):
    return by_speculation(table.build(join.load([folder])))


def test_only_rows_that_speculate_and_their_dense_ones_are_left(built):
    (group,) = built.groups
    assert [row.dense for row in group.rows] == [True, False]
    assert group.rows[0].label == "dense"
    assert group.columns == COLUMNS


def test_the_numbers_of_a_row(built):
    row = built.groups[0].rows[1]
    values = {key: cell.value for key, cell in row.cells.items()}
    assert values["tokens_per_step"] == pytest.approx(3)
    assert values["draft_acceptance_rate"] == pytest.approx(0.5)
    assert values["conditional_acceptance_at_1"] == pytest.approx(4 / 5)
    assert values["conditional_acceptance_at_2"] == pytest.approx(3 / 4)
    assert values["conditional_acceptance_at_3"] == pytest.approx(2 / 3)
    shares = [values[f"{part}_share"] for part in ("draft", "verify", "host")]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == pytest.approx(0.05 / 0.055, rel=0.02)
    assert row.cells["speedup_predicted"].kind == "estimated"
    # 3 tokens in a step of 55 ms, over a pass of 45 ms a token.
    assert values["speedup_predicted"] == pytest.approx(3 * 45 / 55, rel=0.02)
    # The dense row is what a prediction is about, and the measured row what it is held against.
    dense, own = (built.groups[0].rows[place].cells["tpot_s"].value for place in (0, 1))
    predicted = values["predicted_ratio_to_baseline"]
    assert predicted == pytest.approx(dense / values["tpot_predicted_s"])
    assert values["prediction_over_measured"] == pytest.approx(values["tpot_predicted_s"] / own)
    assert row.cells["prediction_over_measured"].kind == "estimated"
    assert values["best_draft_length"] == 4
    assert row.cells["lossless"].words == "exact"
    assert row.cells["acceptance_histogram"].words == "8 8 8 8 8"


def test_a_dense_row_has_nothing_to_say_of_drafts(built):
    dense = built.groups[0].rows[0]
    assert dense.cells["speedup_predicted"].kind == "reference"
    assert dense.cells["decode_tokens_per_s"].value


def test_footnotes_are_those_of_what_is_printed(built):
    text = markdown.render(built)
    assert "no energy counter" not in text
    assert "α at n" in text
    for number in range(1, len(built.notes) + 1):
        mark = str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        assert text.count(mark) >= 2, f"footnote {number} is not referred to"


def test_every_format_prints_it(built):
    out = io.StringIO()
    terminal.render(built, Console(file=out, width=140, color_system=None, legacy_windows=False))
    assert "predicted" in out.getvalue()
    assert "weights" not in out.getvalue()
    assert "| × predicted |" in markdown.render(built)
    assert "speedup_predicted" in csv.render(built).splitlines()[0]
    tree = document.render(built)
    cell = tree["groups"][0]["rows"][1]["cells"]["speedup_predicted"]
    assert cell["kind"] == "estimated"
    json.dumps(tree, allow_nan=False)


def test_a_folder_without_speculation_leaves_no_group(tmp_path):
    store.save(golden("dense"), tmp_path)
    nothing = by_speculation(table.build(join.load([tmp_path])))
    assert nothing.groups == ()
    assert "no run" in nothing.warnings[-1]
    # That is no verdict on the records.
    assert CliRunner().invoke(app, [str(tmp_path), "--by", "speculation"]).exit_code == 0


def test_the_command(folder):
    result = CliRunner().invoke(app, [str(folder), "--by", "speculation", "--format", "md"])
    assert result.exit_code == 0, result.output
    assert "| best k | lossless |" in result.stdout
    plain = CliRunner().invoke(app, [str(folder), "--format", "md"])
    assert "best k" not in plain.stdout
