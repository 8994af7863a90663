"""`table --by students`: bands, bits per teacher parameter, what is best, and the picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from compresskit import store
from compresskit.cli.table import table as command
from compresskit.errors import UsageError
from compresskit.record import Arrival, Measured, Training, Unavailable
from compresskit.report import csv, document, join, markdown, students, table, terminal
from compresskit.report.plot import students as plot
from compresskit.report.students import by_students
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"
TEACHER_PARAMETERS = 1_000_000
STUDENT = {"name": "distill/student", "params": {"path": "student", "revision": None}}
INT8 = {"name": "quant/int8", "params": {}}
WINDOW = {"name": "kv/sink_window", "params": {}}
app = Typer()
app.command()(command)


def cost(record, *, seconds=3600.0, joules=None):
    """Training on the machine of the record itself."""
    return Training(
        seconds=seconds,
        energy=Unavailable(reason="no counter")
        if joules is None
        else Measured(value=joules, unit=Unit.JOULE, source="counter"),
        steps=100,
        tokens=1_000_000,
        teacher_tokens=500_000,
        device=record.device.name,
        threads=record.device.threads,
        started_at="2026-01-01T00:00:00Z",
    )


def faster(probe, factor):
    """The pass with all its times divided."""
    samples = tuple(
        one.model_copy(
            update={"arrivals": tuple(Arrival(a.seconds / factor, a.tokens) for a in one.arrivals)}
        )
        for one in probe.samples
    )
    return probe.model_copy(update={"samples": samples})


def made(stack, *, kl=None, factor=1.0, megabytes=2.0, tokenizer=None, trained=True):
    """A synthetic record: `factor` times as fast as the dense one, `kl` from it."""
    source = store.load(GOLDEN / f"synthetic-{'int8' if stack else 'dense'}.json")
    spec = store.load(GOLDEN / "synthetic-dense.json").spec.replace(stack=stack)
    block = source.blocks[0]
    dense = store.load(GOLDEN / "synthetic-dense.json").blocks[0].passes
    memory = block.passes.memory.model_copy(
        update={
            "weights_bytes": {"dense": int(megabytes * 1e6)},
            "parameters": TEACHER_PARAMETERS,
        }
    )
    passes = block.passes.model_copy(
        update={
            "latency": faster(dense.latency, factor),
            "throughput": tuple(faster(probe, factor) for probe in dense.throughput),
            "memory": memory,
        }
    )
    quality, facts, setup, model = source.quality, {}, source.setup, source.model
    if quality is not None and quality.fidelity is not None:
        near = quality.fidelity
        kl_now = near.kl.model_copy(update={"mean": kl, "stderr": kl / 20}) if kl else None
        near = None if kl_now is None else near.model_copy(update={"kl": kl_now})
        quality = quality.model_copy(update={"fidelity": near})
    if any(one["name"] == "distill/student" for one in stack):
        facts["student"] = {
            "revision": "sha256:1",
            "teacher_parameters": TEACHER_PARAMETERS,
            "training": "as its card tells" if trained else "training cost unknown: no card",
        }
        setup = setup.model_copy(update={"training": cost(source) if trained else None})
    if tokenizer is not None:
        model = model.model_copy(update={"tokenizer_sha256": tokenizer})
    label = " + ".join(one["name"] for one in stack) or "dense"
    return source.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": passes}),),
            "spec": spec,
            "digest": spec.digest(),
            "label": label,
            "status": "ok",
            "quality": quality,
            "facts": facts,
            "setup": setup,
            "model": model,
            "simulated": (),
        }
    )


def everybody():
    return [
        made([], megabytes=2.0),
        made([INT8], kl=0.01, megabytes=1.0, factor=1.2),
        made([STUDENT], kl=0.2, megabytes=1.2, factor=2.0),
        made([STUDENT, INT8], kl=0.3, megabytes=0.6, factor=2.5),
        made([WINDOW], kl=0.5),
    ]


def built(records):
    return by_students(table.build(join.of(records)))


@pytest.fixture
def group():
    (found,) = built(everybody()).groups
    return found


def test_rows_stand_in_bands_and_other_methods_are_left_out(group):
    assert [(row.label, row.band) for row in group.rows] == [
        ("dense", "teacher"),
        ("distill/student", "students"),
        ("quant/int8", "quantised teacher"),
        ("distill/student + quant/int8", "quantised students"),
    ]


def test_a_student_under_a_compressed_cache_has_a_band_of_its_own():
    (found,) = built([*everybody(), made([STUDENT, WINDOW], kl=0.4)]).groups
    assert found.rows[-1].band == "students in other stacks"


def test_bits_are_per_parameter_of_the_teacher(group):
    bits = {row.label: row.cells["bits_per_teacher_parameter"].value for row in group.rows}
    assert bits["dense"] == pytest.approx(16)
    assert bits["quant/int8"] == pytest.approx(8)
    assert bits["distill/student"] == pytest.approx(9.6)
    assert bits["distill/student + quant/int8"] == pytest.approx(4.8)


def test_what_is_best_in_bytes_and_in_speed(group):
    best = {row.label: row.cells[students.PARETO].words for row in group.rows}
    # Of 1.2 MB at 0.2 nats the quantised teacher makes nothing: it is smaller and closer.
    assert best["distill/student"] == "speed"
    assert best["quant/int8"] == "bytes, speed"
    assert best["distill/student + quant/int8"] == "bytes, speed"


def test_the_teacher_beats_what_is_neither_smaller_nor_faster():
    poor = made([INT8], kl=0.1, megabytes=2.1, factor=0.5)
    (found,) = built([made([]), poor, made([STUDENT], kl=0.2, megabytes=1.0, factor=2.0)]).groups
    row = next(row for row in found.rows if row.label == "quant/int8")
    assert row.cells[students.PARETO].words == "neither"


def test_training_is_that_of_students_alone(group):
    rows = {row.label: row.cells for row in group.rows}
    assert rows["distill/student"]["training_s"].value == 3600
    assert rows["distill/student"]["training_tokens"].value == 1_000_000
    assert rows["distill/student"]["training_energy_j"].reason == "no counter"
    assert rows["quant/int8"]["training_s"].kind == "reference"
    assert rows["dense"]["training_s"].kind == "reference"


def test_break_even_counts_the_training(group):
    rows = {row.label: row.cells["break_even_output_tokens_by_time"] for row in group.rows}
    plain, taught = rows["quant/int8"].value, rows["distill/student"]
    assert taught.value > 0
    assert plain is None or taught.value > plain


def test_without_a_card_nothing_is_known_of_its_cost():
    (found,) = built([made([]), made([STUDENT], kl=0.2, factor=2.0, trained=False)]).groups
    cells = found.rows[1].cells
    for key in ("training_s", "training_energy_j", "break_even_output_tokens_by_time"):
        assert cells[key].value is None
        assert "no card" in cells[key].reason


def test_a_student_of_another_tokenizer_is_listed_and_not_ranked():
    trimmed = made([STUDENT, INT8], megabytes=0.5, factor=3.0, tokenizer="other")
    (found,) = built([*everybody()[:3], trimmed]).groups
    row = found.rows[-1]
    assert row.cells["kl_mean_nats"].value is None
    assert row.cells[students.PARETO].value is None
    assert row.cells[students.PARETO].kind == "unavailable"
    assert "tokenizer" in row.cells["decode_ratio_to_baseline"].reason
    assert "another tokenizer" in row.cells["decode_tokens_per_s"].remark
    # Negative control: the same student with the teacher's tokenizer has all of it.
    (same,) = built([*everybody()[:3], made([STUDENT, INT8], kl=0.4, megabytes=0.5)]).groups
    assert same.rows[-1].cells["decode_ratio_to_baseline"].value is not None
    assert same.rows[-1].cells[students.PARETO].words


def test_every_format_prints_it(tmp_path):
    found = built(everybody())
    out = io.StringIO()
    terminal.render(found, Console(file=out, width=160, color_system=None, legacy_windows=False))
    text = markdown.render(found)
    for printed in (out.getvalue(), text):
        assert "quantised students" in printed
        assert "best in" in " ".join(printed.split())
    assert "| 60.0 min | 1.00 M |" in text
    head, *lines = csv.render(found).splitlines()
    assert {"training_s", "training_energy_j_estimated", "band"} <= set(head.split(","))
    assert len(lines) == 4
    tree = json.dumps(document.render(found), allow_nan=False)
    assert "training/1" in tree


def test_no_student_is_said():
    found = built([made([]), made([INT8], kl=0.01)])
    assert found.groups == ()
    assert "no student here" in found.warnings[-1]


def test_the_command_prints_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    for record in everybody():
        store.save(record, tmp_path)
    picture = tmp_path / "students.svg"
    done = CliRunner().invoke(
        app, [str(tmp_path), "--by", "students", "-f", "md", "--plot", str(picture)]
    )
    assert done.exit_code == 0, done.output
    assert "quantised teacher" in done.stdout
    drawn = picture.read_text(encoding="utf-8")
    for word in ("bytes of all weights", "tokens per second", "Pareto front", "quantised students"):
        assert word in drawn
    again = tmp_path / "again.svg"
    plot.draw(table.build(join.load([tmp_path])), again)
    assert again.read_text(encoding="utf-8") == drawn


def test_points_leave_out_what_has_no_kl_and_what_is_invalid(group):
    names = {point.row.label for point in plot.shown(group, plot.VIEWS[0])}
    assert names == {"quant/int8", "distill/student", "distill/student + quant/int8"}
    invalid = group.rows[1].validity.model_copy(update={"verdict": "INVALID"})
    fewer = replace(group, rows=(group.rows[0], replace(group.rows[1], validity=invalid)))
    assert plot.shown(fewer, plot.VIEWS[0]) == []


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="distill/student"):
        plot.draw(table.build(join.of([made([]), made([INT8], kl=0.01)])), tmp_path / "none.svg")
