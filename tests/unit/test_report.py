"""Joining records with their baselines, and what a table may say."""

from __future__ import annotations

import csv as csvfile
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from compresskit import store
from compresskit.errors import RecordError, UsageError
from compresskit.record import Record, Unavailable
from compresskit.report import csv, document, join, markdown, reading, table, terminal
from compresskit.report.cells import Cell, signed, superscript, text
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"


def golden(name: str) -> Record:
    return store.load(GOLDEN / f"synthetic-{name}.json")


def row_of(built: table.Table, label: str, mode: str = "eager") -> table.Row:
    return next(
        row
        for group in built.groups
        for row in group.rows
        if row.label.startswith(label) and row.mode == mode
    )


def built_of(*found: Record) -> table.Table:
    return table.build(join.of(found))


def slower(record: Record, factor: float, *, keep: int | None = None) -> Record:
    """The record with all throughput times scaled, and perhaps fewer repetitions."""
    block = record.blocks[0]
    passes = []
    for one in block.passes.throughput:
        samples = tuple(
            sample.model_copy(
                update={
                    "arrivals": tuple(
                        a._replace(seconds=a.seconds * factor) for a in sample.arrivals
                    )
                }
            )
            for sample in one.samples[:keep]
        )
        passes.append(one.model_copy(update={"samples": samples}))
    changed = block.passes.model_copy(update={"throughput": tuple(passes)})
    return record.model_copy(update={"blocks": (block.model_copy(update={"passes": changed}),)})


# Loading


def test_folders_are_searched_and_machine_files_are_not_records(tmp_path):
    folder = tmp_path / "machine" / "suite"
    store.save(golden("dense"), folder)
    (tmp_path / "machine" / "machine.json").write_text("{}")
    (folder / ".hidden.json").write_text("{}")
    joined = join.load([tmp_path])
    assert [row.record.label for row in joined.rows] == ["dense"]
    assert joined.warnings == ()


def test_what_cannot_be_read_is_left_out_with_a_warning(tmp_path):
    store.save(golden("dense"), tmp_path)
    (tmp_path / "broken.json").write_text('{"schema_version": 1')
    joined = join.load([tmp_path])
    assert len(joined.rows) == 1
    assert "broken.json: not a readable record" in joined.warnings[0]
    assert "broken.json" in markdown.render(table.build(joined))


def test_only_broken_records_are_an_error(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecordError, match=r"broken\.json"):
        join.load([tmp_path])


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"no record in {tmp_path}"):
        join.load([tmp_path])


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none: no such file or folder"):
        join.load([tmp_path / "none"])


def test_the_same_record_is_shown_once(tmp_path):
    path = store.save(golden("dense"), tmp_path)
    store.save(golden("dense"), tmp_path / "copy")
    assert len(join.load([tmp_path, path]).rows) == 1


# Joining


def test_a_record_is_joined_by_digest_with_its_own_mode_and_the_fastest_dense():
    joined = join.of([golden("int8"), golden("dense-prepacked"), golden("dense")])
    row = joined.rows[0]
    assert row.baseline.record.spec.engine.mode == "eager"
    assert row.best_dense.record.spec.engine.mode == "prepacked"


def test_without_its_baseline_a_record_has_a_reason_instead_of_a_ratio():
    row = row_of(built_of(golden("int8")), "quant")
    cell = row.cells["decode_ratio_to_baseline"]
    assert cell.value is None
    assert "not among these records" in cell.reason
    assert cell.note == 1


@pytest.mark.parametrize(
    ("part", "change", "what"),
    [
        ("model", {"revision": "other"}, "model revision"),
        ("model", {"tokenizer_sha256": "2" * 64}, "tokenizer"),
        ("model", {"dtype": "float32"}, "dtype"),
        ("device", {"name": "Another CPU"}, "device"),
        ("prompts", {"sha256": "3" * 64}, "prompts"),
        ("environment", {"packages": {"torch": "2.12.0"}}, "torch version"),
    ],
)
def test_unlike_things_are_not_compared(part, change, what):
    dense = golden("dense")
    other = dense.model_copy(update={part: getattr(dense, part).model_copy(update=change)})
    row = join.of([golden("int8"), other]).rows[0]
    assert row.baseline.record is None
    assert row.baseline.reason == f"its dense baseline differs in {what}"


def test_among_several_machines_the_comparable_baseline_is_taken():
    dense = golden("dense")
    elsewhere = dense.model_copy(
        update={"device": dense.device.model_copy(update={"name": "Another CPU"})}
    )
    row = join.of([golden("int8"), elsewhere, dense]).rows[0]
    assert row.baseline.record is dense


def test_invalid_records_enter_no_comparison_on_either_side():
    dense = golden("dense")
    bad = dense.model_copy(update={"simulated": ("kv/fake",)})
    joined = join.of([golden("int8"), bad])
    assert joined.rows[0].baseline.reason == "its dense baseline is INVALID"
    assert joined.rows[1].baseline.record is None


def test_the_verdict_is_judged_again_not_believed():
    record = golden("short")
    flattering = record.validity.model_copy(update={"verdict": "VALID", "reasons": ()})
    joined = join.of([record.model_copy(update={"validity": flattering})])
    assert joined.rows[0].validity.verdict == "INVALID"


# Tables


def test_ratios_carry_an_interval_and_point_the_right_way():
    row = row_of(built_of(golden("dense"), golden("int8")), "quant")
    cell = row.cells["decode_ratio_to_baseline"]
    assert cell.value == pytest.approx(2.0)
    assert cell.low < 2.0 < cell.high


def test_too_few_repetitions_give_a_ratio_without_an_interval():
    few = slower(golden("int8"), 1.0, keep=2)
    cell = row_of(built_of(golden("dense"), few), "quant").cells["decode_ratio_to_baseline"]
    assert cell.value is not None
    assert cell.low is None
    assert text(cell, "ratio") == "1.98"


def test_the_dense_row_is_a_reference_not_a_ratio_of_one():
    row = row_of(built_of(golden("dense")), "dense")
    assert row.cells["decode_ratio_to_baseline"].kind == "reference"
    assert row.cells["kl_mean_nats"].kind == "reference"


def test_a_simulated_row_shows_quality_but_no_speed():
    row = row_of(built_of(golden("dense"), golden("simulated")), "kv")
    for key in ("decode_tokens_per_s", "decode_ratio_to_baseline", "ttft_s", "j_per_output_token"):
        assert text(row.cells[key], "plain") == "simulated"
    assert row.cells["kl_mean_nats"].value == pytest.approx(0.04)


def test_an_invalid_row_shows_no_speed_either():
    row = row_of(built_of(golden("dense"), golden("short")), "quant")
    assert row.cells["decode_tokens_per_s"].value is None
    assert row.cells["decode_tokens_per_s"].kind == "invalid"


def test_equal_reasons_share_a_footnote():
    built = built_of(golden("dense"), golden("dense-prepacked"))
    marks = {row.cells["j_per_output_token"].note for row in built.groups[0].rows}
    assert marks == {1}
    assert built.notes == ("no energy counter: RAPL not readable, no NVML",)


def test_models_and_devices_do_not_share_a_group():
    dense = golden("dense")
    elsewhere = dense.model_copy(
        update={"device": dense.device.model_copy(update={"name": "Another CPU"})}
    )
    built = built_of(dense, elsewhere)
    assert [group.context["device"] for group in built.groups] == ["Synthetic CPU", "Another CPU"]


def test_a_wrapped_model_stays_in_its_group():
    int8 = golden("int8")
    wrapped = int8.model.model_copy(update={"architecture": "OptimizedModule"})
    built = built_of(golden("dense"), int8.model_copy(update={"model": wrapped}))
    assert len(built.groups) == 1


def test_rows_that_would_look_alike_get_their_digest():
    one = golden("int8")
    other = one.model_copy(update={"digest": "abcdef012345", "started_at": "later"})
    labels = [row.label for row in built_of(one, other).groups[0].rows]
    assert labels == [f"quant/int8 #{one.digest[:6]}", "quant/int8 #abcdef"]


def test_speculation_columns_appear_only_where_something_speculates():
    def headings(built):
        return [column.key for column in built.groups[0].section("speed")]

    assert "tokens_per_step" not in headings(built_of(golden("dense")))
    assert "tokens_per_step" in headings(built_of(golden("dense"), golden("ngram")))


def test_skipped_and_failed_runs_are_listed_with_their_reason():
    built = built_of(golden("dense"), golden("skipped"), golden("failed"))
    assert [(p.status, bool(p.reason)) for p in built.problems] == [
        ("skipped", True),
        ("failed", True),
    ]
    assert not built.all_invalid()
    assert built_of(golden("short"), golden("failed")).all_invalid()


def test_what_the_quality_pass_wants_said_is_a_footnote():
    built = built_of(golden("dense"), golden("simulated"))
    cell = row_of(built, "kv").cells["kl_mean_nats"]
    assert built.notes[cell.note - 1] == "the text gives 6 windows instead of 8"
    assert text(cell, "plain") == f"0.0400{superscript(cell.note)}"
    assert "6 windows instead of 8" in csv.render(built)


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    evil = golden("dense").model_copy(update={"label": "dense\x1b[31m"})
    out = io.StringIO()
    terminal.render(built_of(evil), Console(file=out, width=120))
    assert "\x1b" not in out.getvalue()


def test_names_are_not_read_as_markup():
    odd = golden("dense").model_copy(update={"label": "[bold]a|b[/bold]"})
    out = io.StringIO()
    terminal.render(built_of(odd), Console(file=out, width=120))
    assert "[bold]a|b[/bold]" in out.getvalue()
    assert r"[bold]a\|b[/bold]" in markdown.render(built_of(odd))


def test_every_markdown_row_has_the_same_number_of_cells():
    built = table.build(join.load([GOLDEN]))
    for grid in markdown.render(built).split("\n\n"):
        widths = {line.replace(r"\|", "").count("|") for line in grid.splitlines() if "|" in line}
        assert len(widths) <= 1


def test_csv_leaves_the_unknown_empty_and_estimates_apart():
    built = table.build(join.load([GOLDEN]))
    rows = list(csvfile.DictReader(io.StringIO(csv.render(built))))
    by_label = {(row["label"], row["mode"]): row for row in rows}
    dense, int8 = by_label["dense", "eager"], by_label["quant/int8", "eager"]
    assert dense["j_per_output_token"] == ""
    assert "no energy counter" in dense["notes"]
    assert (int8["j_per_output_token"], int8["j_per_output_token_estimated"]) == ("", "0.3")
    assert float(int8["decode_ratio_to_baseline"]) == pytest.approx(2.0)
    assert by_label["quant/int8", "compiled"]["status"] == "failed"


def test_the_document_is_strict_json_with_reasons_for_every_null():
    built = table.build(join.load([GOLDEN]))
    loaded = json.loads(json.dumps(document.render(built), allow_nan=False))
    cells = [c for g in loaded["groups"] for r in g["rows"] for c in r["cells"].values()]
    assert cells
    assert all(c["value"] is not None or c["reason"] for c in cells)


# Cells


@pytest.mark.parametrize(
    ("cell", "style", "printed"),
    [
        (Cell("measured", 0.0123, Unit.SECOND), "quantity", "12.3 ms"),
        (Cell("measured", 24_576, Unit.BYTE_PER_TOKEN), "quantity", "24.6 kB"),
        (Cell("estimated", 0.3, Unit.JOULE_PER_TOKEN), "quantity", "~300 mJ"),
        (Cell("measured", 0.985, Unit.RATIO), "percent", "98.50 %"),
        (Cell("measured", 2.0, Unit.RATIO, low=1.9, high=2.1), "ratio", "2.00 [1.90, 2.10]"),
        (Cell("unavailable", reason="x", note=12), "plain", "n/a¹²"),
        (Cell("reference"), "plain", "–"),
        (Cell("measured", 0.0), "plain", "0"),
    ],
)
def test_a_cell_in_words(cell, style, printed):
    assert text(cell, style) == printed


@pytest.mark.parametrize(
    ("value", "stderr", "printed"),
    [
        (0.002, 0.001, "+0.0020 ± 0.0010"),
        (-0.5, 0.02, "-0.500 ± 0.020"),
        (0.0, 0.0, "0 ± 0"),
        (0.25, None, "+0.250"),
    ],
)
def test_a_difference_is_printed_to_the_decimals_of_its_error(value, stderr, printed):
    assert signed(value, stderr) == printed


def test_no_mark_without_a_footnote():
    assert superscript(None) == ""


# Reading


def test_the_reading_says_ratios_with_intervals():
    said = reading.read(built_of(golden("dense"), golden("dense-prepacked"), golden("int8")))
    assert "quant/int8: decodes 2.00x [1.94, 2.06] as fast as the dense baseline" in said
    assert "1.60x [1.55, 1.65] against the best dense run" in said
    assert "weights 1.8x smaller" in said
    assert "another next token in 1.5 % of positions" in said


def test_the_reading_gives_no_verdict_where_the_interval_holds_one():
    same = slower(golden("int8"), 2.0)
    said = reading.read(built_of(golden("dense"), same))
    assert "decode rate 1.00x [0.97, 1.03] that of the dense baseline" in said
    assert "(no difference shown)" in said
    assert "fast" not in said
    assert "slow" not in said


def test_the_reading_says_slower_where_it_is():
    said = reading.read(built_of(golden("dense"), slower(golden("int8"), 4.0)))
    assert "decodes slower than the dense baseline in eager mode: 0.50x" in said


def test_the_reading_says_nothing_about_invalid_rows():
    said = reading.read(built_of(golden("dense"), golden("short")))
    assert "is INVALID and says nothing" in said
    assert "fast" not in said


def test_the_reading_repeats_reservations():
    said = reading.read(built_of(golden("dense"), golden("simulated")))
    assert said.endswith("(with reservations: warning).")


def test_the_reading_lists_what_was_skipped():
    assert "was skipped: two methods" in reading.read(built_of(golden("skipped")))


def test_a_record_without_numbers_still_makes_a_table():
    dense = golden("dense")
    nothing = dense.model_copy(update={"blocks": (), "quality": None, "setup": None})
    row = row_of(built_of(nothing), "dense")
    assert all(cell.value is None for cell in row.cells.values())
    assert Unavailable(reason="x").value is None
