"""Money, carbon and break-even: published figures, and refusals where there is nothing to reckon."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.errors import SpecError
from compresskit.metrics import METRICS
from compresskit.metrics.money import repriced
from compresskit.metrics.payback import break_even_joules, break_even_seconds
from compresskit.record import (
    Arrival,
    EnergyWindow,
    Estimated,
    Measured,
    Record,
    Sample,
    Setup,
    Turn,
    Unavailable,
)
from compresskit.spec import Prices
from compresskit.units import Unit

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"
WINDOW_TOKENS = 1000
# Noise of the repetitions: distinct, without a trend, one percent.
JITTER = (1.0, 1.006, 0.994, 1.003, 0.997, 1.009, 0.991, 1.001)


def made(
    name: str = "dense",
    *,
    rate: float = 1000.0,
    joules: float | None = None,
    estimated: bool = False,
    setup: Setup | None = None,
    session: str | None = None,
    devices: tuple[str, ...] = (),
    **prices: float | str,
) -> Record:
    """A synthetic record with this output rate (tokens/s), energy (J per token) and prices."""
    record = store.load(GOLDEN / f"synthetic-{name}.json")
    block = record.blocks[0]
    probe = block.passes.throughput[0]
    seconds = probe.batch * probe.new_tokens / rate
    samples = tuple(
        Sample(
            arrivals=(Arrival(0.1 * seconds * f, 1), Arrival(seconds * f, probe.new_tokens - 1)),
            forwards=probe.new_tokens,
        )
        for f in JITTER
    )
    passes = {"throughput": (probe.model_copy(update={"samples": samples}),)}
    if joules is not None:
        total = joules * WINDOW_TOKENS
        kind = (
            Estimated(value=total, unit=Unit.JOULE, model="TDP")
            if estimated
            else Measured(value=total, unit=Unit.JOULE, source="counter")
        )
        window = EnergyWindow(reading=kind, tokens=WINDOW_TOKENS, scope="gpu", devices=devices)
        passes["energy"] = block.passes.energy.model_copy(update={"generate": (window,)})
    turns = tuple(Turn(round=i, position=0, started=float(i)) for i in range(len(samples)))
    block = block.model_copy(
        update={
            "passes": block.passes.model_copy(update=passes),
            "pair": session,
            "turns": turns if session else (),
        }
    )
    changes = {"blocks": (block,), "prices": Prices(**prices) if prices else None}
    return record.model_copy(update=changes | ({"setup": setup} if setup else {}))


def reading(key: str, record: Record):
    return METRICS[f"{key}_per_million_output_tokens"].value(record)


# J per output token and tokens/s: ML.ENERGY Leaderboard v3 (vLLM 0.11.1, H100 and B200, chat);
# at batch 8 the rate is the published 486 W over 0.455 J. Prices are round numbers.
@pytest.mark.parametrize(
    ("rate", "joules", "per_hour", "rent", "kwh", "electricity", "grams"),
    [
        pytest.param(486 / 0.455, 0.455, 2.5, 0.650, 0.126, 0.0126, 46.6, id="8B, batch 8"),
        pytest.param(9806, 0.0702, 2.5, 0.0708, 0.0195, 0.00195, 7.2, id="8B, batch 512"),
        pytest.param(6827, 0.373, 10.0, 0.407, 0.104, 0.0104, 38.2, id="70B, four GPUs"),
        pytest.param(17_094, 0.0397, 4.0, 0.065, 0.0110, 0.00110, 4.07, id="120b on B200"),
    ],
)
def test_published_figures(rate, joules, per_hour, rent, kwh, electricity, grams):
    record = made(
        rate=rate, joules=joules, per_hour=per_hour, per_kwh=0.10, grams_co2_per_kwh=369.0
    )
    assert reading("rent", record).value == pytest.approx(rent, rel=5e-3)
    assert reading("kwh", record).value == pytest.approx(kwh, rel=5e-3)
    assert reading("electricity", record).value == pytest.approx(electricity, rel=5e-3)
    assert reading("gco2e", record).value == pytest.approx(grams, rel=5e-3)
    # Published beside the figures: electricity is 1.7 to 2.8 % of the rent.
    share = reading("electricity", record).value / reading("rent", record).value
    assert 0.016 < share < 0.029


def test_tokens_per_kilowatt_hour_and_kilowatt_hours_per_token_agree():
    record = made(joules=0.36)
    per_kwh = METRICS["output_tokens_per_kwh"].value(record).value
    assert per_kwh == pytest.approx(1e7)
    assert per_kwh * reading("kwh", record).value == pytest.approx(1e6)


def test_rent_and_electricity_are_never_added():
    both = made(joules=0.36, per_hour=3.6, per_kwh=0.5)
    rent_only = made(joules=0.36, per_hour=3.6)
    assert reading("rent", both) == reading("rent", rent_only)
    assert reading("rent", both).value == pytest.approx(1.0, rel=0.01)
    assert reading("electricity", both).value == pytest.approx(0.05)


def test_the_overhead_of_the_building_is_in_electricity_and_carbon_but_not_in_energy():
    bare = made(joules=0.36, per_kwh=0.5, grams_co2_per_kwh=100.0)
    housed = made(joules=0.36, per_kwh=0.5, grams_co2_per_kwh=100.0, pue=1.5)
    for key in ("electricity", "gco2e"):
        assert reading(key, housed).value == pytest.approx(1.5 * reading(key, bare).value)
    assert reading("kwh", housed) == reading("kwh", bare)
    assert "PUE not given, taken as 1" in reading("electricity", bare).source
    assert "PUE 1.5" in reading("electricity", housed).source


def test_an_estimated_energy_gives_an_estimated_cost():
    record = made(joules=0.36, estimated=True, per_kwh=0.5, grams_co2_per_kwh=100.0)
    for key in ("electricity", "gco2e", "kwh"):
        found = reading(key, record)
        assert isinstance(found, Estimated), key
        assert "TDP" in found.model


def test_there_is_no_default_price():
    record = made(joules=0.36)
    assert reading("rent", record) == Unavailable(reason="no price per hour was given")
    assert reading("electricity", record) == Unavailable(reason="no price per kWh was given")
    assert "carbon intensity" in reading("gco2e", record).reason


def test_a_price_without_an_energy_gives_the_reason_of_the_energy():
    assert "no energy counter" in reading("electricity", made(per_kwh=0.1)).reason


def test_carbon_of_a_grid_without_carbon_is_nothing_and_known():
    found = reading("gco2e", made(joules=0.36, grams_co2_per_kwh=0.0))
    assert isinstance(found, Measured)
    assert found.value == 0


# Prices from the command line


def test_given_prices_stand_in_for_the_records_field_by_field():
    record = repriced(made(per_hour=2.0, per_kwh=0.1, source="contract"), {"per_hour": 3.0})
    assert (record.prices.per_hour, record.prices.per_kwh) == (3.0, 0.1)
    assert record.prices.source == "contract; command line"


def test_another_currency_does_not_rename_the_records_amounts():
    record = repriced(
        made(per_hour=2.0, per_kwh=0.1, pue=1.2, currency="USD"),
        {"per_hour": 3.0, "currency": "EUR"},
    )
    assert record.prices.currency == "EUR"
    assert record.prices.per_kwh is None
    # A ratio is in no currency.
    assert record.prices.pue == 1.2


def test_without_flags_a_record_stays_as_it_is():
    record = made(per_hour=2.0)
    assert repriced(record, {}) is record


@pytest.mark.parametrize(
    ("field", "value"),
    [("per_hour", -1.0), ("per_hour", 0.0), ("per_kwh", float("nan")), ("pue", 0.9)],
)
def test_a_price_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(SpecError):
        repriced(made(), {field: value})


# Break-even

SETUP = Setup(load_seconds=1.0, apply_seconds=6.0)


def test_time_is_paid_back_after_the_one_off_seconds_over_those_saved_per_token():
    # 10 ms a token against 4 ms: 6 ms saved, 6 s to make up for.
    fast, slow = made("int8", rate=250.0, setup=SETUP), made(rate=100.0)
    assert break_even_seconds(fast, slow).value == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("rate", [100.0, 80.0])
def test_what_saves_no_time_is_never_paid_back(rate):
    found = break_even_seconds(made("int8", rate=rate, setup=SETUP), made(rate=100.0))
    assert isinstance(found, Unavailable)
    assert found.reason.startswith("never")


def test_side_by_side_only_a_saving_that_is_shown_is_counted_with():
    slow = made(rate=100.0, session="s")
    shown = made("int8", rate=110.0, setup=SETUP, session="s")
    assert break_even_seconds(shown, slow).value == pytest.approx(6.6e3, rel=0.01)
    within = made("int8", rate=102.0, setup=SETUP, session="s")
    refused = break_even_seconds(within, slow)
    assert refused == Unavailable(reason="no saving of time is shown (verdict: same)")
    # The same two rates from two sessions: a plain number, which the table marks.
    alone = made("int8", rate=102.0, setup=SETUP)
    assert isinstance(break_even_seconds(alone, slow), Measured)


def with_energy_of_setup(joules: float | None) -> Setup:
    spent = (
        Unavailable(reason="not measured")
        if joules is None
        else Measured(value=joules, unit=Unit.JOULE, source="counter")
    )
    return Setup(load_seconds=1.0, apply_seconds=6.0, energy=spent)


def test_energy_is_paid_back_after_the_one_off_joules_over_those_saved_per_token():
    setup = with_energy_of_setup(500.0)
    lean, dense = made("int8", joules=0.25, setup=setup), made(joules=0.5)
    assert break_even_joules(lean, dense).value == pytest.approx(2000)
    assert METRICS["setup_energy_j"].value(lean).value == 500.0


def test_what_saves_no_energy_is_never_paid_back():
    hungry = made("int8", joules=0.6, setup=with_energy_of_setup(500.0))
    assert break_even_joules(hungry, made(joules=0.5)).reason.startswith("never")


def test_unlike_energies_are_not_subtracted():
    dense = made(joules=0.5, devices=("a",))
    setup = with_energy_of_setup(500.0)
    estimate = made("int8", joules=0.25, estimated=True, setup=setup, devices=("a",))
    assert "unlike provenance" in break_even_joules(estimate, dense).reason
    elsewhere = made("int8", joules=0.25, setup=setup, devices=("b",))
    assert "unlike counters" in break_even_joules(elsewhere, dense).reason
    unknown = made("int8", joules=0.25, setup=with_energy_of_setup(None), devices=("a",))
    assert "not measured" in break_even_joules(unknown, dense).reason


def test_calibration_tokens_of_an_old_record_are_unknown_not_zero():
    old, new = made(), made(setup=SETUP.model_copy(update={"calibration_tokens": 0}))
    assert isinstance(METRICS["calibration_tokens"].value(old), Unavailable)
    assert METRICS["calibration_tokens"].value(new).value == 0
