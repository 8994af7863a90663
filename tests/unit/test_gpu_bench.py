"""The GPU benchmark without a GPU: every entry runs dry, wrong results and absences are told."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from compresskit_kernels.kv_decode import quantise

from benchmarks.gpu import kernels, records, runner, shapes, speculation, table, timing
from benchmarks.gpu.arms import Absent, Arm, Entry
from benchmarks.gpu.stages import STAGES, Settings, attention, products, weight_only
from compresskit import suite

DRY = Settings.dry()
ABOUT = {"dry_run": True, "copy_bytes_per_second": None}


def test_a_dry_run_writes_every_record_and_a_second_one_none(tmp_path, capsys):
    assert kernels.main(["--out", str(tmp_path), "--dry-run"]) == 0
    first = capsys.readouterr()
    written = sorted(tmp_path.glob("*/*.json"))
    assert {path.parent.name for path in written} == {
        "grouped_matmul", "int8_matmul", "fp8_matmul", "int8_dynamic_matmul", "fp8_dynamic_matmul",
        "kv_decode", "rope_append", "norm_quantise",
    }  # fmt: skip
    assert len(first.err.splitlines()) == len(written)
    for path in written:
        record = json.loads(path.read_text())
        assert record["about"]["device"] == "cpu"
        by_name = {arm["name"]: arm for arm in record["arms"]}
        assert record["baseline"] in by_name
        ours = [arm for name, arm in by_name.items() if name.startswith("compresskit")]
        assert ours
        for arm in record["arms"]:
            assert arm["samples_seconds"] is None  # no speeds without the device
            assert arm["status"] in ("ok", "absent")
            assert (arm["reason"] is None) == (arm["status"] == "ok")
        for arm in ours:
            assert arm["error"] <= arm["error_limit"]
            assert list(arm["ran"]) == [record["op"]]
    stamps = [path.stat().st_mtime_ns for path in written]
    assert kernels.main(["--out", str(tmp_path), "--dry-run"]) == 0
    second = capsys.readouterr()
    assert [path.stat().st_mtime_ns for path in written] == stamps
    assert second.err == ""
    assert second.out == first.out


def test_unknown_stages_and_a_missing_device_are_usage_errors(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--out", str(tmp_path), "--stages", "fused,atention", "--dry-run"])
    assert stopped.value.code == 2
    assert "unknown stage 'atention'; there are weight_only" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        kernels.main(["--out", str(tmp_path)])
    assert "no CUDA device; --dry-run" in capsys.readouterr().err


def entry(*arms, resident=False):
    return Entry("op", {"M": 1}, lambda: torch.ones(3), arms, "good", resident=resident)


def arm(name="good", result=1.0, **fields):
    build = partial(lambda result, copies: [lambda: torch.full((3,), result)] * copies, result)
    return Arm(name, build, fields.pop("moved_bytes", 1), fields.pop("error_limit", 0.01), **fields)


def fails(copies):
    raise RuntimeError("no kernel image")


def missing(copies):
    raise Absent("gemlite is not installed")


def test_each_arm_gets_its_own_verdict():
    """Negative controls: a wrong result, NaN, a failure and an absence, none hides the others."""
    done = runner.run(
        entry(
            arm(), arm("off", 1.02), arm("nan", float("nan")), arm("free", 5.0, error_limit=None),
            arm("own", 2.0, expected=lambda: torch.full((3,), 2.0)),
            replace(arm("fails"), build=fails), replace(arm("missing"), build=missing),
        ),
        DRY,
    )  # fmt: skip
    assert [a["status"] for a in done] == ["ok", "wrong", "wrong", "ok", "ok", "failed", "absent"]
    assert done[1]["error"] == pytest.approx(0.02, rel=1e-3)
    assert done[2]["error"] is None  # no NaN in JSON
    assert done[3]["error"] is None
    assert done[5]["reason"] == "RuntimeError: no kernel image"
    assert done[6]["reason"] == "gemlite is not installed"


def test_a_wrong_kernel_of_ours_has_no_speed_and_sets_the_exit_status():
    record = {
        "op": "op", "shape": {"M": 1}, "baseline": "good", "resident": False,
        "about": {"copy_bytes_per_second": [3e12]},
        "arms": runner.run(entry(arm(), arm("compresskit triton", 1.02)), DRY),
    }  # fmt: skip
    for timed in record["arms"]:
        timed["samples_seconds"] = [1e-6, 3e-6, 2e-6]
        timed["moved_bytes"] = 3_000_000
    assert table.faults([record]) == ["op off by 2.0e-02 of the reference"]
    good, bad = table.render([record]).splitlines()[1:]
    assert good.split()[-3:] == ["2.0", "50%", "1.00x"]
    assert "wrong: off by" in bad
    assert "2.0 " not in bad
    record["arms"][1]["status"] = "ok"
    assert table.faults([record]) == []
    assert "1.00x" in table.render([record]).splitlines()[2]
    record["resident"] = True
    assert "50%" not in table.render([record])


def test_peers_can_be_left_out_but_not_ours_nor_the_baseline():
    one = entry(arm(), arm("compresskit triton"), arm("gemlite A16W4"), arm("bitsandbytes nf4"))
    assert [a.name for a in one.without(["gemlite", "good", "triton"]).arms] == [
        "good", "compresskit triton", "bitsandbytes nf4",
    ]  # fmt: skip
    assert one.without([]) == one


def test_a_record_counts_only_if_whole_and_of_the_same_sort(tmp_path):
    store = records.Store(tmp_path, ABOUT)
    one = entry(arm())
    assert not store.has(one)
    store.write(one, [])
    assert store.has(one)
    assert not records.Store(tmp_path, {**ABOUT, "dry_run": False}).has(one)
    store.path(one).write_text('{"schema": 1, "abo')
    assert not store.has(one)
    assert [path.name for path in (tmp_path / "op").iterdir()] == ["M1.json"]


def test_enough_copies_to_leave_no_weight_in_the_cache():
    assert timing.copies(31_000_000) == 7
    assert timing.copies(10**9) == 2
    assert timing.copies(1000) == timing.MOST_COPIES


def test_copies_differ_and_copy_zero_is_the_same_data():
    first, second, again = (
        weight_only.int4_weight(DRY, seed, size=(64, 128)) for seed in (0, 1, 0)
    )
    assert not torch.equal(first.packed, second.packed)
    assert torch.equal(first.packed, again.packed)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("form", attention.FORMATS, ids=lambda form: form.kind)
def test_bytes_of_a_cache_row_are_those_stored(form, width):
    group = None if form.group is None else min(form.group, width)
    rows = quantise(torch.randn(1, 1, 5, width), form.kind, group=group, dtype=torch.float16)
    assert sum(t.nbytes for t in rows.tensors().values()) == 5 * form.row_bytes(width)


def test_bytes_of_the_weights_are_those_stored():
    for name, make in (
        ("grouped_matmul", weight_only.int4_weight),
        ("int8_matmul", weight_only.int8_weight),
        ("fp8_matmul", weight_only.fp8_weight),
    ):
        size = shapes.TINY_WEIGHTS[0]
        stored = sum(t.nbytes for t in make(DRY, 0, size=size).tensors().values())
        found = next(e for e in STAGES["weight_only"](DRY) if e.op == name)
        rows = found.shape["M"]
        ours = next(a for a in found.arms if a.name.startswith("compresskit"))
        assert ours.moved_bytes == stored + 2 * rows * sum(size)
        dense = next(a for a in found.arms if a.name == products.DENSE)
        assert dense.moved_bytes == 2 * size[0] * size[1] + 2 * rows * sum(size)


def test_names_of_the_full_run_are_unique():
    """On the CPU: only listed, nothing is built. Two entries of one name would share a record."""
    full = replace(DRY, is_dry=False)
    shapes_small = [entry for stage in ("attention", "fused") for entry in STAGES[stage](full)]
    names = [(e.op, e.slug) for e in shapes_small]
    assert len(names) == len(set(names)) > 15


class Gpu:
    """A clock in place of a GPU: a call takes `seconds`, captured calls take them when replayed."""

    def __init__(self, monkeypatch, seconds, captures=True):
        self.now, self.seconds, self.captures = 0.0, seconds, captures
        self.recording = None
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        class Graph:
            def replay(self):
                gpu.now += self.calls * gpu.seconds

        @contextmanager
        def capture(graph):
            if not gpu.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            gpu.recording, graph.calls = graph, 0
            yield
            gpu.recording = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self):
        if self.recording is not None:
            self.recording.calls += 1
        else:
            self.now += self.seconds


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("seconds", [5e-6, 3e-2])
def test_a_sample_is_the_time_of_one_call(monkeypatch, seconds, captures):
    gpu = Gpu(monkeypatch, seconds, captures)
    timed = timing.measure([gpu.call] * 7)
    assert timed.samples == pytest.approx([seconds] * timing.REPLAYS)
    assert timed.graph is captures
    assert timed.calls_per_sample % 7 == 0
    assert timed.calls_per_sample * seconds >= 0.9 * timing.GRAPH_SECONDS


@pytest.mark.parametrize("size", [speculation.FULL, speculation.DRY], ids=["full", "dry"])
def test_suites_of_speculation_are_suites(size, tmp_path):
    """Every row has its dense row in the same mode and on the same text; nothing is misspelt."""
    texts = {
        "work": speculation.work("tiny", size, tmp_path / "question.jsonl"),
        "surface": speculation.surface("tiny", size),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        specs = suite.resolve(suite.read(path))
        digests = {spec.digest() for spec in specs}
        assert all(spec.baseline().digest() in digests for spec in specs)
        assert any(spec.stack for spec in specs)
    rates = {spec.stack[0].params["rate"] for spec in specs if spec.stack}
    assert rates == set(size.rates)
    assert (
        len({spec.workload.text for spec in suite.resolve(suite.read(tmp_path / "work.toml"))}) == 9
    )


def test_a_session_whose_time_is_up_starts_nothing(tmp_path, capsys):
    session = speculation.Session(tmp_path, minutes=0)
    session.run("doctor")
    assert "start again" in capsys.readouterr().err
    assert not session.failed
