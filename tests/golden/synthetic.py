"""Write the synthetic records of `records/v2`: invented numbers, no machine ever gave them.

    python tests/golden/synthetic.py

The files are the golden ones, not this script: a record of every schema must stay readable for ever,
and `records/SHA256SUMS` says that no file was touched. What exists is never written again; a new
schema gets a folder of its own, and this script then writes that one.
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
    GpuState,
    GreedyComparison,
    LatencyPass,
    Likelihood,
    Limits,
    Measured,
    MemoryPass,
    ModelFacts,
    Passes,
    Phase,
    Quality,
    Record,
    Sample,
    Setup,
    Telemetry,
    TextFacts,
    ThroughputPass,
    Turn,
    Unavailable,
)
from compresskit.spec import MethodSpec, Prices, RunSpec
from compresskit.store import dumps
from compresskit.units import Unit
from compresskit.validity import judge

FOLDER = Path(__file__).parent / "records" / "v2"
PROMPT, NEW, REPEATS, WARMUPS = 32, 16, 8, 1
# Relative duration of the repetitions: small, without a trend, the same for every run.
JITTER = (1.00, 1.02, 0.99, 1.01, 0.98, 1.01, 0.99, 1.00)
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
        waited=0.0,
        tokens_sha256="2" * 64,
    )


def windows(kind: str, joules: float | None, tokens: int) -> tuple[EnergyWindow, ...]:
    """Eight windows of 10 s read from a counter that ticks every 100 ms; `joules` None: no counter."""
    if joules is None:
        return (EnergyWindow(reading=NO_COUNTER),) * len(JITTER)
    return tuple(
        EnergyWindow(
            reading=Measured(value=spent, unit=Unit.JOULE, source="rapl"),
            window_seconds=10.0,
            tokens=tokens,
            reads=((0.0, 1000.0), (10.0, 1000.0 + spent)),
            scope="package",
            devices=("3" * 12,),
            ticks=100,
            tick_seconds=0.1,
            quantisation=0.01,
            integrated=Measured(value=spent * 1.01, unit=Unit.JOULE, source="power"),
            domains={"dram": Measured(value=spent / 10, unit=Unit.JOULE, source="rapl")}
            if kind == "generate"
            else {},
        )
        for spent in (joules * factor for factor in JITTER)
    )


def passes(
    *,
    ttft: float,
    step: float,
    chunks: list[int],
    batched: bool = True,
    weights: dict[str, int],
    cache: int,
    joules: float | None = None,
    estimate: Any = None,
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
    phases = {
        window: Phase(
            peaks={"rss": Measured(value=held * factor, unit=Unit.BYTE, source="VmHWM")},
            counter="rss",
            parts={
                "runtime": Measured(value=held / 10, unit=Unit.BYTE, source="VmRSS before loading"),
                "weights": Measured(value=held, unit=Unit.BYTE, source="storage bytes"),
            },
        )
        for window, factor in (("load", 3.0), ("compress", 2.0), ("prefill", 1.5), ("decode", 1.25))
    }
    return Passes(
        latency=LatencyPass(batch=1, **series(1.0)) if speed else None,
        throughput=(two_marks(1, 0.95), four) if speed else None,
        memory=MemoryPass(
            batch=1,
            tokens_in_cache=PROMPT + NEW - 1,
            weights_bytes=weights,
            parameters=100_000_000,
            cache_bytes={"keys_values": cache * (PROMPT + NEW - 1)},
            moved_bytes={"weights": int(held), "cache": cache * (PROMPT + NEW - 1)},
            phases=phases,
        ),
        energy=EnergyPass(
            prefill=windows("prefill", joules, 32_000),
            generate=windows("generate", joules, 400)
            if estimate is None
            else (EnergyWindow(reading=estimate, window_seconds=10.0, tokens=400),),
            idle=windows("idle", None if joules is None else joules / 4, 0)[0],
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
        window_nll=(nll - 0.02, nll + 0.02),
        window_tokens=(2048, 2048),
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
            window_kl=(kl * 0.9, kl * 1.1),
            window_top1=(round(2048 * top1), round(2048 * top1)),
            window_tokens=(2048, 2048),
        ),
        greedy=GreedyComparison(
            prompts=4,
            max_new_tokens=48,
            exact_match=0.5 if kl else 1.0,
            first_divergence=(12, None, 30, None) if kl else (None, None, None, None),
            length_ratio=1.0,
            outputs_sha256=("4" * 64,) * 4,
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
        "setup": Setup(
            load_seconds=1.5,
            apply_seconds=0.5 if one.stack else 0.0,
            energy=NO_COUNTER,
            calibration_tokens=0,
        ),
        "limits": Limits(
            copy_bytes_per_second=Measured(value=2e10, unit=Unit.BYTE_PER_SECOND, source="copy"),
            matmul_flops_per_second=Measured(
                value=2e11, unit=Unit.FLOP_PER_SECOND, source="matmul"
            ),
            dispatch_seconds=Measured(value=5e-6, unit=Unit.SECOND, source="add"),
            threads=1,
            dtype="bfloat16",
            measured_at="2026-01-01T00:00:00Z",
        ),
        "prices": Prices(per_hour=2.5, per_kwh=0.1, pue=1.2, source="invented"),
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


def block(done: Passes, *, side: int | None = None) -> tuple[Block, ...]:
    """One block on a quiet machine; with `side`, a turn per repetition of one interleaved session."""
    turns = tuple(
        Turn(
            round=n, position=(n + side) % 2, started=100.0 + 2 * n + side, yardstick=0.01 * factor
        )
        for n, factor in enumerate(JITTER)
        if side is not None
    )
    gpu = GpuState(device="5" * 12, temperature_c=40.0, throttle=(), foreign_processes=0)
    states = (
        Telemetry(seconds=0.0, load_average=0.9, cpu_mhz=3000.0),
        Telemetry(seconds=30.0, load_average=0.8, gpus=(gpu,)),
    )
    return (
        Block(
            pair=None if side is None else "synthetic-session",
            turns=turns,
            started_at="2026-01-01T00:00:00Z",
            passes=done,
            load_average=(0.9, 0.8, 0.7),
            telemetry=states,
        ),
    )


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
                passes(
                    ttft=0.1,
                    step=0.05,
                    chunks=one_by_one,
                    weights=bf16,
                    cache=24_576,
                    joules=120.0,
                ),
                side=0,
            ),
            quality=quality(3.0, kl=None),
        ),
        "dense-prepacked": record(
            spec(mode="prepacked"),
            blocks=block(
                passes(
                    ttft=0.08,
                    step=0.04,
                    chunks=one_by_one,
                    weights=bf16,
                    cache=24_576,
                    estimate=estimate,
                )
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
                    joules=60.0,
                ),
                side=1,
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
        path = FOLDER / f"synthetic-{name}.json"
        if not path.exists():
            path.write_text(dumps(built), encoding="utf-8")
