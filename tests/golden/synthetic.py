"""Write the synthetic records of `records/v1`: invented numbers, no machine ever gave them.

    python tests/golden/synthetic.py

The files are the golden ones, not this script: a record of schema 1 must stay readable for ever.
Run it only while schema 1 is not released; a new schema gets a folder of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit.record import (
    Arrival,
    Block,
    DeviceFacts,
    Distribution,
    EnergyPass,
    EnergyWindow,
    Environment,
    Estimated,
    Fidelity,
    GreedyComparison,
    LatencyPass,
    Likelihood,
    Measured,
    MemoryPass,
    ModelFacts,
    Passes,
    Quality,
    Record,
    Sample,
    Setup,
    TextFacts,
    ThroughputPass,
    Unavailable,
)
from compresskit.spec import MethodSpec, RunSpec
from compresskit.store import dumps
from compresskit.units import Unit
from compresskit.validity import judge

FOLDER = Path(__file__).parent / "records" / "v1"
PROMPT, NEW, REPEATS, WARMUPS = 32, 16, 5, 1
# Relative duration of the repetitions: small, without a trend, the same for every run.
JITTER = (1.00, 1.02, 0.99, 1.01, 0.98)
TEXT = TextFacts(source="embedded", sha256="0" * 64, tokens=4096, bytes=16384)
NO_COUNTER = Unavailable(reason="no energy counter: RAPL not readable, no NVML")


def spec(*stack: MethodSpec, mode: str = "eager") -> RunSpec:
    """The spec that all synthetic runs share but for stack and mode."""
    return RunSpec().replace(
        model={"name": "synthetic"},
        device="cpu",
        engine={"name": "native", "mode": mode},
        stack=stack,
        workload={"prompt_tokens": PROMPT, "new_tokens": NEW, "batch_sizes": [1, 4]},
        protocol={"repeats": REPEATS, "warmups": WARMUPS},
    )


def sample(ttft: float, tpot: float, chunks: list[int], factor: float) -> Sample:
    """One repetition: `chunks` tokens at a time after the first."""
    arrivals = [Arrival(ttft * factor, 1)]
    for tokens in chunks:
        arrivals.append(Arrival(arrivals[-1].seconds + tpot * factor, tokens))
    speculated = any(tokens > 1 for tokens in chunks)
    return Sample(
        arrivals=tuple(arrivals),
        forwards=1 + len(chunks),
        drafted=4 * len(chunks) if speculated else 0,
        accepted=sum(chunks) - len(chunks) if speculated else 0,
    )


def passes(
    *,
    ttft: float,
    step: float,
    chunks: list[int],
    batched: bool = True,
    weights: dict[str, int],
    cache: int,
    energy: Any = NO_COUNTER,
    speed: bool = True,
) -> Passes:
    """All passes of a run; decode steps of batch 4 take 1.6 times as long as those of batch 1."""

    def series(count: float) -> dict[str, Any]:
        taken = tuple(sample(ttft * count, step * count, chunks, factor) for factor in JITTER)
        warm = (sample(ttft * count * 3, step * count * 2, chunks, 1.0),)
        return {"prompt_tokens": PROMPT, "new_tokens": NEW, "warmups": warm, "samples": taken}

    def two_marks(batch: int, count: float) -> ThroughputPass:
        full = series(count)
        for key in ("warmups", "samples"):
            full[key] = tuple(
                one.model_copy(
                    update={
                        "arrivals": (
                            one.arrivals[0],
                            Arrival(one.arrivals[-1].seconds, sum(chunks)),
                        )
                    }
                )
                for one in full[key]
            )
        return ThroughputPass(batch=batch, **full)

    four = (
        two_marks(4, 1.6)
        if batched
        else ThroughputPass(
            batch=4,
            prompt_tokens=PROMPT,
            new_tokens=NEW,
            reason="the stack decodes one sequence at a time",
        )
    )
    held = float(sum(weights.values()))
    peaks: dict[str, Any] = {
        f"rss/{window}": Measured(value=held * factor, unit=Unit.BYTE, source="VmHWM")
        for window, factor in (("load", 3.0), ("apply", 2.0), ("prefill", 1.5), ("decode", 1.25))
    }
    return Passes(
        latency=LatencyPass(batch=1, **series(1.0)) if speed else None,
        throughput=(two_marks(1, 0.95), four) if speed else None,
        memory=MemoryPass(
            batch=1,
            tokens_in_cache=PROMPT + NEW - 1,
            weights_bytes=weights,
            parameters=100_000_000,
            cache_bytes=cache * (PROMPT + NEW - 1),
            peaks=peaks,
        ),
        energy=EnergyPass(
            prefill=EnergyWindow(reading=energy, tokens=32_000, window_seconds=10.0),
            generate=EnergyWindow(reading=energy, tokens=400, window_seconds=10.0),
            prompt_tokens=PROMPT,
            new_tokens=NEW,
        )
        if speed
        else None,
    )


def quality(nll: float, *, kl: float | None, top1: float = 1.0, baseline: str = "") -> Quality:
    """Invented quality; `kl` None: the run is the baseline itself."""
    dense = 3.0
    likelihood = Likelihood(
        protocol_id="embedded:synthetic:window=512",
        text=TEXT,
        scored_tokens=4096,
        scored_bytes=16384,
        nll_mean=nll,
        nll_stderr=0.02,
        perplexity=2.718281828459045**nll,
        bits_per_byte=nll / 4 / 0.6931471805599453,
    )
    if kl is None:
        return Quality(likelihood=likelihood, seconds=1.0)
    return Quality(
        likelihood=likelihood,
        fidelity=Fidelity(
            protocol_id=likelihood.protocol_id,
            baseline_digest=baseline,
            scored_tokens=4096,
            kl=Distribution(mean=kl, stderr=kl / 20, percentiles={"50": kl / 2, "99": kl * 8}),
            top1_agreement=top1,
            top1_stderr=0.002,
            delta_nll=nll - dense,
            delta_nll_stderr=0.001 if kl else 0.0,
            baseline_nll=dense,
        ),
        greedy=GreedyComparison(
            prompts=4,
            max_new_tokens=48,
            exact_match=0.5 if kl else 1.0,
            first_divergence=(12, None, 30, None) if kl else (None, None, None, None),
            length_ratio=1.0,
        ),
        seconds=2.0,
    )


def record(one: RunSpec, *, status: str = "ok", **fields: Any) -> Record:
    """A record with everything that does not vary, and the verdict that the rules give it."""
    names = " + ".join(method.label() for method in one.stack) or "dense"
    mode = one.engine.mode
    ran = {
        "model": ModelFacts(
            kind="local",
            revision="synthetic-revision",
            baseline="full_precision",
            architecture="SyntheticForCausalLM",
            parameters=100_000_000,
            dtype="bfloat16",
            tokenizer_sha256="1" * 64,
        ),
        "prompts": TEXT,
        "setup": Setup(load_seconds=1.5, apply_seconds=0.5 if one.stack else 0.0),
    }
    built = Record(
        digest=one.digest(),
        label=names if mode == "eager" else f"{names} ({mode})",
        status=status,
        spec=one,
        started_at="2026-01-01T00:00:00Z",
        device=DeviceFacts(kind="cpu", name="Synthetic CPU", memory_bytes=8 * 2**30, threads=1),
        environment=Environment(
            compresskit="0.1.0",
            python="3.11.0",
            platform="synthetic",
            packages={"torch": "2.13.0"},
            cpu_count=2,
        ),
        **(ran if status == "ok" else {}),
        **fields,
    )
    return built.model_copy(update={"validity": judge(built)})


def block(done: Passes) -> tuple[Block, ...]:
    """One block on a quiet machine."""
    return (Block(started_at="2026-01-01T00:00:00Z", passes=done, load_average=(0.9, 0.8, 0.7)),)


def build() -> dict[str, Record]:
    """All synthetic records by name."""
    one_by_one, int8 = [1] * (NEW - 1), MethodSpec(name="quant/int8")
    ngram = MethodSpec(name="speculative/ngram", params={"order": 3})
    fake = MethodSpec(name="kv/synthetic")
    base = spec().digest()
    bf16 = {"dense": 200_000_000}
    estimate = Estimated(value=120.0, unit=Unit.JOULE, model="TDP times utilisation")
    return {
        "dense": record(
            spec(),
            blocks=block(
                passes(ttft=0.1, step=0.05, chunks=one_by_one, weights=bf16, cache=24_576)
            ),
            quality=quality(3.0, kl=None),
        ),
        "dense-prepacked": record(
            spec(mode="prepacked"),
            blocks=block(
                passes(ttft=0.08, step=0.04, chunks=one_by_one, weights=bf16, cache=24_576)
            ),
            quality=quality(3.0, kl=0.0, baseline=base),
            kernels={"dense_linear": "onednn"},
        ),
        "int8": record(
            spec(int8),
            blocks=block(
                passes(
                    ttft=0.12,
                    step=0.025,
                    chunks=one_by_one,
                    weights={"packed": 90_000_000, "scales": 2_000_000, "dense": 20_000_000},
                    cache=24_576,
                    energy=estimate,
                )
            ),
            quality=quality(3.002, kl=0.0015, top1=0.985, baseline=base),
            kernels={"int8_matmul": "reference"},
        ),
        "ngram": record(
            spec(ngram),
            blocks=block(
                passes(
                    ttft=0.1,
                    step=0.055,
                    chunks=[3, 1, 4, 2, 5],
                    batched=False,
                    weights=bf16,
                    cache=24_576,
                )
            ),
            quality=quality(3.0, kl=0.0, baseline=base),
        ),
        "simulated": record(
            spec(fake),
            blocks=block(
                passes(ttft=0.1, step=0.05, chunks=[], weights=bf16, cache=24_576, speed=False)
            ),
            quality=quality(3.05, kl=0.04, top1=0.93, baseline=base).model_copy(
                update={"notes": ("the text gives 6 windows instead of 8",)}
            ),
            simulated=("kv/synthetic",),
            facts={"warnings": ["the cache is rounded, not packed"]},
        ),
        "short": record(
            spec(int8, ngram),
            blocks=block(
                passes(
                    ttft=0.12,
                    step=0.03,
                    chunks=[3, 1, 4, 2],
                    batched=False,
                    weights=bf16,
                    cache=24_576,
                )
            ),
            quality=quality(3.002, kl=0.0015, top1=0.985, baseline=base),
        ),
        "skipped": record(
            spec(ngram, ngram),
            status="skipped",
            reason="two methods both fill the 'decode' stage; keep one.",
        ),
        "failed": record(
            spec(int8, mode="compiled"),
            status="failed",
            reason="out of memory: synthetic. Use a smaller batch, a shorter prompt or dtype.",
        ),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, built in build().items():
        (FOLDER / f"synthetic-{name}.json").write_text(dumps(built), encoding="utf-8")
