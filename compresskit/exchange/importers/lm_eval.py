"""lm-evaluation-harness's aggregated `results_<date>.json`.

Read for this: `lm_eval/result_schema.py` and `loggers/evaluation_tracker.py` of lm-eval 0.4.13. One
peer per task (or group): its scores stand under the harness's own keys, `"<metric>,<filter>"`, with
their standard errors, because which score belongs beside which is decided by task, version, shots
and filter together. Only `bits_per_byte` has our formula (negative log2-likelihood over the bytes of
the original text); `word_perplexity` and `byte_perplexity` are per word and per byte, ours is per
token, so they keep their names.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from compresskit.exchange.importers.fields import clean, documents, measured
from compresskit.exchange.peers import Peer, Stated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.exchange.importers.fields import Fields, Source
    from compresskit.record import Reading

TOOL = "lm-eval"
_CONFIG = ("model", "model_args", "model_dtype", "model_revision", "limit", "num_fewshot")
_NAMES = ("pretrained", "peft", "delta", "model", "path", "engine")


def read(source: Source) -> list[Peer]:
    """Return one peer per task; raise `RecordError`."""
    return list(_peers(source))


def _peers(source: Source) -> Iterator[Peer]:
    entry = 0
    for one in documents(source):
        one.require("results", tool=TOOL)
        results = one.part("results")
        for task in results.document:
            yield _peer(source, entry, one, task, results.part(task))
            entry += 1


def _peer(source: Source, entry: int, one: Fields, task: str, scores: Fields) -> Peer:
    config = one.part("config")
    stated = _scores(scores)
    metrics: dict[str, Reading] = {}
    if not stated:
        raise scores.wrong('no score of the form "metric,filter"')
    bits = stated.get("bits_per_byte,none")
    if bits is not None:
        if bits.value < 0:
            raise scores.wrong("bits_per_byte is negative")
        how = f"{TOOL} ({clean(task)}: bits_per_byte,none)"
        metrics["bits_per_byte"] = measured("bits_per_byte", bits.value, how)
    context = config.context(_CONFIG)
    context |= one.context(("lm_eval_version", "git_hash"))
    facts = {"version": "versions", "n_shot": "n-shot"}
    for name, key in facts.items():
        value = one.part(key).context((task,)).get(task)
        if value is not None:
            context[name] = value
    documents_scored = one.part("n-samples").part(task).whole("effective")
    if documents_scored is not None:
        context["documents"] = documents_scored
    return Peer(
        tool=TOOL,
        label=clean(task) or "task",
        file=source.file(entry),
        measured_at=_date(one.score("date")),
        model=one.text("model_name") or _model(config),
        device=config.text("device"),
        metrics=metrics,
        stated=stated,
        context=context,
    )


def _scores(scores: Fields) -> dict[str, Stated]:
    """Every number under a `metric,filter` key, with its standard error where there is one."""
    found: dict[str, Stated] = {}
    for key in scores.document:
        metric, comma, kind = key.partition(",")
        value = scores.score(key)
        if not comma or metric.endswith("_stderr") or value is None:
            continue
        spread = scores.score(f"{metric}_stderr,{kind}")
        stderr = spread if spread is not None and spread >= 0 else None
        found[clean(key)] = Stated(value=value, stderr=stderr)
    return found


def _model(config: Fields) -> str | None:
    """Name of the model in `model_args`, which is an object or `key=value,...`."""
    given = config.document.get("model_args")
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    if not isinstance(given, dict):
        return None
    found = next((given[name] for name in _NAMES if isinstance(given.get(name), str)), None)
    return None if found is None else clean(found) or None


def _date(seconds: float | None) -> str | None:
    """UNIX time as a date; None for what is none."""
    if seconds is None or not 0 < seconds < 1e11:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
