"""The roofline: hand-computed times of one step, and no tag without its evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.metrics import METRICS
from compresskit.metrics.roofline import Bound, bound
from compresskit.record import Limits, Measured, Record, Unavailable
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"
# The synthetic dense run: 10^8 parameters, 200 MB of weights, 50 ms a step, batch 1.
STEP_S = 0.050


def limits(
    *,
    bandwidth: float = 10e9,
    flops: float = 400e9,
    dispatch: float = 2e-6,
    threads: int | None = 1,
    dtype: str = "bfloat16",
) -> Limits:
    def one(value: float, unit: Unit) -> Measured:
        return Measured(value=value, unit=unit, source="synthetic")

    return Limits(
        copy_bytes_per_second=one(bandwidth, Unit.BYTE_PER_SECOND),
        matmul_flops_per_second=one(flops, Unit.FLOP_PER_SECOND),
        dispatch_seconds=one(dispatch, Unit.SECOND),
        threads=threads,
        dtype=dtype,
    )


def made(
    name: str = "dense",
    *,
    moved: dict[str, int] | None = None,
    ops: int | None = None,
    known: Limits | None = None,
    memory: dict[str, int] | None = None,
) -> Record:
    record = store.load(GOLDEN / f"synthetic-{name}.json")
    block = record.blocks[0]
    moved = {"dense": 198_000_000, "cache": 2_000_000} if moved is None else moved
    weighed = block.passes.memory.model_copy(
        update={"moved_bytes": moved, "operations_per_step": ops, **(memory or {})}
    )
    passes = block.passes.model_copy(update={"memory": weighed})
    return record.model_copy(
        update={
            "blocks": (block.model_copy(update={"passes": passes}),),
            "limits": limits() if known is None else known,
        }
    )


def fraction(record: Record):
    return METRICS["roofline_fraction"].value(record)


def test_bytes_over_bandwidth_over_time():
    # 200 MB at 10 GB/s are 20 ms of a step of 50 ms.
    record = made()
    assert fraction(record).value == pytest.approx(0.4)
    assert METRICS["moved_bytes_per_s"].value(record).value == pytest.approx(4e9)


def test_three_times_and_the_largest_names_the_step():
    # 20 ms of memory; 2 x 10^8 x 0.99 / 400 GFLOP/s = 0.495 ms; 1000 x 2 us.
    found = bound(made(ops=1000))
    assert found.seconds == pytest.approx(STEP_S)
    assert found.memory == pytest.approx(20e-3)
    assert found.compute == pytest.approx(0.495e-3)
    assert found.launch == pytest.approx(2e-3)
    assert found.tag == "memory-bound"
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("known", "tag"),
    [
        (limits(), "memory-bound"),
        (limits(flops=5e9), "compute-bound"),
        (limits(dispatch=40e-6), "launch-bound"),
    ],
)
def test_each_limit_can_be_the_first(known, tag):
    assert bound(made(ops=1000, known=known)).tag == tag


def test_without_a_count_of_operations_the_tag_says_what_was_not_compared():
    slow_dispatch = limits(dispatch=1.0)
    found = bound(made(known=slow_dispatch))
    assert found.tag == "memory-bound"
    assert any("launches" in part for part in found.left_out)
    assert bound(made(ops=1000, known=slow_dispatch)).tag == "launch-bound"


def test_no_operation_is_no_count():
    assert bound(made(ops=0)).launch is None


def test_a_matmul_rate_in_another_type_is_not_used():
    found = bound(made(known=limits(dtype="float32", flops=1.0)))
    assert found.compute is None
    assert found.tag == "memory-bound"
    assert any("compute" in part for part in found.left_out)


def test_speculation_is_held_against_its_forward_passes():
    # 5 steps of 55 ms verify 4 drafted tokens each: one read of the weights a pass, 5 positions.
    found = bound(made("ngram"))
    assert found.seconds == pytest.approx(0.055)
    assert found.memory == pytest.approx(20e-3)
    assert found.compute == pytest.approx(5 * 0.495e-3)


def test_rows_of_a_batch_are_positions_too():
    record = made(memory={"batch": 4})
    block = record.blocks[0]
    probe = block.passes.latency.model_copy(update={"batch": 4})
    passes = block.passes.model_copy(update={"latency": probe})
    record = record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})
    assert bound(record).compute == pytest.approx(4 * 0.495e-3)


def test_idle_experts_and_embeddings_are_not_multiplied_with():
    assert bound(made(moved={"dense": 50_000_000})).compute == pytest.approx(0.125e-3)


def test_bytes_from_a_cache_are_faster_than_memory_and_the_fraction_shows_it():
    assert fraction(made(known=limits(bandwidth=1e9))).value == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (made().model_copy(update={"limits": None}), "doctor --measure"),
        (made(moved={}), "not counted"),
        (made(known=limits(threads=2)), "measured with 2 CPU threads, the run used 1"),
        (made(memory={"batch": 4}), "the latency pass gave no such number"),
        (
            made(
                known=limits().model_copy(
                    update={"copy_bytes_per_second": Unavailable(reason="too little memory")}
                )
            ),
            "too little memory",
        ),
    ],
    ids=["no limits", "no bytes", "other threads", "other batch", "no bandwidth"],
)
def test_no_fraction_without_its_evidence(record, reason):
    assert reason in fraction(record).reason
    assert isinstance(bound(record), Unavailable)


def test_threads_of_the_cpu_do_not_matter_to_a_gpu():
    assert fraction(made(known=limits(threads=None))).value == pytest.approx(0.4)


def test_the_tag_ignores_what_is_not_known():
    assert Bound(seconds=1.0, memory=0.1, compute=None, launch=None).tag == "memory-bound"
    assert Bound(seconds=1.0, memory=0.1, compute=0.2, launch=None).tag == "compute-bound"
