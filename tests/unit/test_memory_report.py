"""The account as people and programs read it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from compresskit import store
from compresskit.cli.app import app
from compresskit.metrics import METRICS
from compresskit.record import Block, Measured, MemoryPass, Passes, Phase, Record, Unavailable
from compresskit.report import memory as reports
from compresskit.runner import finish
from compresskit.spec import RunSpec
from compresskit.units import Unit

SPEC = RunSpec()


def byte(value):
    return Measured(value=value, unit=Unit.BYTE, source="replay")


NONE = Unavailable(reason="no mallinfo2 here")


def decode(**parts):
    known = {"runtime": byte(600_000), "weights": byte(250_000), "cache": byte(50_000)}
    return Phase(peaks={"rss": byte(1_000_000)}, counter="rss", parts={**known, **parts})


def record(**phases):
    memory = MemoryPass(
        batch=1,
        tokens_in_cache=10,
        weights_bytes={"packed": 200_000, "scales": 50_000},
        parameters=400_000,
        cache_bytes={"codes": 40_000, "scales": 10_000},
        moved_bytes={"packed": 200_000, "scales": 50_000, "cache": 50_000},
        operations_per_step=161,
        phases=phases,
    )
    return finish(
        Record(
            digest=SPEC.digest(),
            label="quant/int4",
            status="ok",
            spec=SPEC,
            started_at="2026-01-01T00:00:00+00:00",
            blocks=(Block(started_at="2026-01-01T00:00:00+00:00", passes=Passes(memory=memory)),),
        )
    )


def value(name, of):
    return METRICS[name].value(of)


def test_the_rest_and_its_share_are_metrics():
    one = record(decode=decode(slack=byte(40_000)))
    assert value("unattributed_bytes", one).value == 60_000
    assert value("unattributed_share", one).value == pytest.approx(0.06)
    assert value("unattributed_share", one).unit is Unit.RATIO
    assert value("kv_bytes", one).value == 50_000
    assert value("moved_bytes", one).value == 300_000
    assert value("operations_per_step", one).value == 161
    assert value("slack_bytes", one).value == 40_000


def test_a_part_that_nobody_read_is_unavailable_in_the_metrics_too():
    one = record(decode=decode(slack=NONE))
    assert value("slack_bytes", one).reason == "no mallinfo2 here"
    assert value("workspace_bytes", one).kind == "unavailable"
    assert value("unattributed_bytes", one).value == 100_000


def test_the_larger_phase_of_use_stands_for_a_part_and_setting_up_does_not():
    one = record(
        compress=decode(slack=byte(900_000)),
        prefill=decode(slack=byte(70_000)),
        decode=decode(slack=byte(20_000)),
    )
    assert value("slack_bytes", one).value == 70_000


def test_a_run_without_a_memory_pass_has_reasons():
    empty = record().model_copy(update={"blocks": ()})
    for name in ("kv_bytes", "moved_bytes", "unattributed_bytes", "unattributed_share"):
        assert value(name, empty).kind == "unavailable"
    assert value("unattributed_bytes", record()).kind == "unavailable"


def test_the_document_holds_every_part_and_what_is_left():
    one = record(decode=decode(slack=NONE))
    (found,) = reports.document([one])["records"]
    lines = found["phases"]["decode"]["parts"]
    assert [line["part"] for line in lines] == [
        "runtime",
        "weights",
        "cache",
        "slack",
        "unattributed",
    ]
    assert [line["share"] for line in lines] == [0.6, 0.25, 0.05, None, 0.1]
    assert lines[-1]["value"] == 100_000
    assert "slack" in lines[-1]["note"]
    json.dumps(found, allow_nan=False)


def printed(*records, width=100):
    out = io.StringIO()
    reports.render(records, Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def test_people_see_the_peak_first_the_rest_last_and_why_something_is_missing():
    text = printed(record(prefill=decode(slack=byte(-2_000)), decode=decode(slack=NONE)))
    rows = [line.split() for line in text.splitlines()]
    names = [row[0] for row in rows if row]
    order = ["peak", "runtime", "weights", "cache", "slack", "unattributed"]
    assert [name for name in names if name in order] == order
    rest = next(row for row in rows if row and row[0] == "unattributed")
    assert rest == ["unattributed", "102", "kB", "10.2%", "100", "kB", "10.0%"]
    assert "-2 kB" in text or "-2.00 kB" in text
    assert "n/a" in text
    assert "no mallinfo2 here" in text
    assert "packed 200 kB" in text
    assert "read by one decode step: 300 kB" in text


def test_a_record_without_the_pass_is_named():
    assert "no memory pass" in printed(record().model_copy(update={"blocks": ()}))


def test_the_command_prints_one_document(tmp_path):
    path = store.save(record(decode=decode()), tmp_path)
    result = CliRunner().invoke(app, ["memory", str(path), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["records"]
    assert found["digest"] == SPEC.digest()
    plain = CliRunner().invoke(app, ["memory", str(path)])
    assert "unattributed" in plain.stdout
