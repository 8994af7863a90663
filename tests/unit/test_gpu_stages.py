"""Every stage of the visit to a GPU machine runs dry, resumes and says what is missing; no GPU needed."""

from __future__ import annotations

import gc
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compresskit_kernels import launch

from benchmarks.gpu import crossover, speculation, tuning
from benchmarks.gpu.box import STAGES, Job, check, models, suites, tune
from benchmarks.gpu.box.job import Deadline
from compresskit import pairing, runner, store
from compresskit.cli.app import app
from compresskit.hf.tokenizer import HFTokenizer
from compresskit.spec import RunSpec
from compresskit.suite import read

SUITES = sorted(path.stem for path in suites.FOLDER.glob("*.toml"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_process(monkeypatch):
    """Sessions without children: the runner itself, one arm after the other. Counts the runs."""
    ran: list[RunSpec] = []

    def session(arms, notify, *, seed=0):
        for index, arm in enumerate(arms):
            notify(index, "load")
            ran.append(arm.spec)
            yield index, runner.run(arm.spec, speed_only=arm.speed_only)

    monkeypatch.setattr(pairing, "session", session)
    # Every run collects garbage many times, to measure in peace, which is most of its time here.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    # And cuts the same long texts into tokens again, of one tokenizer in each test.
    encode, known = HFTokenizer.encode, {}

    def remembered(self, text, *, special=True):
        key = (text, special)
        if key not in known:
            known[key] = encode(self, text, special=special)
        return list(known[key])

    monkeypatch.setattr(HFTokenizer, "encode", remembered)
    return ran


def dry(tmp_path, **options):
    return Job(out=tmp_path, is_dry=True, **options)


def records(folder):
    return [store.load(path) for path in sorted(folder.rglob("*.json")) if len(path.stem) == 12]


# --- the suites ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_one_and_has_its_dense_rows(name):
    found = suites.rows(name, "random:llama-3.1-8b", Job(out=Path()))
    specs = found.specs
    digests = {spec.digest() for spec in specs}
    assert {spec.device for spec in specs} == {"cuda"}
    assert all(spec.baseline().digest() in digests for spec in specs)
    # Nothing is lost: what is not here is named.
    document = read(suites.FOLDER / f"{name}.toml")
    named = {words.partition(":")[0] for words in found.left_out}
    for variant in document.variant:
        names = [str(one["name"] if isinstance(one, dict) else one) for one in variant.stack]
        label = " + ".join(name.partition(":")[0] for name in names) or "dense"
        label += "" if variant.mode == "eager" else f" ({variant.mode})"
        assert label in {spec.label() for spec in specs} | named


def test_the_fair_baseline_has_graphs_and_the_eager_one_is_a_row_of_its_own():
    specs = suites.rows("models", "random:llama-3.1-8b", Job(out=Path())).specs
    assert [spec.engine.mode for spec in specs if not spec.stack] == ["eager", "compiled"]
    assert all(spec.engine.mode == "compiled" for spec in specs if spec.stack)
    assert "quality" not in specs[0].protocol.passes


def test_published_energy_windows_are_long_and_of_several_batches():
    specs = suites.rows("energy", "tiny", Job(out=Path())).specs
    assert all(spec.protocol.energy_seconds >= 30 for spec in specs)
    assert len({spec.workload.batch_sizes[0] for spec in specs}) >= 2


def test_peers_that_are_missing_or_unwanted_are_named(monkeypatch):
    monkeypatch.setattr(suites, "find_spec", lambda package: None)
    found = suites.rows("models", "tiny", Job(out=Path()))
    assert any("bitsandbytes is not installed" in words for words in found.left_out)
    assert not any(spec.stack and spec.stack[0].name in suites.PACKAGES for spec in found.specs)
    monkeypatch.setattr(suites, "find_spec", lambda package: object())
    with_both = suites.rows("models", "tiny", Job(out=Path()))
    without = suites.rows("models", "tiny", Job(out=Path(), without=("torchao",)))
    assert not with_both.left_out
    assert len(with_both.specs) - len(without.specs) == 2
    assert all("left out as asked (torchao)" in words for words in without.left_out)


def test_dry_rows_are_small_and_as_different_as_before():
    for name in SUITES:
        full = suites.rows(name, "tiny", Job(out=Path())).specs
        small = [suites.small(spec) for spec in full]
        contexts = {spec.workload.prompt_tokens for spec in full}
        assert len({spec.workload.prompt_tokens for spec in small}) == len(contexts)
        assert {spec.label().removesuffix(" (compiled)") for spec in full} == {
            spec.label() for spec in small
        }
        assert max(spec.workload.prompt_tokens for spec in small) <= 32


# --- stages, dry ---------------------------------------------------------------------------------


def test_models_dry(tmp_path, in_process, capsys):
    """Small shapes with random weights: every row ok or skipped with a reason, marked, resumed."""
    assert STAGES["models"](dry(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "synthetic weights" in said
    assert "Times better than the best dense row" in said
    found = records(tmp_path)
    assert len(found) > 10
    assert {record.status for record in found} <= {"ok", "skipped"}
    for record in found:
        if record.status == "ok":
            assert record.facts["synthetic"].startswith("synthetic weights")
            assert record.quality is None
    before = len(in_process)
    assert STAGES["models"](dry(tmp_path)) == 0
    assert len(in_process) == before  # all of it was kept


def test_energy_dry_says_that_there_is_no_counter(tmp_path, in_process, capsys, monkeypatch):
    from compresskit.measure.energy import counters

    monkeypatch.setattr(counters, "find", lambda *_: counters.Null("no counter in this test"))
    assert STAGES["energy"](dry(tmp_path)) == 0
    found = records(tmp_path)
    assert {record.spec.workload.batch_sizes[0] for record in found} == {1, 2, 3}
    windows = found[0].blocks[0].passes.energy.generate
    assert windows[0].reading.kind == "unavailable"
    assert "joules" not in capsys.readouterr().out.split("Times better")[-1]


def test_quality_dry(tmp_path, in_process, capsys, monkeypatch):
    """Every fourth row: all of them run as `models` and `context`."""
    rows = suites.rows

    def fewer(name, model, job):
        found = rows(name, model, job)
        return found._replace(specs=found.specs[::4])

    monkeypatch.setattr(suites, "rows", fewer)
    assert STAGES["quality"](dry(tmp_path, models=("tiny",))) == 0
    judged = [record for record in records(tmp_path) if record.quality is not None]
    assert any(record.quality.fidelity is not None for record in judged)
    assert "synthetic weights" not in capsys.readouterr().out


def test_the_speed_surface_dry(tmp_path, in_process, monkeypatch):
    """Its commands are those of the command line, here without a process for each."""

    def command(words, **_):
        app(words[3:], standalone_mode=False)
        return SimpleNamespace(returncode=0)

    player = SimpleNamespace(run=command, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(speculation, "subprocess", player)
    words = ["--out", str(tmp_path), "--dry-run", "--stages", "surface"]
    assert speculation.main(words) == 0
    found = {record.label: record for record in records(tmp_path)}
    assert {record.status for record in found.values()} == {"ok"}
    assert len(found) == 1 + len(speculation.DRY.rates) * len(speculation.DRY.lengths)
    assert all(one.facts["synthetic"] for label, one in found.items() if "oracle" in label)
    before = len(in_process)
    assert speculation.main(words) == 0
    assert len(in_process) == before


def test_a_stage_without_time_runs_nothing_and_says_how_much_is_left(tmp_path, in_process, capsys):
    assert STAGES["quality"](dry(tmp_path, minutes=0, models=("tiny",))) == 0
    assert not in_process
    assert "no time for" in capsys.readouterr().out


def test_a_failed_row_is_the_exit_code(tmp_path, in_process, monkeypatch):
    real = runner.run

    def broken(spec, **options):
        return runner.failed(spec, "planted") if spec.stack else real(spec, **options)

    monkeypatch.setattr(runner, "run", broken)
    assert STAGES["quality"](dry(tmp_path, models=("tiny",))) == 1


def test_tune_dry_writes_the_default_table_and_claims_nothing(tmp_path, capsys):
    assert STAGES["tune"](dry(tmp_path)) == 0
    written = json.loads((tmp_path / "tuned" / "dry-run.json").read_text())
    default = ROOT / "kernels/compresskit_kernels/tuned/default.json"
    assert written == json.loads(default.read_text())
    said = capsys.readouterr().out
    assert "not timed" in said
    assert "times as fast" not in said


@pytest.mark.parametrize("stage", ["kernels", "speculation"])
def test_stages_that_have_a_script_hand_their_options_on(stage, tmp_path, monkeypatch):
    asked = []
    script = STAGES[stage].__globals__[stage]
    monkeypatch.setattr(script, "main", lambda words: asked.append(words) or 5)
    assert STAGES[stage](dry(tmp_path, minutes=3)) == 5
    assert {"--dry-run", "3"} <= set(asked[0])


# --- check ---------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="fine"/>
<testcase classname="a" name="wrong"><failure message="off"/></testcase>
<testcase classname="a" name="broke"><error message="oom"/></testcase>
<testcase classname="a" name="away"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def test_the_report_of_pytest_is_counted(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    summary = check.read(path)
    assert summary == check.Summary(1, ("a.wrong", "a.broke"), {"no CUDA device": 1})
    assert "2 tests failed: a.wrong, a.broke" in summary.fault(is_dry=True)


def test_nothing_but_skips_is_a_failure_on_a_gpu_only():
    skipped = check.Summary(0, (), {"triton is not installed": 9})
    assert skipped.fault(is_dry=True) is None
    assert "no test ran on the GPU (triton is not installed)" in skipped.fault(is_dry=False)
    assert check.Summary(1, (), {}).fault(is_dry=False) is None


def test_check_dry_summarises(tmp_path, monkeypatch, capsys):
    def tests(command, **options):
        report = next(word for word in command if word.startswith("--junitxml="))
        Path(report.partition("=")[2]).write_text(JUNIT)

    monkeypatch.setattr(check.subprocess, "run", tests)
    assert check.run(dry(tmp_path)) == 1
    assert json.loads((tmp_path / "check" / "summary.json").read_text())["passed"] == 1
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: None)
    assert check.run(dry(tmp_path)) == 1  # no report is no success
    assert "wrote no report" in capsys.readouterr().err


# --- time ----------------------------------------------------------------------------------------


def test_a_deadline_expects_the_next_to_last_as_long_as_the_longest():
    now = SimpleNamespace(at=0.0)
    deadline = Deadline(10, clock=lambda: now.at)
    assert deadline.fits()
    now.at = 240.0  # the first took four minutes
    assert deadline.fits()
    now.at = 400.0
    assert not deadline.fits()  # 200 s are left
    assert deadline.left() == 200
    assert not Deadline(0, clock=lambda: 0.0).fits()


# --- tuning --------------------------------------------------------------------------------------

START = launch.Tile(most_rows=16, rows=16, columns=64, depth=16, warps=4, stages=3, waves=3)
FEW = tuning.AXES["packed_few_rows"]


def test_the_search_finds_what_one_change_at_a_time_can_reach():
    def times(tile):
        return [1.0 + abs(tile.warps - 8) + abs(tile.waves - 1), 2.0 + abs(tile.columns - 32)]

    found = tuning.search(START, FEW, times)
    assert (found.tile.warps, found.tile.waves, found.tile.columns) == (8, 1, 32)
    assert (found.tile.rows, found.tile.most_rows, found.tile.depth) == (16, 16, 16)
    base, best = times(START), times(found.tile)
    assert found.gain == pytest.approx((base[0] / best[0] * base[1] / best[1]) ** 0.5)
    assert found.tried <= 2 * sum(map(len, FEW.values()))


def test_noise_and_wrong_results_change_nothing():
    def noisy(tile):
        return [1.0 if tile == START else 0.985]

    def wrong(tile):
        return [1.0] if tile == START else None

    for times in (noisy, wrong):
        assert tuning.search(START, FEW, times).tile == START
    faster = tuning.search(START, FEW, lambda tile: [1.0 if tile == START else 0.9])
    assert faster.tile != START  # the margin is no wall


def test_a_start_that_cannot_run_is_no_measurement(tmp_path):
    found = tuning.search(START, FEW, lambda tile: None)
    assert (found.tile, found.gain) == (START, None)
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"tile": asdict(START), "gain": None}))
    assert tuning.kept(path) is None
    path.write_text(json.dumps({"tile": asdict(START), "gain": 1.2}))
    assert tuning.kept(path)["gain"] == 1.2
    path.write_text('{"tile": {"rows": 3}, "gain": 1')
    assert tuning.kept(path) is None


def test_written_tables_are_read_by_the_kernels(tmp_path, monkeypatch):
    table = {**tuning.default(), "packed_one_row": [replace(START, most_rows=1)]}
    tuning.write(tmp_path / "compresskit_kernels" / "tuned" / "Some_GPU.json", table)
    monkeypatch.setattr(launch.resources, "files", lambda name: tmp_path / name)
    launch.tiles.cache_clear()
    try:
        assert launch.tiles("packed_one_row", "Some GPU") == (replace(START, most_rows=1),)
    finally:
        launch.tiles.cache_clear()


def test_a_trial_holds_for_its_block_and_its_kind_only():
    cpu = torch.device("cpu")
    usual = launch.tile("packed_few_rows", 4, cpu)
    with launch.trial("packed_few_rows", START):
        assert launch.tile("packed_few_rows", 4, cpu) == START
        assert launch.tile("packed_one_row", 1, cpu) != START
    assert launch.tile("packed_few_rows", 4, cpu) == usual


def test_every_kind_can_be_tuned():
    assert set(tuning.AXES) == set(tuning.default()) == set(tune.PRODUCTS)
    for kind, entries in tuning.default().items():
        for entry in entries:
            assert all(getattr(entry, axis) in values for axis, values in tuning.AXES[kind].items())


# --- where methods stop to pay -------------------------------------------------------------------


def crossing(*ratios, sizes=(1, 4, 16, 64)):
    points = tuple(map(crossover.Point, sizes, ratios))
    return crossover.Crossing("m", "row", "decode speed", points).words()


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((1.9, 1.5, 1.1, 0.8), "pays up to 16, not at 64"),
        ((0.8, 0.9, 1.04, 1.3), "pays from 64, not at 16"),
        ((0.8, 1.2, 1.3, 0.9), "pays from 4, not at 1; up to 16, not at 64"),
        ((1.5, 1.4, 1.3, 1.05), "pays at every size from 1 to 64"),
        ((1.0, 1.04, 0.9, 0.9), "pays at no size from 1 to 64"),
        ((1.5, 0.9, 1.3, 0.9), "pays at 1, 16 only"),
        ((1.5,), "pays at 1, the only size measured"),
        ((1.0,), "does not pay at 1, the only size measured"),
    ],
)
def test_crossings_in_words(ratios, words):
    assert crossing(*ratios) == words


GOLDEN = ROOT / "tests/golden/records/v2"


def golden(name):
    return store.load(GOLDEN / f"synthetic-{name}.json")


def test_ratios_are_against_the_best_dense_row_of_that_batch():
    dense, int8 = golden("dense"), golden("int8")
    found = {one.quantity: one for one in crossover.of([dense, int8])}
    speed = found["decode speed"]
    from compresskit.metrics import decode_at

    for batch, ratio in speed.points:
        metric = decode_at(batch)
        assert ratio == pytest.approx(metric.value(int8).value / metric.value(dense).value)
    # A faster dense row in another mode is the one to beat.
    engine = {"name": "native", "mode": "compiled"}
    quick = int8.model_copy(update={"spec": int8.spec.replace(stack=(), engine=engine)})
    beaten = {one.quantity: one for one in crossover.of([dense, quick, int8])}
    assert [point.ratio for point in beaten["decode speed"].points] == pytest.approx(
        [1.0] * len(speed.points)
    )


def test_rows_without_numbers_or_without_dense_have_no_crossing():
    dense, int8 = golden("dense"), golden("int8")
    assert crossover.of([int8]) == []
    assert crossover.render([]) == ""
    invalid = int8.validity.model_copy(update={"verdict": "INVALID"})
    assert crossover.of([dense, int8.model_copy(update={"validity": invalid})]) == []
    assert crossover.of([dense, int8.model_copy(update={"simulated": ("x",)})]) == []
    other = dense.model_copy(update={"device": dense.device.model_copy(update={"name": "other"})})
    assert crossover.of([other, int8]) == []


def test_the_table_of_crossings_has_a_column_for_each_batch():
    table = crossover.render(crossover.of([golden("dense"), golden("int8")]))
    assert "| batch 1 | batch 4 |" in table
    assert "pays" in table


def test_models_run_on_the_shapes_that_were_asked_for(monkeypatch, tmp_path):
    asked = []

    def run(names, chosen, job, **options):
        asked.append((tuple(names), tuple(chosen)))
        return suites.Outcome((), 0, ())

    monkeypatch.setattr(suites, "run", run)
    models.run(Job(out=tmp_path))
    models.run(Job(out=tmp_path, models=("random:qwen3-0.6b",)))
    assert asked[0] == (("models",), models.MODELS)
    assert asked[1][1] == models.CONTEXT
    assert {chosen for _, chosen in asked[2:]} == {("random:qwen3-0.6b",)}
