"""MLPerf LoadGen's `mlperf_log_summary.txt` and `mlperf_log_detail.txt`.

Read for this: `loadgen/results.cc` of mlcommons/inference at 05a9cec3 (`LogSummary`, `LogDetail`).
A summary is lines of `name : value`; a detail log is lines of `:::MLLOG {...}` with key and value.
Neither says which model or hardware it was: that is given by who imports it.

    Completed tokens per second, Tokens per second      output_tokens_per_s
    Completed / Scheduled samples per second            requests_per_s (completed ones)
    50.00 and 99.00 percentile first token latency      ttft_s, ttft_p99_s
    50.00 and 99.00 percentile time to output token     tpot_s, tpot_p99_s
    50.00 percentile latency                            e2e_s

MLPerf's percentile is the value at index int(n p), which for many samples is as good as a median.
"Result is" becomes the verdict: an INVALID result is imported and shows no numbers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from compresskit.errors import RecordError
from compresskit.exchange.importers.fields import Fields, measured
from compresskit.exchange.peers import Peer

if TYPE_CHECKING:
    from compresskit.exchange.importers.fields import Source
    from compresskit.record import Reading

TOOL = "mlperf"
_TITLE = "MLPerf Results Summary"
_LOG = ":::MLLOG"
_LINE = re.compile(r"([^:]{1,100}?)\s*:\s*(\S.{0,199})")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_SUMMARY = {
    "output_tokens_per_s": (1.0, "Completed tokens per second", "Tokens per second"),
    "requests_per_s": (1.0, "Completed samples per second", "Samples per second"),
    "e2e_s": (1e-9, "50.00 percentile latency (ns)"),
    "ttft_s": (1e-9, "50.00 percentile first token latency (ns)"),
    "ttft_p99_s": (1e-9, "99.00 percentile first token latency (ns)"),
    "tpot_s": (1e-9, "50.00 percentile time to output token (ns)"),
    "tpot_p99_s": (1e-9, "99.00 percentile time to output token (ns)"),
}
_DETAIL = {
    "output_tokens_per_s": (
        1.0,
        "result_completed_tokens_per_second",
        "result_tokens_per_second",
    ),
    "requests_per_s": (1.0, "result_completed_samples_per_sec", "result_samples_per_second"),
    "e2e_s": (1e-9, "result_50.00_percentile_latency_ns"),
    "ttft_s": (1e-9, "result_first_token_50.00_percentile_latency_ns"),
    "ttft_p99_s": (1e-9, "result_first_token_99.00_percentile_latency_ns"),
    "tpot_s": (1e-9, "result_time_per_output_token_50.00_percentile_ns"),
    "tpot_p99_s": (1e-9, "result_time_per_output_token_99.00_percentile_ns"),
}


def read(source: Source) -> list[Peer]:
    """Return the one result of a log; raise `RecordError`."""
    try:
        text = source.data.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{source.name}: not text ({error}).") from None
    if _TITLE in text:
        lines = Fields(_summary(text, source.name), source.name)
        return [_peer(source, lines, _SUMMARY, ("SUT name", "Scenario", "Result is"))]
    if _LOG in text:
        lines = Fields(_detail(text, source.name), source.name)
        keys = ("sut_name", "effective_scenario", "result_validity")
        return [_peer(source, lines, _DETAIL, keys)]
    raise RecordError(f"{source.name}: neither a summary nor a detail log of MLPerf LoadGen.")


def _peer(
    source: Source,
    lines: Fields,
    names: dict[str, tuple[Any, ...]],
    identity: tuple[str, str, str],
) -> Peer:
    system, scenario, validity = (lines.text(key) for key in identity)
    if validity not in ("VALID", "INVALID"):
        raise lines.wrong(f"{identity[2]!r} is neither VALID nor INVALID")
    metrics: dict[str, Reading] = {}
    for name, (factor, *keys) in names.items():
        for key in keys:
            value = lines.positive(key)
            if value is not None:
                metrics[name] = measured(name, value * factor, f"{TOOL} ({key})")
                break
    if not metrics:
        raise lines.wrong("no throughput or latency was found")
    return Peer(
        tool=TOOL,
        label=" ".join(part for part in (system, scenario) if part) or TOOL,
        file=source.file(0),
        verdict=validity,
        metrics=metrics,
        context=lines.context((identity[1], "Mode", "target_qps", "min_duration (ms)")),
    )


def _summary(text: str, where: str) -> dict[str, Any]:
    """Names and values of a summary; a name that is told twice must be told the same."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            continue
        name, words = match[1], match[2]
        value: Any = float(words) if _NUMBER.fullmatch(words) else words
        if name in found and found[name] != value and isinstance(value, float):
            raise RecordError(f"{where}: {name!r} is told twice, as {found[name]} and {value}.")
        found.setdefault(name, value)
    return found


def _detail(text: str, where: str) -> dict[str, Any]:
    """Keys and values of a detail log; the last one counts, as a key may be logged at every stage."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if not line.startswith(_LOG):
            continue
        try:
            entry = from_json(line[len(_LOG) :].strip(), allow_inf_nan=False)
        except ValueError as error:
            raise RecordError(f"{where}: a line of the log is not JSON ({error}).") from None
        if isinstance(entry, dict) and isinstance(entry.get("key"), str):
            found[entry["key"]] = entry.get("value")
    return found
