"""llama-bench's JSON lines: one test a line, `pp` for the prompt, `tg` for the generated tokens.

Read for this: `tools/llama-bench/llama-bench.cpp` of ggml-org/llama.cpp at 0104b151
(`test::get_fields`, `get_ts`, `jsonl_printer`).

    pp   n_prompt = P, n_gen = 0         time to the first token: llama-bench stops before sampling,
                                         we stop after it
    tg   n_prompt = 0, n_gen = n - 1,    time from the first to the last token; llama-bench's own
         n_depth = P                     `-d`, which fills the cache outside the timed part

`avg_ts` is the mean of the rates of the repetitions (not total tokens over total time) and
`stddev_*` has ddof 1. llama-bench decodes one sequence, so other batch sizes have no line, and its
own options (offload, cache types, splits) are null.
"""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from compresskit.exchange.exporters.served import single
from compresskit.metrics import METRICS
from compresskit.record import Measured

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.record import Record

FIELDS = (
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends"),
    *("model_filename", "model_type", "model_size", "model_n_params", "n_batch"),
    *("n_ubatch", "n_threads", "cpu_mask", "cpu_strict", "poll"),
    *("type_k", "type_v", "n_gpu_layers", "n_cpu_moe", "split_mode"),
    *("main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split"),
    *("tensor_buft_overrides", "load_mode", "embeddings"),
    *("no_op_offload", "no_host", "fit_target", "fit_min_ctx"),
    *("n_prompt", "n_gen", "n_depth"),
    *("test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
)
"""All keys of a line, in llama-bench's order."""


def render(records: Sequence[Record]) -> str:
    """Return the lines of all records; empty where nothing ran one sequence at a time."""
    lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows(records))
    return "".join(f"{line}\n" for line in lines)


def rows(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Yield one document per test."""
    for record in records:
        served = single(record)
        if served is None:
            continue
        prompt = served.prompt_tokens
        yield _row(record, prompt, 0, 0, [(prompt, one.first) for one in served.samples])
        decoded = [(o.tokens - 1, o.last - o.first) for o in served.samples if o.last > o.first]
        # A line has one n_gen: repetitions of another length belong to another test.
        if decoded and len({tokens for tokens, _ in decoded}) == 1:
            yield _row(record, 0, decoded[0][0], prompt, decoded)


def _row(
    record: Record, n_prompt: int, n_gen: int, n_depth: int, timed: list[tuple[int, float]]
) -> dict[str, Any]:
    samples_ns = [round(seconds * 1e9) for _, seconds in timed]
    samples_ts = [tokens / seconds for tokens, seconds in timed]
    device, environment, model = record.device, record.environment, record.model
    weights = METRICS["weights_bytes"].value(record)
    on_cpu = device is not None and device.kind == "cpu"
    known: dict[str, Any] = {
        "build_commit": environment.git.commit if environment and environment.git else None,
        "cpu_info": device.name if device and on_cpu else None,
        "gpu_info": device.name if device and not on_cpu else None,
        "backends": f"compresskit {environment.compresskit}" if environment else "compresskit",
        "model_filename": record.spec.model.name,
        "model_type": f"{model.architecture} {record.label}" if model else record.label,
        "model_size": round(weights.value) if isinstance(weights, Measured) else None,
        "model_n_params": model.parameters if model else None,
        "n_threads": device.threads if device else None,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test_time": record.started_at,
        "avg_ns": round(statistics.fmean(samples_ns)),
        "stddev_ns": round(statistics.stdev(samples_ns)) if len(samples_ns) > 1 else None,
        "avg_ts": statistics.fmean(samples_ts),
        "stddev_ts": statistics.stdev(samples_ts) if len(samples_ts) > 1 else None,
        "samples_ns": samples_ns,
        "samples_ts": samples_ts,
    }
    return {field: known.get(field) for field in FIELDS}
