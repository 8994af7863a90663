"""Money and carbon of output tokens, and the one-off cost of compressing.

    rent          price per hour · 10^6 / (output tokens/s · 3600)      the machine is paid by time
    electricity   J/token · PUE · price per kWh / 3.6                   ... or by energy
    carbon        J/token · PUE · grams per kWh / 3.6

Rent and electricity are two ways to look at one bill (a rented machine's electricity is in the
rent), so nothing here adds them. All are per million *output* tokens; the energy is gross, of what
the counter covers, with the prompt's prefill in it. There is no default price: without one a number
is unavailable. An estimated energy gives an estimated cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.metrics.core import Metric, missing_from, stored
from compresskit.metrics.energy import ENERGY
from compresskit.metrics.speed import SPEED
from compresskit.record import Estimated, Measured, Reading, Unavailable
from compresskit.spec import Prices
from compresskit.units import Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compresskit.record import Record

_JOULES_PER_KWH = 3.6e6
_MILLION = 1e6
OUTPUT_RATE = next(one for one in SPEED if one.name == "output_tokens_per_s")
JOULES = next(one for one in ENERGY if one.name == "j_per_output_token")


def repriced(record: Record, given: Mapping[str, float | str]) -> Record:
    """Return `record` with the prices in `given` in place of its own, field by field.

    Where `given` names another currency, the record's own amounts are dropped: they are not in it.

    Raises:
        SpecError: a price is negative, or no number.
    """
    if not given:
        return record
    kept = {} if record.prices is None else record.prices.model_dump(mode="json")
    if given.get("currency", kept.get("currency")) != kept.get("currency"):
        kept = {key: kept[key] for key in kept if key not in ("per_hour", "per_kwh")}
    source = "; ".join(part for part in (kept.get("source"), "command line") if part)
    prices = Prices.decode({**kept, **given, "source": source}, where="prices")
    return record.model_copy(update={"prices": prices})


def _price(
    record: Record, pick: Callable[[Prices], float | None], what: str
) -> float | Unavailable:
    value = None if record.prices is None else pick(record.prices)
    return Unavailable(reason=f"no {what} was given") if value is None else value


def _rent(record: Record) -> Reading:
    rate = OUTPUT_RATE.value(record)
    price = _price(record, lambda prices: prices.per_hour, "price per hour")
    if isinstance(price, Unavailable):
        return missing_from(record, "throughput") if record.status != "ok" else price
    if isinstance(rate, Unavailable):
        return rate
    return _scaled(
        rate,
        price * _MILLION / (rate.value * 3600),
        Unit.CURRENCY_PER_MTOK,
        "price per hour over output rate",
    )


def _from_joules(
    record: Record,
    unit: Unit,
    how: str,
    formula: Callable[[float], float],
    *,
    per_kwh: float | Unavailable = 1.0,
) -> Reading:
    if isinstance(per_kwh, Unavailable):
        return missing_from(record, "energy") if record.status != "ok" else per_kwh
    joules = JOULES.value(record)
    if isinstance(joules, Unavailable):
        return joules
    return _scaled(joules, formula(joules.value) * per_kwh, unit, how)


def _scaled(reading: Measured | Estimated, value: float, unit: Unit, how: str) -> Reading:
    """The same kind of number, in other units; what it came from stays readable."""
    if isinstance(reading, Estimated):
        return Estimated(value=value, unit=unit, model=f"{how}; {reading.model}")
    return Measured(value=value, unit=unit, source=f"{how}; {reading.source}")


def pue(prices: Prices | None) -> tuple[float, str]:
    """The power usage effectiveness to reckon with, and how to say so."""
    if prices is None or prices.pue is None:
        return 1.0, "PUE not given, taken as 1"
    return prices.pue, f"PUE {prices.pue:g}"


def _with_overhead(
    record: Record, unit: Unit, pick: Callable[[Prices], float | None], what: str, how: str
) -> Reading:
    factor, said = pue(record.prices)
    return _from_joules(
        record,
        unit,
        f"{how}, {said}",
        lambda joules: joules * factor * _MILLION / _JOULES_PER_KWH,
        per_kwh=_price(record, pick, what),
    )


def _electricity(record: Record) -> Reading:
    return _with_overhead(
        record,
        Unit.CURRENCY_PER_MTOK,
        lambda prices: prices.per_kwh,
        "price per kWh",
        "energy times its price",
    )


def _carbon(record: Record) -> Reading:
    return _with_overhead(
        record,
        Unit.GRAM_PER_MTOK,
        lambda prices: prices.grams_co2_per_kwh,
        "carbon intensity of the grid",
        "energy times the grid's intensity",
    )


def _tokens_per_kwh(record: Record) -> Reading:
    return _from_joules(
        record, Unit.TOKEN_PER_KWH, "3.6 MJ over J/token", lambda joules: _JOULES_PER_KWH / joules
    )


def _kwh(record: Record) -> Reading:
    return _from_joules(
        record,
        Unit.KWH_PER_MTOK,
        "J/token over 3.6",
        lambda joules: joules * _MILLION / _JOULES_PER_KWH,
    )


def _calibration(record: Record) -> Reading:
    if record.setup is None:
        return missing_from(record, "setup")
    if record.setup.calibration_tokens is None:
        return Unavailable(reason="the record does not say how many tokens calibrated it")
    return Measured(
        value=record.setup.calibration_tokens, unit=Unit.TOKEN, source="asked for by the methods"
    )


def setup_joules(record: Record) -> Reading:
    """Joules of loading and compressing."""
    return missing_from(record, "setup") if record.setup is None else record.setup.energy


MONEY: tuple[Metric, ...] = (
    stored(
        "rent_per_million_output_tokens",
        Unit.CURRENCY_PER_MTOK,
        "lower",
        "rent/1: price per hour 10^6 / (output_tokens_per_s 3600); electricity is not added.",
        _rent,
    ),
    stored(
        "electricity_per_million_output_tokens",
        Unit.CURRENCY_PER_MTOK,
        "lower",
        "electricity/1: j_per_output_token PUE price per kWh / 3.6; rent is not added.",
        _electricity,
    ),
    stored(
        "gco2e_per_million_output_tokens",
        Unit.GRAM_PER_MTOK,
        "lower",
        "carbon/1: j_per_output_token PUE grams of CO2 per kWh / 3.6, of use and not of making.",
        _carbon,
    ),
    stored(
        "kwh_per_million_output_tokens",
        Unit.KWH_PER_MTOK,
        "lower",
        "kwh/1: j_per_output_token / 3.6, without PUE.",
        _kwh,
    ),
    stored(
        "output_tokens_per_kwh",
        Unit.TOKEN_PER_KWH,
        "higher",
        "tokens_per_kwh/1: 3.6 10^6 / j_per_output_token, without PUE.",
        _tokens_per_kwh,
    ),
    stored(
        "setup_energy_j",
        Unit.JOULE,
        "lower",
        "setup_energy/1: gross energy of loading and compressing.",
        setup_joules,
    ),
    stored(
        "calibration_tokens",
        Unit.TOKEN,
        "lower",
        "calibration/1: tokens that the methods asked for to calibrate.",
        _calibration,
    ),
)
