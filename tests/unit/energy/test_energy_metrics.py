"""Joules per anything, by hand: ratios of totals, provenance, what is refused, what is paired."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compresskit import store
from compresskit.metrics import METRICS
from compresskit.metrics.energy import provenance, spread
from compresskit.metrics.pairs import side_by_side
from compresskit.record import (
    EnergyPass,
    EnergyWindow,
    Estimated,
    Measured,
    Record,
    Turn,
    Unavailable,
)
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[2] / "golden" / "records" / "v1"
PROMPT, NEW = 32, 16
LOST = Unavailable(reason="counter did not tick")


def counted(joules: float, source: str = "nvml_counter") -> Measured:
    return Measured(value=joules, unit=Unit.JOULE, source=source)


def window(joules, tokens, *, seconds=10.0, devices=("a",), **fields) -> EnergyWindow:
    reading = counted(joules) if isinstance(joules, int | float) else joules
    return EnergyWindow(
        reading=reading,
        tokens=tokens,
        window_seconds=seconds,
        devices=devices,
        scope="gpu",
        **fields,
    )


# 10 requests of 16 tokens a generate window, 100 prompts of 32 tokens a prefill window.
GENERATE = (window(3000.0, 160), window(3200.0, 160))
PREFILL = (window(2000.0, 3200), window(2200.0, 3200))


def record(generate=GENERATE, prefill=PREFILL, *, idle=None, turns=(), pair=None) -> Record:
    base = store.load(GOLDEN / "synthetic-dense.json")
    energy = EnergyPass(
        prefill=prefill, generate=generate, idle=idle, prompt_tokens=PROMPT, new_tokens=NEW
    )
    block = base.blocks[0]
    passes = block.passes.model_copy(update={"energy": energy})
    block = block.model_copy(update={"passes": passes, "turns": turns, "pair": pair})
    return base.model_copy(update={"blocks": (block,)})


def value(name: str, of: Record) -> float:
    found = METRICS[name].value(of)
    assert isinstance(found, Measured), found
    return found.value


def reason(name: str, of: Record) -> str:
    found = METRICS[name].value(of)
    assert isinstance(found, Unavailable), found
    assert METRICS[name].samples(of) == []
    return found.reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("j_per_output_token", 6200 / 320),
        ("j_per_prefill_token", 4200 / 6400),
        # 20 requests of 32 + 16 tokens.
        ("j_per_total_token", 6200 / (20 * 48)),
        ("j_per_request", 6200 / 20),
        # 310 J an answer less 21 J a prefill, over the 15 tokens after the first.
        ("j_per_decode_token", (310 - 21) / 15),
        ("mean_watts", 310.0),
    ],
)
def test_energy_over_what_it_was_spent_on(name, expected):
    assert value(name, record()) == pytest.approx(expected)


def test_a_value_is_a_ratio_of_totals_and_not_a_mean_of_ratios():
    uneven = record((window(100.0, 10), window(100.0, 90)))
    assert value("j_per_output_token", uneven) == pytest.approx(2.0)
    assert METRICS["j_per_output_token"].samples(uneven) == pytest.approx([10.0, 100 / 90])


def test_the_error_of_decoding_holds_those_of_both_loops():
    # Two windows a side: half the difference is the standard error of each.
    expected = math.hypot(20 / 2, 2 / 2) / 15
    assert METRICS["j_per_decode_token"].stderr(record()) == pytest.approx(expected)
    alone = record(GENERATE[:1], PREFILL)
    assert METRICS["j_per_decode_token"].stderr(alone) is None


def test_decoding_that_costs_nothing_is_not_believed():
    cheap = record(generate=(window(100.0, 160),))
    assert "below the noise" in reason("j_per_decode_token", cheap)


def test_idle_power_is_shown_and_taken_off_beside_the_gross():
    with_idle = record(idle=window(700.0, 0))
    assert value("idle_watts", with_idle) == pytest.approx(70.0)
    assert value("net_j_per_output_token", with_idle) == pytest.approx((6200 - 1400) / 320)
    assert value("j_per_output_token", with_idle) == pytest.approx(6200 / 320)


def test_without_an_idle_window_nothing_is_taken_off():
    assert "no idle window" in reason("net_j_per_output_token", record())
    lost = record(idle=window(LOST, 0))
    assert "no idle window" in reason("net_j_per_output_token", lost)
    assert reason("idle_watts", lost) == "counter did not tick"
    assert "not metered" in reason("idle_watts", record())
    # A machine without a counter gives that reason, not the absence of an idle window.
    assert reason("idle_watts", record((window(LOST, 0),))) == "counter did not tick"


def test_work_that_drew_less_than_idling_has_no_net_energy():
    hungry = record(idle=window(9000.0, 0))
    assert "no more than the idle machine" in reason("net_j_per_output_token", hungry)


def test_memory_stays_apart():
    domains = {"dram": counted(160.0, "rapl_dram")}
    with_dram = record((window(3000.0, 160, domains=domains),))
    assert value("dram_j_per_output_token", with_dram) == pytest.approx(1.0)
    assert value("j_per_output_token", with_dram) == pytest.approx(3000 / 160)
    assert "no counter of the memory" in reason("dram_j_per_output_token", record())


def test_counter_and_integrated_power_stand_side_by_side():
    both = record(tuple(window(j, 160, integrated=counted(3100.0)) for j in (3000.0, 3200.0)))
    assert value("energy_cross_check", both) == pytest.approx(1.0)
    assert "no integrated power" in reason("energy_cross_check", record())


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (counted(1.0), "measured_counter"),
        (counted(1.0, "rapl"), "measured_counter"),
        (counted(1.0, "nvml_power_integral"), "measured_integrated"),
        (counted(1.0, "zeus_jetson_integral"), "measured_integrated"),
        (Estimated(value=1.0, unit=Unit.JOULE, model="watts times time"), "estimated"),
        (LOST, "unavailable"),
    ],
)
def test_every_reading_has_a_provenance(reading, expected):
    assert provenance(reading) == expected


def test_a_sum_has_the_weakest_provenance_of_its_windows():
    mixed = record((window(3000.0, 160), window(counted(3000.0, "nvml_power_integral"), 160)))
    assert provenance(METRICS["j_per_output_token"].value(mixed)) == "measured_integrated"
    assert provenance(METRICS["j_per_output_token"].value(record())) == "measured_counter"


def test_measured_and_estimated_windows_are_never_added():
    estimate = Estimated(value=30.0, unit=Unit.JOULE, model="watts times time")
    mixed = record((window(3000.0, 160), window(estimate, 160)))
    assert "not added up" in reason("j_per_output_token", mixed)
    assert "not added up" in reason("j_per_decode_token", mixed)
    guessed = METRICS["j_per_output_token"].value(record((window(estimate, 160),)))
    assert provenance(guessed) == "estimated"


def test_unlike_devices_are_neither_added_nor_subtracted():
    other = window(3000.0, 160, devices=("b",))
    assert "unlike devices" in reason("j_per_output_token", record((GENERATE[0], other)))
    assert "unlike devices" in reason("j_per_decode_token", record((other,)))


def test_a_window_of_no_joules_is_no_measurement():
    assert "did not tick" in reason("j_per_output_token", record((window(0.0, 160),)))


def test_windows_up_to_a_lost_one_count_and_none_after_it():
    cut = record((*GENERATE, window(LOST, 160), window(1.0, 160)))
    assert METRICS["j_per_output_token"].samples(cut) == pytest.approx([18.75, 20.0])
    assert reason("j_per_output_token", record((window(LOST, 160),))) == "counter did not tick"


def test_windows_pair_with_the_turns_they_were_taken_in():
    """Eight turns, the first three of them with a window."""
    turns = tuple(Turn(round=10 + i, position=0, started=0.0) for i in range(8))
    shorter = turns[:1] + turns[2:]
    one = record(tuple(window(j, 100) for j in (100, 200, 300)), turns=turns, pair="p")
    two = record(tuple(window(j, 100) for j in (400, 500)), turns=shorter, pair="p")
    sides = side_by_side(METRICS["j_per_output_token"], one, two)
    # Rounds 10, 11, 12 against rounds 10, 12.
    assert (sides.one, sides.other) == ([1.0, 3.0], [4.0, 5.0])


def test_a_speed_metric_with_a_sample_too_few_is_still_not_paired():
    turns = tuple(Turn(round=i, position=0, started=0.0) for i in range(8))
    one = record(turns=turns, pair="p")
    assert len(METRICS["ttft_s"].samples(one)) < 8
    assert side_by_side(METRICS["ttft_s"], one, one).one == []


def test_the_spread_of_windows_has_students_interval():
    # By hand: sd of 1, 2, 3 is 1; t(0.975, 2) = 4.302653 (any table).
    found = spread([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.n, found.mean, found.sd) == (3, 2.0, pytest.approx(1.0))
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert spread([1.0]) is None
