"""llama-bench's `-o json` and `-o jsonl`.

Read for this: `tools/llama-bench/llama-bench.cpp` of ggml-org/llama.cpp at 0104b151, and the sample
output in its README.

    pp   prompt only       prefill_tokens_per_s, the median over repetitions, which is ours
    tg   generation only   decode_tokens_per_s_per_seq, tpot_s: it starts from one given token, so
                           all n tokens are decoded
    pp+tg                  e2e_s, output_tokens_per_s, total_tokens_per_s

Where the file has the repetitions (`samples_ns`) our formulae are applied to them; else the tool's
mean of rates is taken, and the source says so. The tool's own `avg_ts` is kept beside.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from compresskit.exchange.importers.fields import documents, measured, middle
from compresskit.exchange.peers import Peer, Stated

if TYPE_CHECKING:
    from compresskit.exchange.importers.fields import Fields, Source
    from compresskit.record import Reading

TOOL = "llama-bench"
_CONTEXT = (
    *("build_commit", "build_number", "backends", "model_filename", "model_n_params", "n_batch"),
    *("n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn", "n_depth"),
)


def read(source: Source) -> list[Peer]:
    """Return one peer per test; raise `RecordError`."""
    return [_peer(source, index, one) for index, one in enumerate(documents(source))]


def _peer(source: Source, index: int, one: Fields) -> Peer:
    one.require("n_prompt", "n_gen", "avg_ts", tool=TOOL)
    n_prompt, n_gen = one.whole("n_prompt") or 0, one.whole("n_gen") or 0
    if n_prompt + n_gen == 0:
        raise one.wrong("n_prompt and n_gen are both 0: nothing was tested")
    depth = one.whole("n_depth") or 0
    average = one.positive("avg_ts")
    metrics = _metrics(one, n_prompt, n_gen, average)
    size = one.positive("model_size")
    if size is not None:
        metrics["weights_bytes"] = measured("weights_bytes", size, f"{TOOL} (model_size)")
    stated = {"avg_ts": Stated(value=average)} if average is not None else {}
    spread = one.number("stddev_ts")
    if spread is not None:
        stated["stddev_ts"] = Stated(value=spread)
    parts = [f"{kind}{count}" for kind, count in (("pp", n_prompt), ("tg", n_gen)) if count]
    return Peer(
        tool=TOOL,
        label="+".join(parts) + (f" @ d{depth}" if depth else ""),
        file=source.file(index),
        measured_at=one.text("test_time"),
        model=one.text("model_type") or one.text("model_filename"),
        device=one.text("gpu_info") or one.text("cpu_info"),
        batch=1,
        prompt_tokens=n_prompt + depth,
        new_tokens=n_gen,
        metrics=metrics,
        stated=stated,
        context=one.context(_CONTEXT),
    )


def _metrics(one: Fields, n_prompt: int, n_gen: int, average: float | None) -> dict[str, Reading]:
    nanoseconds = one.numbers("samples_ns")
    if nanoseconds is not None and (not nanoseconds or min(nanoseconds) <= 0):
        raise one.wrong("samples_ns holds no times, or a time of zero")
    tokens = n_prompt + n_gen
    if nanoseconds is None:
        rate, how = average or 0.0, f"{TOOL} (avg_ts, the mean of its rates)"
        seconds = tokens / rate
    else:
        rates = [1e9 * tokens / ns for ns in nanoseconds]
        one.agree(average, fmean(rates), "avg_ts")
        rate, how = middle(rates), f"{TOOL} (median of {len(rates)} repetitions)"
        seconds = middle(nanoseconds) / 1e9
    if not n_gen:
        found = {"prefill_tokens_per_s": rate}
    elif not n_prompt:
        found = {"decode_tokens_per_s_per_seq": rate, "tpot_s": seconds / n_gen}
    else:
        found = {
            "e2e_s": seconds,
            "output_tokens_per_s": n_gen / seconds,
            "total_tokens_per_s": rate,
        }
    return {name: measured(name, value, how) for name, value in found.items()}
