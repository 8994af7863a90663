"""Clocks and joules: within a session, across sessions, and when there is no verdict."""

from __future__ import annotations

import pytest

from compresskit.errors import UsageError
from compresskit.record import Estimated, Unavailable
from compresskit.units import Unit

SPEED = ("ttft_s", "tpot_s", "decode_tokens_per_s", "decode_tokens_per_s_largest_batch")


def words(outcomes):
    return {outcomes[metric].word for metric in SPEED}


def test_the_same_speed_in_another_session_is_the_same(bench):
    base = bench.golden("int8")
    assert words(bench.judge(base, bench.later(base))) == {"same"}


def test_a_slowdown_across_sessions_is_worse_and_a_speed_up_better(bench):
    base = bench.golden("int8")
    new = bench.later(bench.slower(base, 2.0))
    outcomes = bench.judge(base, new)
    assert words(outcomes) == {"worse"}
    assert {m for m, o in outcomes.items() if o.failed} == set(SPEED)
    assert outcomes["tpot_s"].ratio.value == pytest.approx(2.0)
    assert outcomes["decode_tokens_per_s"].ratio.value == pytest.approx(0.5)
    assert outcomes["tpot_s"].p < 0.002
    assert words(bench.judge(new, base)) == {"better"}


def test_across_sessions_a_tenth_is_no_difference_but_side_by_side_it_is(bench):
    base = bench.golden("int8")
    slower = bench.slower(base, 1.15)
    assert words(bench.judge(base, bench.later(slower))) == {"same"}
    assert words(bench.judge(base, slower)) == {"worse"}


def test_waiting_for_a_cpu_is_not_slowness(bench):
    base = bench.golden("int8")
    loaded = bench.later(bench.slower(base, 1 / 0.6, waited=0.4))
    outcomes = bench.judge(base, loaded)
    assert words(outcomes) == {"same"}
    assert outcomes["tpot_s"].ratio.value == pytest.approx(1.0)


def test_sleeping_is_slowness_also_on_a_loaded_machine(bench):
    base = bench.golden("int8")
    asleep = bench.later(bench.slower(base, 2 / 0.6, waited=0.4))
    assert words(bench.judge(base, asleep)) == {"worse"}


@pytest.mark.parametrize("loaded", ["base", "new"])
def test_too_much_waiting_leaves_no_verdict(bench, loaded):
    quiet = bench.golden("int8")
    busy = bench.later(bench.slower(quiet, 3.0, waited=0.6))
    pair = (busy, quiet) if loaded == "base" else (quiet, busy)
    outcomes = bench.judge(*pair)
    assert words(outcomes) == {"not compared"}
    assert outcomes["tpot_s"].reason == f"{loaded}: 60% of the time was spent waiting for a CPU"
    assert outcomes["tpot_s"].base is not None


def test_a_slower_machine_excuses_a_slower_run_as_far_as_it_goes(bench):
    base = bench.golden("int8")
    outcomes = bench.judge(base, bench.later(bench.slower(base, 1.8), pace=1.6))
    assert words(outcomes) == {"same"}
    assert "the machine itself took 1.60 times as long" in outcomes["tpot_s"].reason
    assert words(bench.judge(base, bench.later(bench.slower(base, 2.2), pace=1.6))) == {"worse"}


def test_a_faster_machine_excuses_no_slower_run_but_a_faster_one(bench):
    base = bench.golden("int8")
    assert words(bench.judge(base, bench.later(bench.slower(base, 1.5), pace=0.5))) == {"worse"}
    assert words(bench.judge(base, bench.later(bench.slower(base, 0.6), pace=0.5))) == {"same"}


def test_without_a_yardstick_there_is_no_bridge(bench):
    base = bench.golden("int8")
    new = bench.block(bench.slower(base, 2.0), pair=None, turns=())
    outcomes = bench.judge(base, new)
    assert words(outcomes) == {"not compared"}
    assert "no yardstick" in outcomes["tpot_s"].reason


def test_uncounted_waiting_asks_for_a_quiet_machine(bench):
    base = bench.golden("int8")
    new = bench.later(
        bench.samples(base, lambda sample, _: sample.model_copy(update={"waited": None}))
    )
    assert words(bench.judge(base, new)) == {"same"}
    outcomes = bench.judge(base, bench.block(new, load_average=(3.5, 1.0, 1.0)))
    assert words(outcomes) == {"not compared"}
    assert "load average 3.5 on 2 CPUs" in outcomes["tpot_s"].reason


def test_waiting_of_several_threads_is_not_counted_in_full(bench):
    def two_threads(record):
        device = record.device.model_copy(update={"threads": 2})
        return record.model_copy(update={"device": device})

    base = two_threads(bench.golden("int8"))
    new = bench.block(bench.later(base), load_average=(3.5, 1.0, 1.0))
    assert words(bench.judge(base, new)) == {"not compared"}


@pytest.mark.parametrize("keep", [1, 4])
def test_too_few_samples_are_never_a_verdict(bench, keep):
    base = bench.golden("int8")
    outcomes = bench.judge(base, bench.later(bench.slower(base, 3.0, keep=keep)))
    assert words(outcomes) == {"inconclusive"}
    assert "can never reach" in outcomes["tpot_s"].reason


def test_the_factor_can_be_set(bench):
    base, new = bench.golden("int8"), bench.later(bench.slower(bench.golden("int8"), 2.0))
    assert bench.judge(base, new, tolerances={"tpot_s": 2.5})["tpot_s"].word == "same"


def test_a_factor_below_one_is_bad_usage(bench):
    record = bench.golden("int8")
    with pytest.raises(UsageError, match="the tolerance of tpot_s is a factor"):
        bench.judge(record, record, tolerances={"tpot_s": 0.5})


def test_times_of_zero_are_refused(bench):
    base = bench.golden("int8")
    reason = bench.refusal(base, bench.later(bench.slower(base, 0.0)))
    assert "INVALID (zero_duration" in reason


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("device", {"name": "Another CPU"}),
        ("device", {"threads": 2}),
        ("environment", {"packages": {"torch": "9.9"}}),
        ("environment", {"cpu_count": 64}),
    ],
)
def test_clocks_of_another_machine_are_not_compared(bench, part, change):
    base = bench.golden("int8")
    new = bench.later(bench.slower(base, 3.0))
    new = new.model_copy(update={part: getattr(base, part).model_copy(update=change)})
    assert words(bench.judge(base, new)) == {"not compared"}


def energy(bench, record, factor=1.0, **changes):
    """The record with other energy windows."""
    one = record.blocks[0].passes.energy

    def window(old):
        reading = old.reading.model_copy(update={"value": old.reading.value * factor})
        return old.model_copy(update={"reading": reading} | changes)

    windows = {kind: tuple(map(window, getattr(one, kind))) for kind in ("prefill", "generate")}
    return bench.passes(record, energy=one.model_copy(update=windows))


JOULES = ("j_per_output_token", "j_per_prefill_token")


def test_joules_are_compared_within_one_provenance(bench):
    base = bench.golden("dense")
    for factor, word in ((1.0, "same"), (1.5, "worse"), (0.5, "better")):
        outcomes = bench.judge(base, bench.later(energy(bench, base, factor)))
        assert {outcomes[metric].word for metric in JOULES} == {word}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scope": "module"}, "scope of energy differs"),
        ({"devices": ("another",)}, "metered device differs"),
        (
            {"reading": Estimated(value=9.0, unit=Unit.JOULE, model="a guess")},
            "new: estimated joules are not compared",
        ),
        ({"reading": Unavailable(reason="counter did not tick")}, "new: counter did not tick"),
    ],
)
def test_joules_of_another_kind_are_not_compared(bench, change, says):
    base = bench.golden("dense")
    outcome = bench.judge(base, bench.later(energy(bench, base, 3.0, **change)))[
        "j_per_output_token"
    ]
    assert outcome.word == "not compared"
    assert says in outcome.reason


def test_a_peak_gets_a_factor(bench):
    base = bench.golden("dense")
    phases = base.blocks[0].passes.memory.phases

    def grown(factor):
        grow = {
            name: phase.model_copy(
                update={
                    "peaks": {
                        counter: reading.model_copy(update={"value": reading.value * factor})
                        for counter, reading in phase.peaks.items()
                    }
                }
            )
            for name, phase in phases.items()
        }
        return bench.memory(base, phases=grow)

    for factor, word in ((1.09, "same"), (1.2, "worse"), (0.8, "better")):
        assert bench.judge(base, grown(factor))["peak_bytes"].word == word
