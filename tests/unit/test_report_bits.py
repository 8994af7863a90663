"""Rows grouped by effective bits, in every format, and the picture of KL against bits."""

from __future__ import annotations

import csv as csvfile
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from compresskit import store
from compresskit.cli.table import table as command
from compresskit.errors import UsageError
from compresskit.report import csv, document, join, markdown, table, terminal
from compresskit.report.bits import KEY, by_bits
from compresskit.report.plot import canvas, labels, tradeoff
from compresskit.report.plot.tradeoff import Point
from compresskit.spec import MethodSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"
app = Typer()
app.command()(command)


def golden(name):
    return store.load(GOLDEN / f"synthetic-{name}.json")


def variant(name, *, bits, kl):
    """The int8 record under another name, with that many bits and that KL; nothing else changed."""
    record = golden("int8")
    block = record.blocks[0]
    memory = block.passes.memory
    size = int(bits * memory.parameters / 8)
    memory = memory.model_copy(update={"weights_bytes": {"packed": size}})
    passes = block.passes.model_copy(update={"memory": memory})
    near = record.quality.fidelity
    near = near.model_copy(update={"kl": near.kl.model_copy(update={"mean": kl})})
    spec = record.spec.replace(stack=(MethodSpec(name=f"quant/{name}"),))
    return record.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": passes}),),
            "quality": record.quality.model_copy(update={"fidelity": near}),
            "label": f"quant/{name}",
            "spec": spec,
            "digest": spec.digest(),
        }
    )


def without_memory(record):
    block = record.blocks[0]
    passes = block.passes.model_copy(update={"memory": None})
    return record.model_copy(
        update={"blocks": (block.model_copy(update={"passes": passes}),), "label": "quant/blind"}
    )


ROWS = {"far": (4.25, 0.3), "near": (4.5, 0.02), "wide": (8.5, 0.001), "mid": (6.4, 0.004)}


@pytest.fixture
def built():
    rows = [variant(name, bits=bits, kl=kl) for name, (bits, kl) in ROWS.items()]
    return table.build(join.of([golden("dense"), *rows, without_memory(golden("int8"))]))


def bands(found):
    return [(row.label, row.band) for group in found.groups for row in group.rows]


def test_rows_stand_in_bands_widest_first_and_the_closest_first(built):
    assert bands(by_bits(built)) == [
        ("dense", "16 bits"),
        ("quant/wide", "8.x bits (8.50)"),
        ("quant/mid", "6.x bits (6.40)"),
        ("quant/near", "4.x bits (4.25 to 4.50)"),
        ("quant/far", "4.x bits (4.25 to 4.50)"),
        ("quant/blind", "bits unknown"),
    ]


def test_grouping_changes_no_number_and_no_other_table(built):
    before = document.render(built)
    grouped = by_bits(built)
    assert document.render(built) == before
    assert all(not row.band for group in built.groups for row in group.rows)
    same = {
        row.digest + row.label: row.cells["weights_bytes"] for g in built.groups for row in g.rows
    }
    for row in (row for group in grouped.groups for row in group.rows):
        assert row.cells["weights_bytes"] == same[row.digest + row.label]


def test_bits_unknown_have_a_reason_under_the_table(built):
    grouped = by_bits(built)
    blind = next(r for g in grouped.groups for r in g.rows if r.label == "quant/blind")
    assert grouped.notes[blind.cells[KEY].note - 1] == blind.cells[KEY].reason != ""


def test_bits_are_a_column_of_grouped_tables_only(built):
    for each, wanted in ((built, False), (by_bits(built), True)):
        assert ("bits/param" in markdown.render(each)) is wanted
        console = Console(file=io.StringIO(), width=120)
        terminal.render(each, console)
        assert ("bits/" in console.file.getvalue()) is wanted


def test_bands_are_headings_in_markdown_and_on_the_terminal(built):
    text = markdown.render(by_bits(built))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count(" | ") for line in lines if "**4.x bits" in line or "near" in line}) <= 4
    first = next(i for i, line in enumerate(lines) if "**4.x bits (4.25 to 4.50)**" in line)
    assert "quant/near" in lines[first + 1]
    console = Console(file=io.StringIO(), width=120)
    terminal.render(by_bits(built), console)
    printed = console.file.getvalue()
    assert printed.index("4.x bits") < printed.index("quant/near") < printed.index("quant/far")


def test_bands_are_a_field_for_programs(built):
    rows = document.render(by_bits(built))["groups"][0]["rows"]
    assert [row["band"] for row in rows][:2] == ["16 bits", "8.x bits (8.50)"]
    assert "band" not in document.render(built)["groups"][0]["rows"][0]
    read = list(csvfile.DictReader(io.StringIO(csv.render(by_bits(built)))))
    assert [row["band"] for row in read] == [band for _, band in bands(by_bits(built))]
    assert float(read[1][KEY]) == pytest.approx(8.5, abs=1e-3)
    assert "band" not in csvfile.DictReader(io.StringIO(csv.render(built))).fieldnames


def test_the_front_is_what_nothing_beats_at_both():
    points = [
        Point(b, k, "", False) for b, k in ((4.2, 0.3), (4.5, 0.02), (6.4, 0.05), (8.5, 0.001))
    ]
    assert [(p.bits, p.kl) for p in tradeoff.front(points)] == [
        (4.2, 0.3), (4.5, 0.02), (8.5, 0.001),
    ]  # fmt: skip


def test_dense_rows_and_rows_without_numbers_are_no_points(built):
    assert sorted(p.name for p in tradeoff.points(built.groups[0])) == [
        "quant/far", "quant/mid", "quant/near", "quant/wide",
    ]  # fmt: skip


def test_the_picture_names_every_row_and_is_the_same_each_time(built, tmp_path):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    tradeoff.draw(built, one)
    tradeoff.draw(built, two)
    text = one.read_text(encoding="utf-8")
    assert text == two.read_text(encoding="utf-8")
    for words in ("near", "far", "mid", "wide", "Pareto front", "dense: 16 bits"):
        assert f"<!-- {words}" in text


def test_names_do_not_cover_each_other_or_points():
    pytest.importorskip("matplotlib")
    figure, (axes,) = canvas.new(width=8, height=5)
    points = [(5 + 0.05 * i, 0.1 + 0.004 * i) for i in range(6)]
    axes.plot(*zip(*points, strict=True), "o")
    axes.set_xlim(3, 8)
    axes.set_ylim(0, 0.3)
    figure.draw_without_rendering()
    labels.annotate(axes, points, [f"quant/method:{i}" for i in range(6)])
    renderer = figure.canvas.get_renderer()
    texts = axes.texts
    boxes = [labels.Box(*text.get_window_extent(renderer).extents) for text in texts]
    for i, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[:i])
        assert all(
            box.overlap(labels._around(*axes.transData.transform(point), 2.0)) == 0
            for point in points
        )


def test_a_picture_needs_numbers_and_a_known_ending(built, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"ends in \.svg, \.png or \.pdf"):
        tradeoff.draw(built, tmp_path / "a.gif")
    with pytest.raises(UsageError, match="nothing to plot"):
        tradeoff.draw(table.build(join.of([golden("dense")])), tmp_path / "a.svg")


def test_without_matplotlib_the_error_says_what_to_install(built, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        tradeoff.draw(built, tmp_path / "a.svg")


def test_the_command_groups_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bits.svg"
    done = CliRunner().invoke(
        app, [str(GOLDEN), "--by", "bits", "--plot", str(picture), "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    tree = json.loads(done.stdout)
    assert all(row["band"] for group in tree["groups"] for row in group["rows"])
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_a_row_on_the_grid_of_its_baseline_is_not_ranked():
    good, flagged = Point(4.2, 0.3, "a", False), Point(4.5, 0.001, "b", False, unranked=True)
    assert tradeoff.front([good, flagged]) == [good]
    assert tradeoff.front([good, flagged._replace(unranked=False)])[-1].name == "b"
