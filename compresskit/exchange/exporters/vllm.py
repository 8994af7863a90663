"""The JSON of `vllm bench serve --save-result --save-detailed`, one document a line.

Read for this: `vllm/benchmarks/serve.py` of vllm-project/vllm at 009e6d4a (`calculate_metrics`, the
result of `benchmark`, `main_async`). With several records the lines are what `--append-result`
gives. Definitions as vLLM has them:

    ttft, e2el   per request
    tpot         (e2el - ttft) / (tokens - 1) per request; requests with one token have none
    itl          gaps between chunks, all requests together: tokens that come together are one chunk
    std          ddof 0; percentiles are numpy's linear ones

Two things differ, and are null where vLLM would write 0: a mean over no values, and what a load
generator sees but an in-process run does not (queueing, arrival times, peak rates). `duration` is
the sum of the requests' times: our repetitions follow each other with other work in between. The
rows of a batch arrive together, so each counts as a request of its own at that concurrency.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.exchange.exporters.served import by_batch
from compresskit.metrics.acceptance import acceptance
from compresskit.metrics.formulae import gaps_s, tpot_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.exchange.exporters.served import Served
    from compresskit.record import Record

PERCENTILES = (50, 90, 95, 99)


def render(records: Sequence[Record]) -> str:
    """Return one JSON line per record and batch size."""
    lines = (json.dumps(one, allow_nan=False, ensure_ascii=False) for one in documents(records))
    return "".join(f"{line}\n" for line in lines)


def documents(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Yield one result per record and batch size."""
    for record in records:
        for served in by_batch(record):
            yield _document(record, served)


def _document(record: Record, served: Served) -> dict[str, Any]:
    requests = [one for one in served.samples for _ in range(served.batch)]
    outputs, duration = [one.tokens for one in requests], sum(one.last for one in served.samples)
    prompts = [served.prompt_tokens] * len(requests)
    gaps = [gaps_s(one) for one in requests] if served.chunked else None
    return {
        "date": _date(record.started_at),
        "endpoint_type": "compresskit",
        "backend": "compresskit",
        "label": record.label,
        "model_id": record.spec.model.name,
        "tokenizer_id": record.spec.model.name,
        "num_prompts": len(requests),
        # Free keys, as vLLM's own --metadata adds them.
        "compresskit_digest": record.digest,
        "device": record.device.name if record.device else None,
        "request_rate": "inf",
        "burstiness": None,
        "max_concurrency": served.batch,
        "duration": duration,
        "completed": len(requests),
        "failed": 0,
        "total_input_tokens": sum(prompts),
        "total_output_tokens": sum(outputs),
        "request_throughput": len(requests) / duration,
        "request_goodput": None,
        "output_throughput": sum(outputs) / duration,
        "total_token_throughput": (sum(prompts) + sum(outputs)) / duration,
        "input_lens": prompts,
        "output_lens": outputs,
        "ttfts": [one.first for one in requests],
        "itls": gaps,
        "latencies": [one.last for one in requests],
        "start_times": None,
        "queue_times": None,
        "generated_texts": None,
        "errors": [""] * len(requests),
        "max_output_tokens_per_s": None,
        "max_concurrent_requests": served.batch,
        "rtfx": None,
        **_speculation(served),
        **_spread("ttft", [one.first for one in requests]),
        **_spread("tpot", [v for one in requests if (v := tpot_s(one)) is not None]),
        **_spread("itl", [gap for one in gaps for gap in one] if gaps is not None else []),
        **_spread("e2el", [one.last for one in requests]),
    }


def _spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds; null of nothing."""
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std")]
    keys += [f"p{percentile}_{name}_ms" for percentile in PERCENTILES]
    if not seconds:
        return dict.fromkeys(keys)
    values = 1000 * np.asarray(seconds)
    found = [values.mean(), np.median(values), values.std(), *np.percentile(values, PERCENTILES)]
    return {key: float(value) for key, value in zip(keys, found, strict=True)}


def _speculation(served: Served) -> dict[str, Any]:
    """Acceptance over all repetitions; absent, as in vLLM, where nothing was drafted."""
    drafted = sum(one.sample.drafted for one in served.samples)
    accepted = sum(one.sample.accepted for one in served.samples)
    if not drafted:
        return {}
    told = {
        "spec_decode_acceptance_rate": 100 * accepted / drafted,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
    }
    # A record made before single steps were kept does not say which of them drafted anything.
    found = acceptance(served.samples)
    if found is not None and (length := found.mean_length()) is not None:
        told["spec_decode_acceptance_length"] = length
        told["spec_decode_num_drafts"] = len(found.steps)
    return told


def _date(started_at: str) -> str:
    """Return the stamp as vLLM writes it; what is no date stays as it is."""
    try:
        return datetime.fromisoformat(started_at).strftime("%Y%m%d-%H%M%S")
    except ValueError:
        return started_at
