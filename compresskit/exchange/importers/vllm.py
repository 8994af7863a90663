"""The JSON of `vllm bench serve --save-result` (one document, or a line each with --append-result).

Read for this: `vllm/benchmarks/serve.py` of vllm-project/vllm at 009e6d4a. vLLM's medians of TTFT,
TPOT, ITL and E2EL have our formulae, so they are taken as they stand. vLLM writes 0 where it had no
values (no streaming, requests of one token): here that is no number, with the reason. Throughputs
are over the whole run as the client saw it, queueing included.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from compresskit.exchange.importers.fields import documents, measured
from compresskit.exchange.peers import Peer
from compresskit.record import Unavailable

if TYPE_CHECKING:
    from compresskit.exchange.importers.fields import Fields, Source
    from compresskit.record import Reading

TOOL = "vllm"
_TIMES = {
    "ttft_s": "median_ttft_ms",
    "tpot_s": "median_tpot_ms",
    "itl_s": "median_itl_ms",
    "e2e_s": "median_e2el_ms",
    "ttft_p99_s": "p99_ttft_ms",
    "tpot_p99_s": "p99_tpot_ms",
    "itl_p99_s": "p99_itl_ms",
}
_CONTEXT = ("backend", "endpoint_type", "request_rate", "burstiness", "num_prompts", "failed")


def read(source: Source) -> list[Peer]:
    """Return one peer per run; raise `RecordError`."""
    return [_peer(source, index, one) for index, one in enumerate(documents(source))]


def _peer(source: Source, index: int, one: Fields) -> Peer:
    one.require("duration", "completed", "total_input_tokens", tool=TOOL)
    completed, duration = one.whole("completed"), one.positive("duration")
    if not completed or duration is None:
        raise one.wrong("no request was completed")
    prompt, output = one.number("total_input_tokens"), one.number("total_output_tokens")
    if output is None:
        raise one.wrong("total_output_tokens is missing: only generation runs can be imported")
    return Peer(
        tool=TOOL,
        label=one.text("label") or one.text("backend") or TOOL,
        file=source.file(index),
        measured_at=one.text("date"),
        model=one.text("model_id"),
        device=one.text("device"),
        batch=one.whole("max_concurrency"),
        prompt_tokens=None if prompt is None else prompt / completed,
        new_tokens=output / completed,
        metrics=_metrics(one, completed, duration, prompt, output),
        context=one.context(_CONTEXT),
    )


def _metrics(
    one: Fields, completed: int, duration: float, prompt: float | None, output: float
) -> dict[str, Reading]:
    found: dict[str, Reading] = {}
    for name, key in _TIMES.items():
        value = one.number(key)
        if value is not None:
            found[name] = (
                measured(name, value / 1000, f"{TOOL} ({key})")
                if value
                else Unavailable(reason=f"vLLM wrote {key} = 0: it had no values")
            )
    rates = {"output_tokens_per_s": ("output_throughput", output)}
    rates["requests_per_s"] = ("request_throughput", float(completed))
    if prompt is not None:
        rates["total_tokens_per_s"] = ("total_token_throughput", prompt + output)
    for name, (key, total) in rates.items():
        value = one.number(key)
        one.agree(value, total / duration, key)
        if value:
            found[name] = measured(name, value, f"{TOOL} ({key})")
    waits = one.numbers("ttfts")
    if waits and one.number("failed") == 0:
        one.agree(one.number("mean_ttft_ms"), 1000 * fmean(waits), "mean_ttft_ms")
    return found | _acceptance(one)


def _acceptance(one: Fields) -> dict[str, Reading]:
    """Acceptance over the drafts; vLLM gives the rate in per cent."""
    found: dict[str, Reading] = {}
    rate = one.number("spec_decode_acceptance_rate")
    if rate is not None:
        if rate > 100:
            raise one.wrong(f"spec_decode_acceptance_rate is {rate:g} per cent")
        how = f"{TOOL} (spec_decode_acceptance_rate)"
        found["draft_acceptance_rate"] = measured("draft_acceptance_rate", rate / 100, how)
    length = one.positive("spec_decode_acceptance_length")
    if length is not None:
        how = f"{TOOL} (spec_decode_acceptance_length)"
        found["mean_acceptance_length"] = measured("mean_acceptance_length", length, how)
    return found
