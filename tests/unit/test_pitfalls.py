"""Twenty faults that published tools have had; each test is named after the fault and catches it here.

Where a fault has a test file of its own, the test below is the short form against the public
function; its docstring says what would go wrong. Every test holds its own negative control: the
faulty computation, or the faulty record, beside the sound one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compresskit import store, workload
from compresskit.errors import InputError
from compresskit.measure import clock
from compresskit.measure.memory.weights import weight_bytes
from compresskit.measure.passes import Bench, Speed
from compresskit.metrics import METRICS
from compresskit.metrics.pairs import side_by_side
from compresskit.record import (
    Arrival,
    EnergyPass,
    EnergyWindow,
    Estimated,
    GpuState,
    LatencyPass,
    Measured,
    MemoryPass,
    Phase,
    Reading,
    Record,
    Sample,
    Telemetry,
    Turn,
    Unavailable,
)
from compresskit.spec import ProtocolSpec, SamplingSpec, WorkloadSpec
from compresskit.stats import (
    coefficient_of_variation,
    judge as compare_samples,
    mean,
    median,
    ratio_of_medians,
    weighted_mean_difference,
)
from compresskit.system import Chunk
from compresskit.units import Unit, format_quantity
from compresskit.validity import judge

RECORDS = Path(__file__).parents[1] / "golden" / "records" / "v1"


def golden(name: str = "dense") -> Record:
    return store.load(RECORDS / f"synthetic-{name}.json")


def with_passes(record: Record, **passes: Any) -> Record:
    """The record with other passes in its only block; those not named are gone."""
    block = record.blocks[0]
    left = {name: passes.get(name) for name in type(block.passes).model_fields}
    block = block.model_copy(update={"passes": block.passes.model_copy(update=left)})
    return record.model_copy(update={"blocks": (block,)})


def with_arrivals(*requests: list[tuple[float, int]], batch: int = 1, prompt: int = 8) -> Record:
    """The dense record with these repetitions of its latency pass, and nothing else."""
    samples = tuple(
        Sample(arrivals=tuple(Arrival(*mark) for mark in marks), forwards=len(marks))
        for marks in requests
    )
    latency = LatencyPass(
        batch=batch, prompt_tokens=prompt, new_tokens=16, warmups=samples[:1], samples=samples
    )
    record = golden()
    protocol = {**record.spec.protocol.model_dump(mode="json"), "passes": ["latency"]}
    spec = record.spec.replace(protocol=protocol)
    return with_passes(record.model_copy(update={"spec": spec}), latency=latency)


def value(name: str, record: Record) -> float:
    reading = METRICS[name].value(record)
    assert not isinstance(reading, Unavailable), reading
    return reading.value


def codes(record: Record) -> set[str]:
    return {reason.partition(":")[0] for reason in judge(record).reasons}


@pytest.fixture(scope="module")
def tiny(open_stack):
    """The shipped tiny model, dense and eager."""
    with open_stack() as opened:
        yield opened.system


# Chunks of 1, 3 and 1 tokens at 100, 140 and 180 ms: the worked example of vLLM's documentation.
VECTOR_1 = [(0.100, 1), (0.140, 3), (0.180, 1)]


def test_01_the_clock_is_read_before_the_device_has_finished():
    """Asynchronous launches: without waiting, the time of queueing is reported as the work's."""
    now, queued = 0.0, 0.0

    def wait() -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    def chunks():
        nonlocal queued
        for _ in range(3):
            queued += 0.04
            yield Chunk(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]))

    def ends(probe, synchronize) -> float:
        return probe(chunks, synchronize=synchronize, clock=lambda: now).arrivals[-1].seconds

    for probe in (clock.trace, clock.span):
        assert ends(probe, wait) == pytest.approx(0.12)
        wait()
        assert ends(probe, lambda: None) == 0.0


def test_02_the_first_token_is_counted_as_decoded():
    """n tokens in the time of n - 1, or the prefill in the time per token: 36 or 62.5 for 20 and 50."""
    record = with_arrivals(VECTOR_1)
    assert value("tpot_s", record) == pytest.approx(0.020)
    assert value("decode_tokens_per_s", record) == pytest.approx(50.0)
    assert value("e2e_s", record) / 5 == pytest.approx(0.036)
    # A single token was not decoded at all: no number, and not the 0 that some tools write.
    assert METRICS["tpot_s"].value(with_arrivals([(0.1, 1)])).kind == "unavailable"


def test_03_one_name_means_two_quantities():
    """`time per output token` is E2E/n here and (E2E - TTFT)/(n - 1) there: every name has a formula."""
    formula = re.compile(r"^([a-z0-9_]+/\d+): .+")
    ids = [match[1] for metric in METRICS.values() if (match := formula.match(metric.definition))]
    assert len(ids) == len(METRICS) == len(set(ids))
    assert formula.match("time per output token") is None
    assert all(name == metric.name and metric.unit in Unit for name, metric in METRICS.items())


def test_04_inter_token_latency_holds_the_first_token_or_bundles():
    """TTFT among the gaps, or the gap of a chunk of three taken for one token's."""
    record = with_arrivals(VECTOR_1)
    assert METRICS["itl_s"].samples(record) == pytest.approx([0.040, 0.040])
    assert value("tokens_per_step", record) == pytest.approx(2.0)
    assert value("itl_s", record) / value("tokens_per_step", record) == pytest.approx(
        value("tpot_s", record)
    )
    assert max(METRICS["itl_s"].samples(record)) < value("ttft_s", record)


def test_05_prefill_is_told_in_sequences_per_second():
    """A batch of 4 prompts of 128 tokens in 0.25 s is 2048 tokens/s, not 16 sequences/s."""
    record = with_arrivals([(0.25, 1), (0.30, 1)], batch=4, prompt=128)
    assert value("prefill_tokens_per_s", record) == pytest.approx(2048)
    assert METRICS["prefill_tokens_per_s"].unit is Unit.TOKEN_PER_SECOND
    assert 4 / value("ttft_s", record) == pytest.approx(16)


def bench(system, prompt: list[int], shape: WorkloadSpec) -> Bench:
    return Bench(
        system=system,
        prompts=[prompt],
        workload=shape,
        protocol=ProtocolSpec(warmups=1),
        sampling=SamplingSpec(),
        seed=0,
    )


def test_06_a_run_stops_early_and_is_called_fast(tiny):
    """Speed passes ignore the stop token; a record of another length enters no comparison."""

    def delivered(request) -> int:
        return sum(int(chunk.lengths.sum()) for chunk in tiny.generate(request))

    request = bench(tiny, [5, 6, 7], WorkloadSpec(prompt_tokens=3, new_tokens=12)).request(0, 1)
    assert request.stop == ()
    assert delivered(request) == 12
    # Had the first token been a stop token, the answer would have been one token long.
    first = int(next(iter(tiny.generate(request))).tokens[0, 0])
    assert delivered(replace(request, stop=(first,))) == 1
    assert "osl_mismatch" in codes(golden("short"))
    assert judge(golden("short")).verdict == "INVALID"
    assert "osl_mismatch" not in codes(golden())


def test_07_the_warm_up_is_not_the_workload(tiny, monkeypatch):
    """Warm-ups of 2 tokens, or of another batch, leave compilation and allocation in the samples."""
    asked: list[tuple[Any, ...]] = []

    def timed(self, probe, index, batch):
        request = self.request(index, batch)
        asked.append((probe, tuple(request.tokens.shape), request.max_new_tokens))
        return Sample(arrivals=(Arrival(0.1, 1),), forwards=1)

    monkeypatch.setattr(Bench, "timed", timed)
    shape = WorkloadSpec(prompt_tokens=4, new_tokens=9, batch_sizes=(1, 3))
    speed = Speed(bench(tiny, [1, 2, 3, 4], shape), latency=True, throughput=True, batched=True)
    speed.warm()
    warm = list(asked)
    asked.clear()
    speed.turn(0)
    assert warm == asked
    assert set(warm) == {("trace", (1, 4), 9), ("span", (1, 4), 9), ("span", (3, 4), 9)}
    # Where it was not enough, the trend from the first repetitions to the last is said.
    cooling = with_arrivals(*([(0.1, 1), (0.1 + s, 15)] for s in (2, 1.9, 1.8, 1.1, 1.0, 1.0)))
    steady = with_arrivals(*([(0.1, 1), (0.1 + s, 15)] for s in (1.0, 1.01, 0.99) * 2))
    assert "not_stationary" in codes(cooling)
    assert "not_stationary" not in codes(steady)


def test_08_a_cache_answers_for_the_model(tiny):
    """The same prompt again is served from a prefix cache: every repetition has its own prompt."""
    found = workload.prompts(tiny.tokenizer, WorkloadSpec(prompt_tokens=16), 40, 0).ids
    assert len({tuple(ids) for ids in found}) == 40
    with pytest.raises(InputError, match="distinct prompts"):
        workload.prompts(tiny.tokenizer, WorkloadSpec(prompt_tokens=16), 10**6, 0)
    hit = golden().model_copy(update={"facts": {"prefix_cache_hits": 3}})
    assert "prefix_cache_hit" in codes(hit)
    declared = hit.model_copy(update={"facts": {"prefix_cache_hits": 3, "prefix_cache": "on"}})
    assert "prefix_cache_hit" not in codes(declared)


def test_09_random_tokens_or_weights_stand_for_real_ones(tiny):
    """Random ids flatter eviction, experts and speculation; random weights have no quality."""
    folder = Path(workload.__file__).parents[1] / "assets" / "text"
    natural = " ".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.txt"))
    for ids in workload.prompts(tiny.tokenizer, WorkloadSpec(prompt_tokens=24), 2, 0).ids:
        # Without the ends, where a character may be cut in two.
        assert tiny.tokenizer.decode(ids[2:-2]) in natural
    noise = torch.randint(10, 250, (24,), generator=torch.Generator().manual_seed(0))
    assert tiny.tokenizer.decode(noise.tolist()) not in natural
    random = golden("int8")
    model = random.model.model_copy(update={"baseline": "random"})
    assert "random_weights" in codes(random.model_copy(update={"model": model}))
    assert "random_weights" not in codes(random)


def test_10_a_list_is_extended_by_its_own_content():
    """Ten requests of 500 ms and 31 gaps of 20 ms: 310 gaps; a published tool's list grew to 1,750."""
    request = [(0.5 + 0.02 * step, 1) for step in range(32)]
    record = with_arrivals(*[request] * 10)
    for _ in range(3):  # asking again changes nothing
        gaps = METRICS["itl_s"].samples(record)
        assert (len(gaps), mean(gaps)) == (310, pytest.approx(0.020))
    so_far: list[float] = []
    faulty: list[float] = []
    for _ in range(10):
        so_far += [0.5] + [0.02] * 31
        faulty += so_far[1:]
    assert (len(faulty), mean(faulty)) == (1750, pytest.approx(0.0323, abs=5e-5))


def test_11_a_mean_of_ratios_a_picked_percentile_a_spread_without_ddof():
    """100 tokens in 1 s and in 2 s are 66.67 tokens/s, not 75; the median of 1..10 is 5.5, not 6."""
    record = with_arrivals([(0.01, 1), (1.0, 99)], [(0.01, 1), (2.0, 99)])
    assert value("output_tokens_per_s", record) == pytest.approx(66.67, abs=0.005)
    assert mean(METRICS["output_tokens_per_s"].samples(record)) == pytest.approx(75.0)
    assert median(range(1, 11)) == 5.5
    assert sorted(range(1, 11))[int(10 * 0.5)] == 6
    spread = coefficient_of_variation(range(1, 11)) * 5.5
    assert spread == pytest.approx(3.027650, abs=5e-7)
    assert spread != pytest.approx(2.872281, abs=5e-4)


def in_bytes(number: float) -> Measured:
    return Measured(value=number, unit=Unit.BYTE, source="test")


def with_memory(record: Record, **phases: dict[str, float]) -> Record:
    memory = record.blocks[0].passes.memory
    windows = {
        name: Phase(peaks={counter: in_bytes(peak) for counter, peak in peaks.items()})
        for name, peaks in phases.items()
    }
    return with_passes(record, memory=memory.model_copy(update={"phases": windows}))


def test_12_allocated_reserved_and_resident_memory_share_one_name():
    """Four counters stay four; a headline peak is never the highest of all; MB is 10^6 bytes."""
    peaks = {"rss": 9e9, "cuda_allocated": 3e9, "cuda_reserved": 5e9, "process_vram": 6e9}
    record = with_memory(golden(), decode=peaks)
    assert value("peak_bytes", record) == 9e9
    gpu = record.device.model_copy(update={"kind": "cuda"})
    on_gpu = value("peak_bytes", record.model_copy(update={"device": gpu}))
    assert on_gpu == 3e9
    assert on_gpu != max(peaks.values())
    assert format_quantity(1_000_000, Unit.BYTE) == "1.00 MB"
    assert format_quantity(2**20, Unit.BYTE) == "1.05 MB"


def test_13_loading_and_quantising_pollute_the_peak():
    """The peak of use is that of prefill and decoding, each from its own window."""
    record = with_memory(
        golden(),
        load={"rss": 18.6e9},
        compress={"rss": 20e9},
        prefill={"rss": 9e9},
        decode={"rss": 8e9},
    )
    assert value("peak_bytes", record) == 9e9
    # A phase without a reading is no phase of 0 bytes: the peak is then unknown.
    memory = record.blocks[0].passes.memory
    unknown: dict[str, Reading] = {"rss": Unavailable(reason="not Linux")}
    phases = {**memory.phases, "decode": Phase(peaks=unknown)}
    lost = with_passes(record, memory=memory.model_copy(update={"phases": phases}))
    assert METRICS["peak_bytes"].value(lost).kind == "unavailable"


def test_14_packed_bytes_lie_and_embeddings_are_forgotten():
    """A packed module answers for itself, a tied head counts once, and all of it is in the bits."""

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # What torch sees: int32 words, eight weights in each.
            self.register_buffer("codes", torch.zeros(128, dtype=torch.int32))

        def held_bytes(self) -> dict[str, int]:
            return {"packed": 512, "scales": 64}

    embedding = torch.nn.Embedding(100, 8)
    head = torch.nn.Linear(8, 100, bias=False)
    head.weight = embedding.weight
    held = weight_bytes(torch.nn.Sequential(embedding, Packed(), head))
    assert sum(held.values()) == 512 + 64 + 100 * 8 * 4
    memory = MemoryPass(
        batch=1, tokens_in_cache=1, weights_bytes=held, parameters=1024 + 800, cache_bytes={}
    )
    bits = value("effective_bits_per_parameter", with_passes(golden(), memory=memory))
    assert bits == pytest.approx(8 * 3776 / 1824)
    assert bits > 4 * 2  # not the 4 bits that were asked for


def with_energy(**windows: Any) -> Record:
    sides = {"prefill": (), "generate": (), **windows}
    return with_passes(golden(), energy=EnergyPass(prompt_tokens=32, new_tokens=16, **sides))


def window(
    joules: float | None, *, tokens: int = 400, seconds: float = 20.0, **changes: Any
) -> EnergyWindow:
    reading = (
        Unavailable(reason="counter did not tick")
        if joules is None
        else Measured(value=joules, unit=Unit.JOULE, source="nvml_counter")
    )
    shape = {"scope": "gpu", "devices": ("a",), "ticks": 200, "window_seconds": seconds}
    return EnergyWindow(reading=reading, tokens=tokens, **{**shape, **changes})


def test_15_energy_from_a_counter_that_cannot_resolve_the_window():
    """No tick is not 0 J; a short window, few ticks or a cross-check that fails are said."""
    sound = with_energy(generate=(window(120.0),) * 5)
    assert value("j_per_output_token", sound) == pytest.approx(0.3)
    assert codes(sound) & {"window_too_short", "energy_cross_check", "zero_energy"} == set()
    for joules in (None, 0.0):
        reading = METRICS["j_per_output_token"].value(with_energy(generate=(window(joules),)))
        assert (reading.kind, reading.value) == ("unavailable", None)
        assert "tick" in reading.reason
    assert "window_too_short" in codes(with_energy(generate=(window(12.0, seconds=2.0),) * 5))
    assert "window_too_short" in codes(with_energy(generate=(window(120.0, ticks=3),) * 5))
    doubled = window(240.0, integrated=Measured(value=120.0, unit=Unit.JOULE, source="power"))
    assert "energy_cross_check" in codes(with_energy(generate=(doubled,) * 5))


def test_16_joules_of_unlike_boundaries_are_added():
    """GPU and package, measured and estimated are never one number; net stands beside gross only."""
    idle = window(600.0, tokens=0)  # 30 W for 20 s
    sound = with_energy(generate=(window(1200.0),) * 2, idle=idle)
    assert value("j_per_output_token", sound) == pytest.approx(3.0)
    assert value("net_j_per_output_token", sound) == pytest.approx((1200 - 600) / 400)
    assert value("idle_watts", sound) == pytest.approx(30.0)
    estimate = Estimated(value=1200.0, unit=Unit.JOULE, model="TDP times utilisation")
    for other in (
        window(50.0, scope="package"),
        window(1200.0).model_copy(update={"reading": estimate}),
    ):
        mixed = with_energy(generate=(window(1200.0), other))
        assert METRICS["j_per_output_token"].value(mixed).kind == "unavailable"
    # Without an idle window nothing is subtracted, and nothing is called net.
    bare = with_energy(generate=(window(1200.0),))
    assert METRICS["net_j_per_output_token"].value(bare).kind == "unavailable"


def looks(**last: Any) -> Record:
    """The dense record with two looks at a GPU, ten minutes apart."""
    before = {"throttled_seconds": {"thermal": 5.0, "power": 9.0}, "foreign_processes": 0}
    gpus = [GpuState(device="a", **state) for state in (before, {**before, **last})]
    record = golden()
    telemetry = tuple(
        Telemetry(seconds=at, gpus=(gpu,)) for at, gpu in zip((0.0, 600.0), gpus, strict=True)
    )
    block = record.blocks[0].model_copy(update={"telemetry": telemetry})
    return record.model_copy(update={"blocks": (block,)})


def test_17_a_throttled_or_shared_machine_gives_publishable_numbers():
    """Violation time that grows, another's process, more load than CPUs: the record says so itself."""
    assert codes(looks()) & {"throttled", "foreign_process", "machine_loaded"} == set()
    hot = looks(throttled_seconds={"thermal": 65.0, "power": 9.0})
    assert "throttled" in codes(hot)
    assert judge(hot).verdict == "INVALID"
    assert "throttled" in codes(looks(throttle=("power_cap",)))
    shared = looks(foreign_processes=1)
    assert "foreign_process" in codes(shared)
    assert judge(shared).verdict == "INVALID"
    loaded = golden()
    block = loaded.blocks[0].model_copy(update={"load_average": (7.0, 7.0, 7.0)})
    assert "machine_loaded" in codes(loaded.model_copy(update={"blocks": (block,)}))


def test_18_perplexities_of_unlike_protocols_are_subtracted():
    """8.79 and 5.47 are the same model under two protocols: a difference of them is refused."""
    from compresskit.compare.agree import refusals

    base, new = golden(), golden("int8")
    assert list(refusals(base, base)) == []
    likelihood = base.quality.likelihood.model_copy(update={"protocol_id": "embedded:window=2048"})
    quality = base.quality.model_copy(update={"likelihood": likelihood})
    other = base.model_copy(update={"quality": quality})
    assert any("quality protocol differs" in reason for reason in refusals(base, other))

    def with_baseline(digest: str) -> Record:
        fidelity = new.quality.fidelity.model_copy(update={"baseline_digest": digest})
        quality = new.quality.model_copy(update={"fidelity": fidelity})
        return new.model_copy(update={"quality": quality})

    assert "protocol_mismatch" in codes(with_baseline("0" * 12))
    assert "protocol_mismatch" not in codes(with_baseline(new.spec.baseline().digest()))


def paired(record: Record, pair: str | None) -> Record:
    block = record.blocks[0]
    count = len(block.passes.latency.samples)
    turns = tuple(Turn(round=i, position=0, started=float(i)) for i in range(count))
    changed = block.model_copy(update={"pair": pair, "turns": turns})
    return record.model_copy(update={"blocks": (changed,)})


def test_19_deltas_are_unpaired_or_rounded():
    """Runs apart have no pairs; pairing shows what points hide; 0.945 is not rounded up to 0.95."""
    dense, int8 = golden(), golden("int8")
    metric = METRICS["ttft_s"]
    assert side_by_side(metric, paired(dense, None), paired(int8, None)).one == []
    assert side_by_side(metric, paired(dense, "x"), paired(int8, "y")).one == []
    assert len(side_by_side(metric, paired(dense, "x"), paired(int8, "x")).one) == 5
    # A quality loss of 0.01 nats among windows that differ by 0.5: only pairs show it.
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.5, 16)
    delta = weighted_mean_difference(base + 0.01, base, [1.0] * 16)
    assert delta.low > 0
    assert 2 * base.std() / 4 > 0.01
    assert ratio_of_medians([0.9449] * 8, [1.0] * 8).value < 0.945
    # 5.04 % slower prints as 1.05, the factor itself, and is still beyond it.
    verdict = compare_samples([1.0] * 8, [1.0504] * 8, lower_is_better=True, paired=True)
    assert (verdict.word, f"{verdict.ratio.value:.2f}") == ("worse", "1.05")


def test_20_a_saving_is_simulated_or_its_kernel_never_ran():
    """Fake quantisation has no speed; a promised kernel that did not run is no kernel."""
    fake = golden().model_copy(update={"simulated": ("kv/fake",)})
    assert codes(fake) == {"simulated_speed"}
    assert judge(fake).verdict == "INVALID"
    silent = golden("simulated")
    assert METRICS["decode_tokens_per_s"].value(silent).kind == "unavailable"
    assert "simulated" in METRICS["decode_tokens_per_s"].value(silent).reason
    int8 = golden("int8")
    promise = {"promised_kernels": ["int8_matmul"]}
    ran = int8.model_copy(update={"facts": promise, "kernels": {"int8_matmul": "onednn"}})
    assert "kernel_not_engaged" not in codes(ran)
    for kernels in ({}, {"int8_matmul": "reference"}):
        idle = int8.model_copy(update={"facts": promise, "kernels": kernels})
        assert "kernel_not_engaged" in codes(idle)
    # And the bytes are those that are stored, not those that were asked for.
    assert value("weights_bytes", int8) == 112_000_000
