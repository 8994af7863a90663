"""The memory pass on the tiny model: exact where bytes are counted, and faults that must show."""

from __future__ import annotations

import gc
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compresskit import workload
from compresskit.measure import passes
from compresskit.measure.memory import accounts, residency
from compresskit.measure.memory.accounts import Accounts, Instant
from compresskit.measure.memory.moved import moved_bytes
from compresskit.measure.memory.request import memory_pass
from compresskit.metrics.memory import unattributed
from compresskit.record import Measured, Phase, Unavailable
from compresskit.spec import ProtocolSpec, SamplingSpec, WorkloadSpec
from compresskit.units import Unit

PROMPT, NEW = 96, 8
SEEN = PROMPT + NEW - 1
ROW = 4 * 2 * 32  # layers, key/value heads, head dimension
SMALL = 4 << 20
"""What two readings of the same process may differ by: a handful of allocations."""


def bench_of(system, *, batch=1, prompt=PROMPT, new=NEW):
    shape = WorkloadSpec(prompt_tokens=prompt, new_tokens=new, batch_sizes=(batch,))
    prompts = workload.prompts(system.tokenizer, shape, count=batch, seed=0)
    return passes.Bench(
        system=system,
        prompts=prompts.ids,
        workload=shape,
        protocol=ProtocolSpec(),
        sampling=SamplingSpec(),
        seed=0,
    )


def run(opened, **shape):
    bench = bench_of(opened.system, **shape)
    return memory_pass(bench, phases=opened.phases, parameters=opened.parameters)


def rest(memory, phase="decode"):
    return unattributed(memory.phases[phase]).reading.value


def part(memory, name, phase="decode"):
    return memory.phases[phase].parts[name].value


@contextmanager
def readable():
    if residency.resident() is None:
        pytest.skip("needs /proc/self/smaps")
    yield


CACHES = {
    (): {"keys_values": 2 * 4 * ROW * SEEN},
    ("kv/int8",): {"codes": 2 * ROW * SEEN, "scales": 2 * 2 * ROW // 32 * SEEN},
    ("kv/sink_window:sink=4,window=32",): {"keys_values": 2 * 4 * ROW * 36},
    ("quant/int8",): {"keys_values": 2 * 4 * ROW * SEEN},
    ("quant/int4",): {"keys_values": 2 * 4 * ROW * SEEN},
}


@pytest.mark.parametrize("stack", CACHES, ids=lambda stack: "+".join(stack) or "dense")
def test_cache_weights_and_parts(open_stack, stack):
    with readable(), open_stack(*stack) as opened:
        memory = run(opened)
        assert memory.cache_bytes == CACHES[stack]
        assert memory.tokens_in_cache == SEEN
        moved = moved_bytes(opened.system.model, memory.cache_bytes, batch=1)
        assert memory.moved_bytes == moved
        assert memory.moved_bytes["cache"] == sum(CACHES[stack].values())
    assert list(memory.phases) == ["load", "compress", "prefill", "decode"]
    for phase in memory.phases.values():
        assert phase.counter == "rss"
        assert list(phase.parts) == [name for name in accounts.ORDER if name in phase.parts]
        assert all(one.kind == "measured" for one in phase.parts.values())
    cached = sum(CACHES[stack].values())
    assert part(memory, "cache") == cached
    # A step holds less than its prompt did: hidden states of one token against those of all.
    assert 0 < part(memory, "activations") < part(memory, "activations", "prefill")
    # How little is left over shows only in a process of its own: tests/cli looks at one.
    assert memory.operations_per_step > 50


def test_a_step_dispatches_the_same_operations_at_any_length(open_stack):
    with open_stack() as opened:
        long, short = run(opened), run(opened, prompt=24, new=4)
        assert long.operations_per_step == short.operations_per_step
        # Each int8 layer quantises and dequantises keys and values besides.
        with open_stack("kv/int8") as other:
            assert run(other).operations_per_step > long.operations_per_step


def test_activations_grow_with_the_prompt_by_what_its_hidden_states_take(open_stack):
    with readable(), open_stack() as opened:
        short, long = (
            part(run(opened, prompt=tokens), "activations", "prefill") for tokens in (64, 128)
        )
    # Per token at least one hidden state and the two inner ones of the MLP, in float32.
    assert long - short >= 64 * (128 + 2 * 384) * 4


# Planted faults


def test_a_copy_of_the_weights_that_nobody_owns_is_left_over(open_stack):
    with readable(), open_stack() as opened:
        before = run(opened)
        copy = torch.ones(48 << 20, dtype=torch.uint8)
        after = run(opened)
        assert after.weights_bytes == before.weights_bytes
        assert rest(after) - rest(before) == pytest.approx(copy.nbytes, abs=SMALL)
        assert rest(after, "prefill") - rest(before, "prefill") == pytest.approx(
            copy.nbytes, abs=SMALL
        )


def test_tensors_that_a_step_forgets_to_drop_are_in_its_activations(open_stack):
    with readable(), open_stack() as opened:
        clean = run(opened)
        kept = []

        def leaking(*args, **kwargs):
            kept.append(torch.ones(1 << 20, dtype=torch.uint8))
            return opened.system.step(*args, **kwargs)

        leaky = run(replace(opened, system=replace(opened.system, step=leaking)))
    leaked = part(leaky, "activations") - part(clean, "activations")
    # One for each forward pass, the prefill's included.
    assert leaked == pytest.approx(NEW << 20, abs=1 << 18)
    assert rest(leaky) == pytest.approx(rest(clean), abs=SMALL)


def test_what_an_earlier_request_has_leaked_is_left_over(open_stack):
    with readable(), open_stack() as opened:
        before = run(opened)
        kept = []

        def leaking(*args, **kwargs):
            kept.append(torch.ones(4 << 20, dtype=torch.uint8))
            return opened.system.step(*args, **kwargs)

        for _ in replace(opened.system, step=leaking).generate(
            bench_of(opened.system).request(0, 1)
        ):
            pass
        after = run(opened)
    assert rest(after) - rest(before) == pytest.approx(len(kept) << 22, abs=SMALL)


def test_a_cache_that_keeps_a_token_too_many_is_heavier(open_stack):
    with open_stack("kv/sink_window:sink=4,window=32") as opened:
        right = run(opened)
    with open_stack("kv/sink_window:sink=4,window=33") as opened:
        wrong = run(opened)
    token = 2 * 4 * ROW
    assert wrong.cache_bytes["keys_values"] - right.cache_bytes["keys_values"] == token
    assert wrong.moved_bytes["cache"] - right.moved_bytes["cache"] == token


def test_memory_of_an_earlier_phase_is_not_charged_to_the_request(open_stack):
    with readable(), open_stack() as opened:
        before = run(opened).phases["prefill"].peaks["rss"].value
        large = torch.ones(64 << 20, dtype=torch.uint8)
        del large
        small = [torch.ones(4096, dtype=torch.uint8) for _ in range(4000)]
        del small
        after = run(opened).phases["prefill"].peaks["rss"].value
    assert after - before < SMALL


# Where something cannot be read


def test_without_proc_there_are_reasons_and_the_rest_says_what_is_in_it(open_stack, monkeypatch):
    with open_stack() as opened:
        monkeypatch.setattr(residency, "resident", lambda: None)
        monkeypatch.setattr(residency, "pages", lambda ranges: None)
        memory = run(opened)
    parts = memory.phases["decode"].parts
    assert parts["libraries"].kind == parts["slack"].kind == "unavailable"
    # Nominal bytes stand in for resident ones, so the rest is an estimate too.
    assert parts["weights"].kind == "estimated"
    left = unattributed(memory.phases["decode"])
    assert left.reading.kind == "estimated"
    assert {"libraries", "workspace", "slack"} <= set(left.missing)


def test_a_pass_without_the_phases_before_it_has_no_runtime(open_stack):
    with open_stack() as opened:
        memory = memory_pass(bench_of(opened.system), phases={}, parameters=1)
    assert memory.phases["decode"].parts["runtime"].kind == "unavailable"


# A GPU, replayed


GPU = SimpleNamespace(kind="cuda", ordinals=(0,))


def byte(value):
    return Measured(value=value, unit=Unit.BYTE, source="replay")


@pytest.fixture
def replayed(monkeypatch):
    """torch's counters of a GPU on which a request of 1000 bytes was at its peak."""
    marks = {"reserved_bytes.all.peak": 1500.0, "requested_bytes.all.peak": 1000.0}
    held = [700]
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda gpu: marks)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda gpu: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: held[0])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 1500)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: held.__setitem__(0, 690), raising=False
    )


def test_a_gpu_reconciles_with_its_reserve(replayed):
    model = torch.nn.Linear(10, 10, bias=False)
    books = Accounts(GPU, Unavailable(reason="no NVML"))
    found = books.phase(
        {"cuda_reserved": byte(1500), "process_vram": Unavailable(reason="no NVML")},
        model,
        tensors={
            "cache": byte(90),
            "activations": byte(480),
            "workspace": accounts.gpu_workspace(),
        },
    )
    assert found.counter == "cuda_reserved"
    assert {name: one.value for name, one in found.parts.items()} == {
        "weights": 400,
        "cache": 90,
        "activations": 480,
        "workspace": 10,
        "slack": 500,
    }
    assert unattributed(found).reading.value == 20


def test_where_nvml_tells_the_context_is_a_part(replayed):
    context = accounts.gpu_runtime(byte(2300))
    books = Accounts(GPU, context)
    peaks = {"cuda_reserved": byte(1500), "process_vram": byte(2350)}
    found = books.phase(peaks, torch.nn.Linear(10, 10, bias=False), slack=byte(7))
    assert found.counter == "process_vram"
    assert found.parts["runtime"].value == 800
    assert found.parts["slack"].value == 7
    assert unattributed(found).reading.value == 2350 - 800 - 400 - 7


# The arithmetic


def test_the_rest_may_be_negative_and_is_never_forced():
    parts = {"weights": byte(80), "cache": byte(30)}
    found = unattributed(Phase(peaks={"rss": byte(100)}, counter="rss", parts=parts))
    assert found.reading.value == -10
    assert found.reading.kind == "measured"


@pytest.mark.parametrize(
    "phase",
    [
        Phase(peaks={"rss": byte(100)}),
        Phase(peaks={"rss": byte(100)}, counter="rss"),
        Phase(peaks={"rss": Unavailable(reason="no")}, counter="rss", parts={"cache": byte(1)}),
    ],
)
def test_without_a_peak_or_parts_there_is_no_rest(phase):
    assert unattributed(phase).reading.kind == "unavailable"


def test_the_highest_mark_of_the_watched_run_explains_its_own_workspace():
    books = Accounts(SimpleNamespace(kind="cpu", ordinals=(0,)), byte(50))
    at = Instant(residency.Resident(anonymous=60, libraries=30, files=0, heap_holes=0), 5)
    found = books.phase({"rss": byte(101)}, torch.nn.Module(), at=at, high=byte(120))
    assert found.parts["workspace"].value == 120 - 90
    assert unattributed(found).reading.value == 101 - (50 + 30 + 30 + 5)


# A real model, on this very machine


SHARE = 0.05
"""Most of the decode phase's peak that may be left over."""


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stack"),
    [
        ("eager", ()),
        ("eager", ("quant/int8",)),
        ("eager", ("quant/int4",)),
        ("eager", ("kv/int8",)),
        ("prepacked", ()),
        ("compiled", ()),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inside inductor
def test_smollm2_reconciles(open_stack, mode, stack):
    if mode == "compiled" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    gc.collect()  # what is left of another test's model would be taken for the process's own
    with (
        readable(),
        open_stack(*stack, model="pypi:smollm2-135m", mode=mode) as opened,
    ):
        bench = bench_of(opened.system, prompt=128, new=16)
        bench.timed("span", 0, 1)  # compiles
        memory = memory_pass(bench, phases=opened.phases, parameters=opened.parameters)
    for phase in ("prefill", "decode"):
        peak = memory.phases[phase].peaks["rss"].value
        assert abs(rest(memory, phase)) < SHARE * peak, memory.phases[phase]
    if mode == "compiled":
        # The frozen copy is as large as the weights that it was made of.
        linear = memory.weights_bytes["dense"] + memory.weights_bytes["embedding"]
        assert linear <= memory.weights_bytes["packed"] < 1.1 * linear
        assert part(memory, "compiler") > 0
    if not stack and mode == "eager":
        assert memory.weights_bytes["embedding"] == 49_152 * 576 * 2
        assert memory.cache_bytes == {"keys_values": 23_040 * (128 + 15)}
