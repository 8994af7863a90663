"""What `compresskit calibrate` says: a JSON document, and the lines that a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.errors import InputError
from compresskit.metrics.noise import QUANTITIES, recorded
from compresskit.metrics.pairs import side_by_side
from compresskit.stats import ALPHA, fewest_a_side, judge
from compresskit.stats.calibration import calibrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from compresskit.record import Record
    from compresskit.stats import Interval, Verdict
    from compresskit.stats.calibration import Calibration

FORMAT = "compresskit.calibration/1"
QUIET = 0.05
"""Coefficient of variation under which a machine counts as quiet."""
AIM = 1.10
"""A slowdown that most people would want to see."""
DRIFTED = (
    "something on this machine favours one process over another. Stop other work, wait until it "
    "has cooled down, and calibrate again before you believe any comparison."
)


def examine(
    records: Sequence[Record],
    *,
    live: bool,
    samples: int,
    factor: float,
    trials: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Calibrate on the noise in `records`; `live` ones are the two equal arms of an A/A session.

    Raises:
        InputError: no quantity has enough samples.
    """
    quantities: dict[str, dict[str, Any]] = {}
    for name, metric in QUANTITIES.items():
        try:
            found = recorded(name, records)
        except ValueError as error:
            quantities[name] = {"unavailable": str(error)}
            continue
        entry: dict[str, Any] = {"same_machine": None, "series": found.series}
        if live:
            sides = side_by_side(metric, *records)
            verdict = judge(*sides, lower_is_better=True, paired=True, factor=factor)
            entry["same_machine"] = _verdict(verdict)
            entry["seconds"] = [list(side) for side in sides]
        result = calibrate(
            found.noise,
            samples=samples,
            trials=trials,
            seed=seed,
            factor=factor,
            progress=lambda text, name=name: progress(f"{name}, {text}"),  # type: ignore[misc]
        )
        quantities[name] = {**entry, **_calibration(result)}
    usable = [entry for entry in quantities.values() if "unavailable" not in entry]
    if not usable:
        raise InputError(
            "these records hold no noise to calibrate on: "
            + "; ".join(f"{name}: {entry['unavailable']}" for name, entry in quantities.items())
            + ". Give more records, or none to measure this machine."
        )
    drifted = live and any(
        entry["same_machine"]["verdict"] in ("better", "worse") for entry in usable
    )
    document: dict[str, Any] = {
        "format": FORMAT,
        "source": "A/A session" if live else "records",
        "records": len(records),
        "models": sorted({record.spec.model.name for record in records}),
        "devices": sorted({record.device.name for record in records if record.device}),
        "samples": samples,
        "factor": factor,
        "alpha": ALPHA,
        "trials": trials,
        "seed": seed,
        "drifted": drifted,
        "quantities": quantities,
    }
    return {**document, "advice": list(_advice(document))}


def _interval(found: Interval) -> dict[str, float]:
    return dict(found._asdict())


def _verdict(found: Verdict) -> dict[str, Any]:
    return {
        "verdict": found.word,
        "reason": found.reason,
        "ratio": _interval(found.ratio),
        "p": found.p,
        "samples": [found.n_base, found.n_new],
    }


def _calibration(found: Calibration) -> dict[str, Any]:
    return {
        "variation": found.variation,
        "drawn_from": {
            "count": found.residuals,
            "what": "rounds of two sides" if found.paired else "samples",
        },
        "false_alarms": _interval(found.false_alarms),
        "power": [
            {"slowdown": effect, "found": _interval(share)} for effect, share in found.power.items()
        ],
        "smallest_effect": [
            {"samples": size, "slowdown": effect} for size, effect in found.smallest.items()
        ],
    }


def _advice(document: dict[str, Any]) -> Iterator[str]:
    least = fewest_a_side(ALPHA)
    if document["samples"] < least:
        yield (
            f"{document['samples']} samples a side can never reach p < {ALPHA:g}: take at least "
            f"{least}."
        )
    if document["drifted"]:
        yield f"Two equal sides were told apart: {DRIFTED}"
    for name, entry in document["quantities"].items():
        if "unavailable" in entry:
            continue
        if entry["false_alarms"]["value"] > 0.01:
            yield f"{name}: false alarms exceed 1 %; take more samples or a larger --factor."
        if entry["variation"] > QUIET:
            yield (
                f"{name}: the noise is {entry['variation']:.1%}; under {QUIET:.0%} is quiet. Stop "
                "other work, keep to one thread, or let the machine cool down between runs."
            )
        sizes = {row["samples"]: row["slowdown"] for row in entry["smallest_effect"]}
        now = sizes[document["samples"]]
        if now is not None and now <= AIM:
            continue
        enough = [size for size, seen in sizes.items() if seen is not None and seen <= AIM]
        yield (
            f"{name}: to see a slowdown of {AIM - 1:.0%}, take {min(enough)} samples a side."
            if enough
            else f"{name}: a slowdown of {AIM - 1:.0%} is out of sight here even with "
            f"{max(sizes)} samples a side: only a quieter machine will show it."
        )
    if document["source"] == "records" and any(
        entry.get("drawn_from", {}).get("what") == "samples"
        for entry in document["quantities"].values()
    ):
        yield (
            "The noise comes from runs on their own: how the machine drifts from one run to the "
            "next is not in it. Compare rows that were measured side by side."
        )


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The document for people."""
    where = ", ".join([*document["models"], *document["devices"]])
    yield f"{document['source']}: {document['records']} records ({where})"
    usable = {
        name: entry for name, entry in document["quantities"].items() if "unavailable" not in entry
    }
    for name, entry in document["quantities"].items():
        if "unavailable" in entry:
            yield f"  {name:<8}unavailable: {entry['unavailable']}"
            continue
        drawn = entry["drawn_from"]
        noise = f"noise {entry['variation']:.1%} (CV of {drawn['count']} {drawn['what']})"
        if (told := entry["same_machine"]) is not None:
            ratio = told["ratio"]
            noise += (
                f"; equal sides: {told['verdict']}, {ratio['value']:.3f} "
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}], p = {told['p']:.2g}"
            )
        yield f"  {name:<8}{noise}"
    yield ""
    yield (
        f"Simulated comparisons, {document['trials']} a cell: {document['samples']} samples a side, "
        f"p < {document['alpha']:g}, factor {document['factor']:g}"
    )
    for name, entry in usable.items():
        alarms = entry["false_alarms"]
        yield (
            f"  {name:<8}false alarms {alarms['value']:.1%} "
            f"[{alarms['low']:.1%}, {alarms['high']:.1%}]"
        )
        found = ", ".join(
            f"{row['slowdown']:g}x {row['found']['value']:.0%}" for row in entry["power"]
        )
        yield f"  {'':<8}slowdowns found: {found}"
    yield ""
    yield "Smallest slowdown found in 95 of 100 comparisons, by samples a side"
    sizes = [row["samples"] for entry in usable.values() for row in entry["smallest_effect"]]
    columns = list(dict.fromkeys(sizes))
    yield f"  {'':<8}" + "".join(f"{size:>10}" for size in columns)
    for name, entry in usable.items():
        cells = (_percent(row["slowdown"]) for row in entry["smallest_effect"])
        yield f"  {name:<8}" + "".join(f"{cell:>10}" for cell in cells)
    if document["advice"]:
        yield ""
        yield from document["advice"]


def _percent(slowdown: float | None) -> str:
    return "none" if slowdown is None else f"{100 * (slowdown - 1):.3g} %"
