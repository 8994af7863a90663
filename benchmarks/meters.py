"""What measuring costs: the same decoding with and without the meters.

    python benchmarks/meters.py --rounds 60
    python benchmarks/meters.py --model tiny --rounds 200

Arms, all on one loaded model
    bare     our decode loop; the clock is read at the first chunk and at the end
    again    the same once more: what no difference looks like here
    span     the throughput probe: waiting for a CPU, forward passes and tokens are counted as well
    trace    the latency probe: the clock is read, and the device waited for, at every chunk
    turn     a whole turn as a run takes it: telemetry and the yardstick first, then the trace

Every round runs each arm once on the same prompt, in an order shuffled by the seed; the collector is
off in all of them. Printed is the median time per decoded token and, against `bare`, the median of
the rounds' ratios and the ratio of medians, both with a 95 % bootstrap interval over the rounds.
Below it stands what the meters take when there is nothing to measure: within the timed window per
token, and beside it per turn. The promise is that less than 0.5 % of the measured time is theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit import artefact as artefacts, device as devices, stats, workload
from compresskit.errors import CompressKitError
from compresskit.hf.sources import known
from compresskit.measure import clock, contention, environment, machine, telemetry
from compresskit.measure.count import Counter
from compresskit.measure.passes import Bench
from compresskit.measure.yardstick import Yardstick
from compresskit.metrics.formulae import Timed, tpot_s
from compresskit.spec import ModelSpec, ProtocolSpec, RunSpec, SamplingSpec, WorkloadSpec
from compresskit.store import write_text
from compresskit.system import Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.device import Device
    from compresskit.record import Sample

PROMISE = 0.005


def per_token(sample: Sample) -> float:
    """Seconds per token after the first, as every table prints it."""
    found = tpot_s(Timed(sample, 1, 0))
    assert found is not None
    return found


def bare(bench: Bench, index: int) -> float:
    """Decoding with nothing around it but the clock."""
    request = bench.request(index, 1)
    with clock.quiet():
        chunks = bench.system.generate(request)
        next(chunks)
        first = time.perf_counter()
        count = sum(1 for _ in chunks)
        return (time.perf_counter() - first) / count


def arms(bench: Bench, device: Device) -> dict[str, Callable[[int], float]]:
    watch, yardstick = telemetry.Watch(device), Yardstick(device)

    def turn(index: int) -> float:
        watch.look()
        yardstick.read()
        return per_token(bench.timed("trace", index, 1))

    return {
        "bare": lambda index: bare(bench, index),
        "again": lambda index: bare(bench, index),
        "span": lambda index: per_token(bench.timed("span", index, 1)),
        "trace": lambda index: per_token(bench.timed("trace", index, 1)),
        "turn": turn,
    }


def measure(model: str, args: argparse.Namespace) -> dict[str, list[float]]:
    spec = RunSpec(
        model=ModelSpec(name=model),
        device="cpu",
        workload=WorkloadSpec(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens),
        protocol=ProtocolSpec(repeats=args.rounds),
    )
    samples: dict[str, list[float]] = {}
    plan = artefacts.plan(spec)
    with artefacts.opened(plan) as opened:
        prompts = workload.prompts(
            opened.system.tokenizer, spec.workload, args.rounds + 1, args.seed
        ).ids
        bench = Bench(
            system=opened.system,
            prompts=prompts,
            workload=spec.workload,
            protocol=spec.protocol,
            sampling=SamplingSpec(),
            seed=args.seed,
        )
        running = arms(bench, plan.device)
        rng = random.Random(args.seed)
        for round_ in range(args.rounds + 1):
            order = list(running)
            rng.shuffle(order)
            for name in order:
                seconds = running[name](round_)
                if round_ > 0:  # the first round warms up
                    samples.setdefault(name, []).append(seconds)
            if round_ % 20 == 0:
                print(f"{model}: round {round_}/{args.rounds}", flush=True)
    return samples


def alone(device: Device) -> dict[str, float]:
    """Seconds that each meter takes when there is nothing to measure."""
    chunk = Chunk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long))

    def chunks(count: int) -> Iterator[Chunk]:
        for _ in range(count):
            yield chunk

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return None

    def repeated(work: Callable[[], object], times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    many, tokens, counter = 2000, chunk.tokens, Counter(nothing)
    plain = repeated(lambda: nothing(tokens, None), many)
    watch, yardstick = telemetry.Watch(device), Yardstick(device)

    def waiting() -> None:
        with contention.watch():
            pass

    traced = clock.trace(lambda: chunks(many), synchronize=nothing)
    return {
        "trace, per token": traced.arrivals[-1].seconds / many,
        "forward passes counted, per token": repeated(lambda: counter(tokens, None), many) - plain,
        "waiting for a CPU, per turn": repeated(waiting, 200),
        "telemetry, per turn": repeated(watch.look, 200),
        "yardstick, per turn": repeated(yardstick.read, 5),
    }


def report(model: str, samples: dict[str, list[float]], own: dict[str, float]) -> dict[str, Any]:
    print(
        f"\n{model}\n{'arm':<7}{'ms/token':>9}   ratio to bare, by round [95 %]   of medians [95 %]"
    )
    ratios = {}
    base = samples["bare"]
    for name, seconds in samples.items():
        rounds = stats.median_ratio(seconds, base)
        medians = stats.ratio_of_medians(seconds, base, paired=True)
        ratios[name] = {"by_round": rounds._asdict(), "of_medians": medians._asdict()}
        cells = (f"{r.value:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in (rounds, medians))
        print(f"{name:<7}{1000 * stats.median(seconds):9.3f}   " + "          ".join(cells))
    token = stats.median(base)
    within = sum(seconds for name, seconds in own.items() if name.endswith("per token"))
    print("the meters alone")
    for name, seconds in own.items():
        share = f"{seconds / token:8.3%} of a token's time" if name.endswith("token") else ""
        print(f"  {name:<36}{1e6 * seconds:10.1f} µs  {share}".rstrip())
    kept = within / token < PROMISE
    print(f"within the window: {within / token:.3%} ({'below' if kept else 'ABOVE'} {PROMISE:.1%})")
    return {
        "seconds_per_token": samples,
        "against_bare": ratios,
        "share_within_window": within / token,
        "kept": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", help="repeat for several; default: tiny, and SmolLM2 if cached"
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/<machine>/meters.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cached = [model.name for model in known() if model.cached]
    real = "pypi:smollm2-135m"
    models = args.model or ["tiny", *([real] if real in cached else [])]

    device = devices.resolve("cpu")
    own = alone(device)
    found: dict[str, Any] = {}
    for model in models:
        try:
            found[model] = report(model, measure(model, args), own)
        except CompressKitError as error:
            raise SystemExit(f"{model}: {error}") from None
    path = args.out or Path("results") / machine.describe(device).id / "meters.json"
    document = {
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "models": found,
        "meters_alone_seconds": own,
        "environment": environment.describe().model_dump(mode="json"),
        "started_at": environment.now(),
    }
    write_text(path, json.dumps(document, indent=1) + "\n")
    print(f"raw numbers: {path}")


if __name__ == "__main__":
    main()
