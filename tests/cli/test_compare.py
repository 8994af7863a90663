"""The commands `compare` and `check`: exit codes, stdout, files. No model is run."""

from __future__ import annotations

import json
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compresskit import store, suite as suites
from compresskit.cli import check as gate
from compresskit.cli.check import check
from compresskit.cli.compare import compare
from compresskit.errors import Exit, Incomparable, SpecError, UsageError
from compresskit.sweep import Swept
from compresskit.validity import judge

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v2"
app = typer.Typer()
app.command()(compare)
app.command()(check)


def invoke(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def golden(name):
    return store.load(GOLDEN / f"synthetic-{name}.json")


def heavier(record, parameters=7):
    """Another number of parameters: a change of the exact tier."""
    block = record.blocks[0]
    memory = block.passes.memory.model_copy(update={"parameters": parameters})
    passes = block.passes.model_copy(update={"memory": memory})
    return record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})


def slower(record, factor):
    """The record of another session that took `factor` times as long."""
    block = record.blocks[0]

    def scaled(one):
        samples = tuple(
            sample.model_copy(
                update={
                    "arrivals": tuple(
                        a._replace(seconds=a.seconds * factor) for a in sample.arrivals
                    )
                }
            )
            for sample in one.samples
        )
        return one.model_copy(update={"samples": samples})

    passes = block.passes.model_copy(
        update={
            "latency": scaled(block.passes.latency),
            "throughput": tuple(map(scaled, block.passes.throughput)),
        }
    )
    changed = block.model_copy(update={"passes": passes, "pair": "another-session"})
    return record.model_copy(update={"blocks": (changed,)})


# compare


def test_equal_folders_pass_and_a_change_fails(tmp_path):
    for name in ("dense", "int8"):
        store.save(golden(name), tmp_path / "base")
        store.save(golden(name), tmp_path / "same")
        store.save(heavier(golden(name)), tmp_path / "new")
    same = invoke("compare", tmp_path / "base", tmp_path / "same")
    assert same.exit_code == Exit.DONE, same.output
    changed = invoke("compare", tmp_path / "base", tmp_path / "new", "--json")
    assert changed.exit_code == Exit.FAILED
    document = json.loads(changed.stdout)
    assert document["passed"] is False
    assert document["counts"]["changed"] == 2
    quality = invoke("compare", tmp_path / "base", tmp_path / "new", "--tier", "quality")
    assert quality.exit_code == Exit.DONE


def test_unlike_records_end_with_three_and_still_one_document(tmp_path):
    base = golden("int8")
    other = base.model_copy(update={"model": base.model.model_copy(update={"revision": "x"})})
    one, two = store.save(base, tmp_path / "a"), store.save(other, tmp_path / "b")
    result = invoke("compare", one, two, "--json")
    assert isinstance(result.exception, Incomparable)
    assert "model revision differs" in str(result.exception)
    assert len(json.loads(result.stdout)["refused"]) == 1


def test_folders_without_a_common_run_are_incomparable(tmp_path):
    for name, side in (("dense", "a"), ("int8", "a"), ("ngram", "b")):
        store.save(golden(name), tmp_path / side)
    result = invoke("compare", tmp_path / "a", tmp_path / "b")
    assert isinstance(result.exception, Incomparable)
    assert "no run in common" in str(result.exception)


@pytest.mark.parametrize("text", ["tpot_s", "tpot_s=much", "tpot_s=nan", "tpot_s=-1"])
def test_a_tolerance_is_a_number(text):
    result = invoke("compare", GOLDEN, GOLDEN, "--tolerance", text)
    assert isinstance(result.exception, SpecError)


# check


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Stand in for the sweep: records of the suite's own specs, changed as a test likes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "gate.toml"
    path.write_text('model = "tiny"\ndevice = "cpu"\n', encoding="utf-8")
    (spec,) = suites.resolve(suites.read(path))
    record = golden("dense")
    fitting = spec.replace(
        workload=record.spec.workload.model_dump(mode="json"),
        protocol=record.spec.protocol.model_dump(mode="json"),
    )
    record = record.model_copy(update={"spec": fitting, "digest": fitting.digest()})
    assert judge(record).verdict != "INVALID"
    monkeypatch.setattr(suites, "resolve", lambda suite: [fitting])
    sessions = []

    def measure(suite, specs, out):
        sessions.append(out)
        made = state["records"][min(len(sessions), len(state["records"])) - 1]
        folder = out / "machine" / suite.name
        store.save(made, folder)
        return Swept(folder, (made,))

    monkeypatch.setattr(gate, "_measure", measure)
    state = {"suite": path, "base": tmp_path / "baseline", "record": record, "sessions": sessions}
    state["records"] = [record]
    return state


def run(bench, *words):
    bench["sessions"].clear()
    return invoke("check", bench["suite"], "--against", bench["base"], *words)


def test_without_a_baseline_the_command_that_makes_one_is_named(bench):
    result = run(bench)
    assert isinstance(result.exception, UsageError)
    assert f"--against {bench['base']} --update" in str(result.exception)
    assert not bench["sessions"]


def test_a_baseline_of_other_runs_is_no_baseline(bench):
    store.save(golden("int8"), bench["base"])
    result = run(bench)
    assert "holds no run of this suite" in str(result.exception)


def test_update_makes_a_baseline_that_the_same_code_passes(bench):
    made = run(bench, "--update")
    assert made.exit_code == Exit.DONE, made.output
    assert "1 new" in made.stderr
    assert run(bench).exit_code == Exit.DONE
    bench["records"] = [heavier(bench["record"])]
    assert run(bench).exit_code == Exit.FAILED
    replaced = run(bench, "--update")
    assert replaced.exit_code == Exit.DONE
    assert "parameters" in replaced.stdout
    assert run(bench).exit_code == Exit.DONE


def test_reports_are_written_and_summaries_appended(bench, tmp_path):
    run(bench, "--update")
    bench["records"] = [heavier(bench["record"])]
    summary, xml = tmp_path / "summary.md", tmp_path / "deep" / "check.xml"
    summary.write_text("# Before\n", encoding="utf-8")
    result = run(bench, "--junit", xml, "--markdown", summary, "--json")
    assert result.exit_code == Exit.FAILED
    assert json.loads(result.stdout)["passed"] is False
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("# Before\n### compresskit check gate: **failed**")
    failures = ElementTree.parse(xml).getroot().findall("testsuite[@name='exact']//failure")
    assert len(failures) == len(json.loads(result.stdout)["failures"]) > 0


def test_new_records_are_kept_and_named_on_failure_only(bench):
    run(bench, "--update")
    assert run(bench).exit_code == Exit.DONE
    assert not bench["sessions"][0].exists()
    bench["records"] = [heavier(bench["record"])]
    result = run(bench)
    assert str(bench["sessions"][0]) in result.stderr
    assert bench["sessions"][0].exists()


def test_a_worse_clock_is_measured_again_before_it_is_believed(bench):
    run(bench, "--update")
    slow, well = slower(bench["record"], 2.0), slower(bench["record"], 1.0)
    bench["records"] = [slow, well]
    passed = run(bench)
    assert passed.exit_code == Exit.DONE, passed.output
    assert len(bench["sessions"]) == 2
    assert "measuring them again" in passed.stderr
    bench["records"] = [slow, slow]
    failed = run(bench)
    assert failed.exit_code == Exit.FAILED
    assert "worse again in a second session" in " ".join(failed.stdout.split())


def test_a_run_that_the_suite_lost_is_a_failure(bench):
    run(bench, "--update")
    store.save(golden("int8"), bench["base"])
    result = run(bench)
    assert result.exit_code == Exit.FAILED
    assert "missing: quant/int8" in result.stdout


def test_the_shipped_suites_go_by_name(bench):
    assert gate._suite("demo-fast").name == "demo-fast"
    with pytest.raises(SpecError, match="none: cannot be read"):
        gate._suite("none")
