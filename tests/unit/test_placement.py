"""A model on more than one device: the same answers, told where it lies, and what cannot be done refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compresskit import artefact as artefacts, catalogue, runner, sweep
from compresskit.cli import options
from compresskit.device import Device, resolve, synchronizer
from compresskit.engines.native import Native
from compresskit.errors import Conflict, SpecError
from compresskit.hf import parallel, placement, synthetic
from compresskit.hf.sources import cache as sources_cache
from compresskit.measure.energy import counters
from compresskit.measure.energy.turns import Energy
from compresskit.measure.memory.accounts import gpu_slack
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.measure.memory.vram import ProcessVram
from compresskit.metrics.roofline import bound
from compresskit.record import Record, Unavailable
from compresskit.spec import PlacementSpec, RunSpec, SamplingSpec
from compresskit.suite import Suite, resolve as rows
from compresskit.system import Request
from compresskit.traits import Trait

HOST_GB = 0.0026
"""Of the 3.4 MB of `tiny`: the embedding and one of four blocks fit, the rest goes to disk."""
RANDOM = "random:llama-3.2-1b:layers=3,divide=16,vocabulary=512"
RESULTS = Path(__file__).parents[2] / "results"


def spec(*methods, model="tiny", host_gb=HOST_GB, mode="eager", how="spread") -> RunSpec:
    limits = {} if host_gb is None else {"host_gb": host_gb}
    placed = None if host_gb is None and how == "spread" else {"how": how, **limits}
    return RunSpec().replace(
        model={"name": model},
        device="cpu",
        engine={"mode": mode, "placement": placed},
        stack=[catalogue.parse_method(one) for one in methods],
        workload={"prompt_tokens": 12, "new_tokens": 4},
        protocol={"passes": ["latency", "memory", "energy"], "repeats": 1, "warmups": 0},
    )


def opened(one: RunSpec):
    return artefacts.opened(artefacts.plan(one))


def greedy(system, new=12) -> list[int]:
    request = Request(torch.arange(5, 25).unsqueeze(0), new, SamplingSpec())
    return torch.cat([chunk.tokens for chunk in system.generate(request)], dim=1)[0].tolist()


@pytest.mark.parametrize(
    "methods", [(), ("kv/int8",), ("kv/sink_window:window=8,sink=2",), ("speculative/ngram",)]
)
def test_tokens_are_those_of_the_model_in_one_place(methods):
    with opened(spec(*methods, host_gb=None)) as whole:
        expected = greedy(whole.system)
    with opened(spec(*methods)) as spread:
        assert greedy(spread.system) == expected
        # Not because it lay in one place after all.
        assert {"cpu", "disk"} <= set(spread.system.facts["placement"]["holds"])
    assert len(set(expected)) > 3


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_cache, "root", lambda chosen=None: tmp_path / "cache")


def test_random_weights_are_drawn_where_they_lie(own_cache, monkeypatch):
    with opened(spec(model=RANDOM, host_gb=None)) as whole:
        expected = greedy(whole.system)
    with opened(spec(model=RANDOM, host_gb=0.0009)) as spread:
        assert {"cpu", "disk"} <= set(spread.system.facts["placement"]["holds"])
        assert greedy(spread.system) == expected
        assert spread.system.synthetic == "synthetic weights"
    # The control: with other dice the answer is another one.
    dice = synthetic._dice
    monkeypatch.setattr(synthetic, "_dice", lambda known, where, seed: dice(known, where, seed + 1))
    with opened(spec(model=RANDOM, host_gb=0.0009)) as other:
        assert greedy(other.system) != expected


def test_gpus_of_one_kind_draw_different_blocks(monkeypatch):
    class Generator:
        def __init__(self, where):
            self.where = where

        def manual_seed(self, seed):
            return (self.where, seed)

    monkeypatch.setattr(synthetic.torch, "Generator", Generator)
    known: dict = {}
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert synthetic._dice(known, first, 7) == (first, 7)
    assert synthetic._dice(known, second, 7) == (second, 8)


def test_the_record_says_what_lies_where():
    record = runner.run(spec())
    assert record.status == "ok", record.reason
    told = record.facts["placement"]
    memory = record.blocks[0].passes.memory
    size = 4 * memory.parameters
    held = {place: one["bytes"] for place, one in told["holds"].items()}
    buffers = memory.weights_bytes["buffer"]
    assert told["how"] == "spread"
    assert all(one["modules"] > 0 for one in told["holds"].values())
    # Every byte is somewhere, once: the head shares the embedding's.
    assert sum(held.values()) == sum(memory.weights_bytes.values()) == size + buffers
    assert held["disk"] == memory.weights_bytes["on_disk"] > size // 4
    # A step reads all of them, wherever they come from; memory is explained by what stays there.
    read = sum(part for kind, part in memory.moved_bytes.items() if kind != "cache")
    assert read == size
    resident = memory.phases["load"].parts["weights"]
    assert resident.kind != "measured" or resident.value <= held["cpu"] + 64 * 4096
    assert record.spec.label() == "dense (eager, spread)"
    assert record.device.gpus is None
    assert Record.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("methods", "mode", "words"),
    [
        (("quant/int8",), "eager", "quant/int8 needs 'modules', which placement 'spread' does"),
        (("speculative/layer_skip",), "eager", "needs 'modules', which placement 'spread' does"),
        ((), "compiled", "'compiled' needs 'static_shapes', which placement 'spread' does not"),
        ((), "prepacked", "mode 'prepacked' needs 'modules', which placement 'spread' does not"),
    ],
)
def test_what_reaches_for_weights_is_refused_before_any_is_loaded(
    methods, mode, words, monkeypatch
):
    monkeypatch.setattr("compresskit.hf.load.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(Conflict, match=words), opened(spec(*methods, mode=mode)):
        pass


def test_the_same_stacks_are_legal_in_one_place():
    for methods in (("quant/int8",), ("speculative/layer_skip",)):
        artefacts.plan(spec(*methods, host_gb=None)).check()


def test_nothing_to_spread_is_refused():
    with pytest.raises(Conflict, match="host_gb"):
        Native(placement=PlacementSpec(how="spread")).vet(
            artefacts.plan(spec()).loaded.path, resolve("cpu")
        )


def test_quantised_checkpoints_are_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Conflict, match="come quantised"):
        Native(placement=PlacementSpec(how="spread", host_gb=1.0)).vet(tmp_path, resolve("cpu"))


def test_caches_of_ours_stay_on_one_device_that_computes():
    engine = Native(placement=PlacementSpec(how="spread"))
    one = Device(kind="cuda", name="fake", memory_bytes=1)
    assert Trait.OWN_CACHE not in engine.loses(one)
    assert engine.loses(one.using((1, 0)))[Trait.OWN_CACHE] == "placement 'spread'"
    assert not Native().loses(one.using((0, 1)))


def test_a_draft_is_not_placed():
    assert Native(placement=PlacementSpec(how="spread")).for_others() == Native()


# The spec -----------------------------------------------------------------------------------------


def test_runs_without_a_placement_keep_their_digests():
    # Records of today's fields: older ones have been given new digests before, by other fields.
    committed = sorted((RESULTS / "amd-epyc-2c-af34" / "kv-tiny").glob("*.json"))
    documents = [json.loads(path.read_text()) for path in committed]
    assert len(documents) > 3
    for document in documents:
        one = RunSpec.decode(document["spec"], where="record")
        assert one.digest() == document["digest"]
        assert "placement" not in one.model_dump(mode="json")["engine"]
        placed = one.replace(engine={"placement": {"how": "spread"}})
        assert placed.digest() != one.digest()
        assert placed.baseline().engine.placement == placed.engine.placement


def test_placed_runs_are_measured_beside_placed_ones():
    assert sweep._comparable(spec()) == sweep._comparable(spec("kv/int8", mode="compiled"))
    assert sweep._comparable(spec()) != sweep._comparable(spec(host_gb=None))


def test_the_command_line_says_it_in_one_word():
    asked = options.engine("eager", "spread:device_gb=20,host_gb=64.5")
    assert asked["placement"] == {"how": "spread", "device_gb": 20.0, "host_gb": 64.5}
    assert options.engine("eager") == {"mode": "eager"}
    for wrong, words in (
        ("spred", "spread"),
        ("spread:gpu=3", "Known here: device_gb, host_gb, how"),
        ("spread:device_gb=0", "greater than 0"),
        ("tensor_parallel:host_gb=3", "Leave them out"),
    ):
        with pytest.raises(SpecError, match=words):
            options.engine("eager", wrong)


def test_a_suite_places_all_its_rows():
    suite = Suite.decode({"name": "s", "placement": {"how": "spread"}, "variant": [{}]}, where="s")
    assert [one.engine.placement.how for one in rows(suite)] == ["spread"]


# What only CUDA reaches, with fakes ---------------------------------------------------------------


def test_limits_are_of_what_is_free_and_asked_for(monkeypatch):
    free = {0: 80_000_000_000, 1: 80_000_000_000, "cpu": 100_000_000_000}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: dict(free))
    two = Device(kind="cuda", name="fake", memory_bytes=1).using((0, 1))
    spread = PlacementSpec(how="spread", device_gb=20.0)
    assert placement.limits(spread, two) == {
        0: 20_000_000_000,
        1: 20_000_000_000,
        "cpu": 9 * 10**10,
    }
    greedy_one = PlacementSpec(how="spread", device_gb=500.0, host_gb=1.0)
    assert placement.limits(greedy_one, two)[1] == 80_000_000_000
    cpu = Device(kind="cpu", name="fake", memory_bytes=1)
    assert placement.limits(greedy_one, cpu) == {"cpu": 1_000_000_000}


def test_homes_are_found_by_the_longest_name():
    places = {"model.embed": 0, "model.layers.1": 1, "model.layers.10": "cpu", "head": "disk"}
    model = SimpleNamespace(hf_device_map=places)
    assert placement.home(model, "model.layers.1.mlp.up") == "cuda:1"
    assert placement.home(model, "model.layers.10.mlp.up") == "cpu"
    assert placement.home(model, "head") == "disk"
    assert placement.home(model, "elsewhere") is None
    assert placement.gpus(model) == (0, 1)
    assert placement.gpus(nn.Linear(1, 1)) == ()


def test_waiting_peaks_and_slack_cover_every_gpu(monkeypatch):
    waited, reset = [], []
    peaks = {0: 100, 2: 30}
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda gpu: 2 * peaks[gpu])
    stats = {0: {"reserved_bytes.all.peak": 9, "requested_bytes.all.peak": 5}, 2: {}}
    monkeypatch.setattr(torch.cuda, "memory_stats", stats.__getitem__)
    device = Device(kind="cuda", name="fake", memory_bytes=1).using((2, 0))
    synchronizer(device)()
    assert waited == [0, 2]
    meter = PeakMeter(device)
    meter.start()
    read = meter.read()
    assert reset == [0, 2]
    assert read["cuda_allocated"].value == 130
    assert read["cuda_reserved"].value == 260
    assert "sum of the peaks of 2 GPUs" in read["cuda_allocated"].source
    assert gpu_slack(device.ordinals).value == 4


def process(held):
    mine = [] if held is None else [SimpleNamespace(pid=os.getpid(), usedGpuMemory=held)]
    return SimpleNamespace(ask=lambda function: mine)


def test_memory_of_the_process_is_summed_or_not_told():
    assert ProcessVram((process(50), process(7))).now().value == 57
    assert ProcessVram((process(50), process(None))).now().kind == "unavailable"


def test_energy_is_counted_on_every_gpu_that_works(monkeypatch):
    asked = []

    def find(device, ordinals):
        asked.append(ordinals)
        return counters.Null("fake")

    monkeypatch.setattr(counters, "find", find)
    monkeypatch.setattr("compresskit.measure.energy.turns.synchronizer", lambda device: None)
    device = Device(kind="cuda", name="fake", memory_bytes=1).using((0, 3))
    # Offloaded: no parameter is on a GPU, yet the GPUs of the placement work.
    model = nn.Linear(1, 1, device="meta")
    Energy(SimpleNamespace(system=SimpleNamespace(device=device, model=model), seed=0))
    assert asked == [(0, 3)]


# Tensor parallel ----------------------------------------------------------------------------------


def test_one_process_alone_is_told_how_to_start_more(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SpecError, match="torchrun --nproc-per-node 2"):
        artefacts.plan(spec(host_gb=None, how="tensor_parallel")).check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    artefacts.plan(spec(host_gb=None, how="tensor_parallel")).check()
    cuda = Device(kind="cuda", name="fake", memory_bytes=1)
    with pytest.raises(SpecError, match="4 processes, 2 GPUs"):
        parallel.vet(cuda, 2)
    parallel.vet(cuda, 4)


def test_each_process_has_its_gpu_and_the_meter_all(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    cuda = Device(kind="cuda", name="fake", memory_bytes=1)
    shared = PlacementSpec(how="tensor_parallel")
    assert parallel.own(shared, cuda) == (2,)
    assert parallel.metered(shared, cuda) == (0, 1, 2, 3)
    assert parallel.own(PlacementSpec(how="spread"), cuda) == ()
    assert parallel.metered(None, cuda) == (0,)


def test_loops_that_go_by_time_and_caches_of_ours_are_refused_in_parallel():
    for method in ("speculative/ngram", "kv/int8", "quant/int8"):
        with pytest.raises(Conflict, match="which placement 'tensor_parallel' does not leave"):
            artefacts.plan(spec(method, host_gb=None, how="tensor_parallel")).check()


def test_random_weights_are_in_no_file_to_be_cut(own_cache):
    with pytest.raises(Conflict, match="random ones"):
        artefacts.plan(spec(model=RANDOM, host_gb=None, how="tensor_parallel")).check()


@pytest.mark.slow
def test_two_processes_share_a_model_and_leave_one_record(tmp_path):
    """Really two, over gloo."""
    code = """
import sys, json, torch
sys.path.insert(0, sys.argv[1])
import test_placement as t
from compresskit import sweep
from compresskit.cli.progress import SweepProgress
one = t.spec(host_gb=None, how="tensor_parallel")
with SweepProgress() as watcher:
    found = sweep.run([one], suite="s", out=t.Path(sys.argv[2]), resume=False, watcher=watcher)
with t.opened(one) as artefact:
    tokens = t.greedy(artefact.system)
rank = t.parallel.Processes.found().rank
(t.Path(sys.argv[2]) / f"{rank}.json").write_text(json.dumps(tokens))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun sets, without the seconds that it takes itself.
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [one.communicate(timeout=240)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0], said[0][-2000:] + said[1][-2000:]
    with opened(spec(host_gb=None)) as whole:
        expected = greedy(whole.system)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [
        expected
    ] * 2
    (path,) = tmp_path.glob("*/s/*.json")
    record = Record.model_validate_json(path.read_text())
    assert record.status == "ok", record.reason
    told = record.facts["placement"]
    memory = record.blocks[0].passes.memory
    assert told["processes"] == 2
    size = 4 * memory.parameters + memory.weights_bytes["buffer"]
    for held in told["holds"].values():
        assert size / 2 <= held["bytes"] < 0.51 * size
    assert sum(memory.weights_bytes.values()) == size
    # Keys and values of both: 2 x 4 layers x 2 heads x 32 numbers of 4 bytes.
    assert sum(memory.cache_bytes.values()) == 2 * 4 * 2 * 32 * 4 * memory.tokens_in_cache
    energy = record.blocks[0].passes.energy
    assert "processes" in energy.generate[0].reading.reason
    assert "first of 2 processes" in record.facts["warnings"][0]
    assert isinstance(bound(record), Unavailable)
    assert "several read their shares" in bound(record).reason
