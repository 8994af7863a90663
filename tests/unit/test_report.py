"""Joining records with their baselines, and what a table may say."""

from __future__ import annotations

import csv as csvfile
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from compresskit import store
from compresskit.errors import RecordError, UsageError
from compresskit.record import EnergyWindow, Limits, Measured, Record, Turn, Unavailable
from compresskit.report import csv, document, join, markdown, reading, table, terminal
from compresskit.report.cells import MARKS, Cell, Comparison, signed, superscript, text
from compresskit.spec import Prices
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


# Noise of the repetitions: distinct, without a trend, about one percent.
JITTER = (1.0, 1.006, 0.994, 1.003, 0.997, 1.009, 0.991, 1.001)


def in_turns(record: Record, factor: float = 1.0, *, rounds: int = 8, pair: str = "s") -> Record:
    """The record as one side of an interleaved session, its times scaled by `factor`."""
    block = record.blocks[0]

    def again(probe):
        first = probe.samples[0]
        # Speculation steps of another round: the same work, another time.
        samples = tuple(
            first.model_copy(
                update={
                    "arrivals": tuple(
                        a._replace(seconds=a.seconds * factor * noise * (1 + index / 1e4))
                        for a in first.arrivals
                    )
                }
            )
            for index, noise in enumerate((JITTER * 2)[:rounds])
        )
        return probe.model_copy(update={"samples": samples})

    passes = block.passes.model_copy(
        update={
            "latency": again(block.passes.latency),
            "throughput": tuple(
                again(one) if one.samples else one for one in block.passes.throughput
            ),
        }
    )
    turns = tuple(Turn(round=i, position=0, started=float(i)) for i in range(rounds))
    block = block.model_copy(update={"pair": pair, "turns": turns, "passes": passes})
    return record.model_copy(update={"blocks": (block,)})


def priced(record: Record, **prices: float | str) -> Record:
    return record.model_copy(update={"prices": Prices(**prices)})


def with_limits(record: Record, moved: int = 200_000_000) -> Record:
    """The record with moved bytes and a machine that copies 10 GB/s."""

    def one(value: float, unit: Unit) -> Measured:
        return Measured(value=value, unit=unit, source="synthetic")

    block = record.blocks[0]
    memory = block.passes.memory.model_copy(update={"moved_bytes": {"dense": moved}})
    passes = block.passes.model_copy(update={"memory": memory})
    limits = Limits(
        copy_bytes_per_second=one(10e9, Unit.BYTE_PER_SECOND),
        matmul_flops_per_second=one(400e9, Unit.FLOP_PER_SECOND),
        dispatch_seconds=one(2e-6, Unit.SECOND),
        threads=1,
        dtype="bfloat16",
    )
    blocks = (block.model_copy(update={"passes": passes}),)
    return record.model_copy(update={"blocks": blocks, "limits": limits})


def printed(built: table.Table, width: int = 120) -> str:
    out = io.StringIO()
    terminal.render(built, Console(file=out, width=width, color_system=None))
    return out.getvalue()


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


def ratio_of(variant: Record, dense: Record) -> Cell:
    return row_of(built_of(dense, variant), "quant").cells["decode_ratio_to_baseline"]


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "better"), (2.0, "same"), (1.92, "same"), (4.0, "worse"), (2.12, "worse")],
)
def test_side_by_side_a_ratio_has_an_interval_and_a_verdict(factor, verdict):
    # The synthetic int8 run decodes twice as fast as the dense one.
    cell = ratio_of(in_turns(golden("int8"), factor), in_turns(golden("dense")))
    assert cell.value == pytest.approx(2 / factor, rel=0.01)
    assert cell.low <= cell.value <= cell.high
    found = cell.comparison
    assert (found.paired, found.verdict, found.n) == (True, verdict, 8)
    assert text(cell, "ratio").endswith(f" {MARKS[verdict]}")


def test_what_the_machine_does_to_both_sides_is_not_in_the_interval():
    # Every second round is twice as slow, for both.
    def storm(record: Record) -> Record:
        quiet, slow = in_turns(record), in_turns(record, 2.0)
        block, other = quiet.blocks[0], slow.blocks[0]
        probes = []
        for one, two in zip(block.passes.throughput, other.passes.throughput, strict=True):
            mixed = [
                pair[i % 2] for i, pair in enumerate(zip(one.samples, two.samples, strict=True))
            ]
            probes.append(one.model_copy(update={"samples": tuple(mixed)}))
        passes = block.passes.model_copy(update={"throughput": tuple(probes)})
        return record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})

    cell = ratio_of(storm(golden("int8")), storm(golden("dense")))
    assert cell.high - cell.low < 0.05 * cell.value


def test_runs_of_two_sessions_have_a_plain_ratio_and_no_verdict():
    one, other = in_turns(golden("int8"), pair="a"), in_turns(golden("dense"), pair="b")
    for cell in (ratio_of(one, other), ratio_of(golden("int8"), golden("dense"))):
        assert cell.value == pytest.approx(2.0, rel=0.01)
        assert (cell.low, cell.comparison) == (None, Comparison(paired=False))
        assert text(cell, "ratio") == "2.00†"


def test_too_few_rounds_give_no_verdict_and_hardly_any_no_interval():
    few = ratio_of(in_turns(golden("int8"), rounds=6), in_turns(golden("dense"), rounds=6))
    assert few.low is not None
    assert few.comparison.verdict == "inconclusive"
    assert "at least 7 a side" in few.comparison.reason
    two = ratio_of(in_turns(golden("int8"), rounds=2), in_turns(golden("dense"), rounds=2))
    assert two.low is None
    assert text(two, "ratio") == "2.00 ?"


def test_of_several_baselines_the_one_that_took_turns_is_taken():
    beside = in_turns(golden("dense"), pair="with")
    newer = in_turns(golden("dense"), 3.0, pair="without").model_copy(update={"started_at": "9"})
    row = join.of([in_turns(golden("int8"), pair="with"), beside, newer]).rows[0]
    assert row.baseline.record is beside
    assert join.of([golden("int8"), beside, newer]).rows[0].baseline.record is newer


def test_the_best_dense_run_is_the_fastest_one_not_the_one_that_took_turns():
    variant, eager = in_turns(golden("int8")), in_turns(golden("dense"))
    prepacked = golden("dense-prepacked")
    row = join.of([variant, eager, prepacked]).rows[0]
    assert row.best_dense.record is prepacked
    cells = row_of(built_of(variant, eager, prepacked), "quant").cells
    assert cells["decode_ratio_to_baseline"].comparison.paired
    assert not cells["decode_ratio_to_best_dense"].comparison.paired


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
    assert built.notes.count("no energy counter: RAPL not readable, no NVML") == 1


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
    assert int8["decode_ratio_to_baseline_paired"] == "no"
    assert int8["decode_ratio_to_baseline_verdict"] == ""
    assert by_label["quant/int8", "compiled"]["status"] == "failed"


def test_the_document_is_strict_json_with_reasons_for_every_null():
    built = table.build(join.load([GOLDEN]))
    loaded = json.loads(json.dumps(document.render(built), allow_nan=False))
    cells = [c for g in loaded["groups"] for r in g["rows"] for c in r["cells"].values()]
    assert cells
    assert all(c["value"] is not None or c["reason"] for c in cells)


def test_files_carry_the_verdict_with_what_it_rests_on():
    built = built_of(in_turns(golden("dense")), in_turns(golden("int8")))
    cell = document.render(built)["groups"][0]["rows"][1]["cells"]["decode_ratio_to_baseline"]
    assert (cell["paired"], cell["verdict"], cell["n"]) == (True, "better", 8)
    assert cell["p"] == pytest.approx(2 / 12_870)
    assert cell["factor"] == 1.05
    row = list(csvfile.DictReader(io.StringIO(csv.render(built))))[1]
    name = "decode_ratio_to_baseline"
    assert (row[f"{name}_paired"], row[f"{name}_verdict"], row[f"{name}_n"]) == (
        "yes",
        "better",
        "8",
    )


# What a table explains


def test_the_legend_explains_the_marks_that_occur_and_no_others():
    paired = printed(built_of(in_turns(golden("dense")), in_turns(golden("int8"))))
    assert "▲ better" in paired
    assert "▼" not in paired
    assert "†" not in paired
    plain = printed(built_of(golden("dense"), golden("int8")))
    assert "†: not measured side by side" in plain
    assert "interval]" not in plain


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_heading_or_number_is_cut(width):
    rows = [
        priced(with_limits(in_turns(golden(name))), per_hour=2.5, per_kwh=0.1, currency="EUR")
        for name in ("dense", "dense-prepacked", "int8", "ngram")
    ]
    lines = printed(built_of(*rows), width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert any(line.rstrip().endswith(" EUR") or " EUR " in line for line in lines)


# Limits and money


def headings(built: table.Table) -> list[str]:
    return [column.key for column in built.groups[0].section("limits and money")]


def test_money_is_shown_only_where_there_is_a_price():
    assert headings(built_of(golden("dense"))) == []
    rented = built_of(priced(golden("dense"), per_hour=2.5))
    assert headings(rented) == [
        "rent_per_million_output_tokens",
        "break_even_output_tokens_by_time",
    ]
    metered = built_of(priced(golden("dense"), per_kwh=0.1, grams_co2_per_kwh=56.0))
    assert "electricity_per_million_output_tokens" in headings(metered)
    assert "gco2e_per_million_output_tokens" in headings(metered)
    assert "rent_per_million_output_tokens" not in headings(metered)


def test_what_is_not_shown_leaves_no_footnote():
    bare = built_of(golden("dense"))
    assert not any("price" in note or "limits" in note for note in bare.notes)
    metered = built_of(priced(golden("dense"), per_kwh=0.1))
    cell = metered.groups[0].rows[0].cells["electricity_per_million_output_tokens"]
    assert "no energy counter" in metered.notes[cell.note - 1]


def test_prices_are_repeated_under_the_table_with_what_was_not_given():
    built = built_of(
        priced(golden("dense"), per_hour=2.5, per_kwh=0.1, currency="EUR", source="offer of May")
    )
    said = " ".join(printed(built).split())
    assert "2.5 EUR per hour, 0.1 EUR per kWh (offer of May)" in said
    assert "never added" in said
    assert "PUE not given, taken as 1" in said
    assert "Prices" not in printed(built_of(golden("dense")))


def test_the_cost_of_an_estimated_energy_is_marked():
    cell = built_of(golden("dense"), priced(golden("int8"), per_kwh=0.1)).groups[0].rows[1].cells
    assert text(cell["electricity_per_million_output_tokens"], "money").startswith("~")


def test_break_even_is_a_number_never_or_marked():
    def cell(factor: float, *, turns: bool = True) -> Cell:
        take = in_turns if turns else slower
        dense = in_turns(golden("dense")) if turns else golden("dense")
        built = built_of(dense, priced(take(golden("int8"), factor), per_hour=2.5))
        return row_of(built, "quant").cells["break_even_output_tokens_by_time"]

    assert cell(1.0).value > 0
    assert text(cell(1.0), "count").isdigit()
    assert text(cell(4.0), "count").startswith("never")
    assert text(cell(1.0, turns=False), "count").endswith("†")
    assert (
        row_of(built_of(golden("dense")), "dense").cells["break_even_output_tokens_by_time"].kind
        == "reference"
    )


def test_the_share_of_the_memory_limit_and_what_a_step_is_bound_by():
    built = built_of(with_limits(golden("dense")), golden("int8"))
    cells = row_of(built, "dense").cells
    assert text(cells["roofline_fraction"], "share") == "40 %"
    assert cells["bound"].words == "memory"
    assert "memory 20.0 ms" in cells["bound"].reason
    assert "launches" in built.notes[cells["bound"].note - 1]
    assert headings(built) == ["roofline_fraction", "bound"]
    unknown = row_of(built, "quant").cells["roofline_fraction"]
    assert "not counted" in built.notes[unknown.note - 1]


def test_the_reading_tells_rent_and_electricity_apart():
    dense = in_turns(golden("dense"))
    int8 = priced(in_turns(golden("int8")), per_hour=2.5, per_kwh=0.1, grams_co2_per_kwh=369.0)
    said = reading_of(dense, int8)
    assert re.search(r"take \S+ USD of rent or ~\S+ USD of electricity \(PUE not given", said)
    assert "g of CO2e" in said
    assert "pays for its time after" in said
    assert "USD" not in reading_of(dense, in_turns(golden("int8")))


# Cells


@pytest.mark.parametrize(
    ("cell", "style", "printed"),
    [
        (Cell("measured", 0.0123, Unit.SECOND), "quantity", "12.3 ms"),
        (Cell("measured", 24_576, Unit.BYTE_PER_TOKEN), "quantity", "24.6 kB"),
        (Cell("estimated", 0.3, Unit.JOULE_PER_TOKEN), "quantity", "~300 mJ"),
        (Cell("measured", 0.985, Unit.RATIO), "percent", "98.50 %"),
        (Cell("measured", 2.0, Unit.RATIO, low=1.9, high=2.1), "ratio", "2.00 [1.90, 2.10]"),
        (Cell("measured", 0.649, currency="EUR"), "money", "0.649 EUR"),
        (Cell("estimated", 46.6), "grams", "~46.6 g"),
        (Cell("measured", 0.4), "share", "40 %"),
        (Cell("measured", 1234.0, comparison=Comparison(paired=False)), "count", "1.23 k†"),
        (Cell("unavailable", words="never", note=3), "count", "never³"),
        (Cell("derived", words="memory"), "words", "memory"),
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


def reading_of(*found: Record) -> str:
    return reading.read(built_of(*found))


def test_the_reading_says_ratios_with_intervals():
    said = reading_of(
        in_turns(golden("dense")),
        in_turns(golden("dense-prepacked")),
        in_turns(golden("int8")),
    )
    assert re.search(
        r"int8: decodes 2\.00x \[\d\.\d\d, \d\.\d\d\] as fast as the dense baseline", said
    )
    assert re.search(r"1\.60x \[1\.\d\d, 1\.\d\d\] against the best dense run", said)
    assert "weights 1.8x smaller" in said
    assert "another next token in 1.5 % of positions" in said


@pytest.mark.parametrize(
    ("factor", "rounds", "said"),
    [(2.0, 8, "(the same within 1.05x)"), (1.0, 4, "(inconclusive: 4 and 4 samples")],
)
def test_the_reading_names_no_difference_that_is_not_shown(factor, rounds, said):
    words = reading_of(
        in_turns(golden("dense"), rounds=rounds), in_turns(golden("int8"), factor, rounds=rounds)
    )
    assert said in words
    assert "fast" not in words
    assert "slow" not in words


def test_the_reading_gives_no_verdict_on_runs_of_two_sessions():
    words = reading_of(golden("dense"), golden("int8"))
    assert "decode rate 2.00x that of the dense baseline in eager mode (not measured side" in words
    assert "fast" not in words


def test_the_reading_says_slower_where_it_is():
    words = reading_of(in_turns(golden("dense")), in_turns(golden("int8"), 4.0))
    assert "decodes slower than the dense baseline in eager mode: 0.50x" in words


def test_the_reading_says_nothing_about_invalid_rows():
    said = reading.read(built_of(golden("dense"), golden("short")))
    assert "is INVALID and says nothing" in said
    assert "fast" not in said


def test_the_reading_repeats_reservations():
    said = reading.read(built_of(golden("dense"), golden("simulated")))
    assert "(with reservations: " in said
    assert said.endswith("warning).")


def test_the_reading_lists_what_was_skipped():
    assert "was skipped: two methods" in reading.read(built_of(golden("skipped")))


def test_a_record_without_numbers_still_makes_a_table():
    dense = golden("dense")
    nothing = dense.model_copy(update={"blocks": (), "quality": None, "setup": None})
    row = row_of(built_of(nothing), "dense")
    assert all(cell.value is None for cell in row.cells.values())
    assert Unavailable(reason="x").value is None


def test_a_measured_energy_says_where_it_comes_from_and_what_it_covers():
    record = golden("dense")
    block = record.blocks[0]
    windows = tuple(
        EnergyWindow(
            reading=Measured(value=value, unit=Unit.JOULE, source="nvml_counter"),
            window_seconds=10.0,
            tokens=100,
            scope="gpu",
        )
        for value in (30.0, 31.0, 29.0, 30.0)
    )
    energy = block.passes.energy.model_copy(update={"generate": windows})
    passes = block.passes.model_copy(update={"energy": energy})
    metered = record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})
    built = built_of(metered, golden("int8"))
    cell = built.groups[0].rows[0].cells["j_per_output_token"]
    assert text(cell, "quantity") == "300 ± 4.1 mJ"
    said = " ".join(printed(built).split())
    assert "energy/token: gross joules ± standard error over windows" in said
    assert "(measured counter, gpu only)" in said
    shown = document.render(built)["groups"][0]["rows"][0]["cells"]["j_per_output_token"]
    assert (shown["provenance"], shown["scope"]) == ("measured_counter", "gpu")
    assert "energy/token: gross" not in printed(built_of(golden("dense"), golden("int8")))


def test_a_dense_run_is_not_held_against_another_go_of_itself():
    older = golden("dense-prepacked")
    newer = slower(older, 1.2).model_copy(update={"started_at": "9"})
    rows = join.of([older, newer, golden("dense")]).rows
    assert rows[0].best_dense.record is older
    assert rows[1].best_dense.record is newer
    # The eager run is held against one of them, the newest of its spec.
    assert rows[2].best_dense.record is newer
