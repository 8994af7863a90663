"""What our attention function and cache layers cost where they change nothing, and what they save.

    python benchmarks/attention_overhead.py --tokens 1024 --rounds 15
    python benchmarks/attention_overhead.py --tokens 4096 --method kv/sink_window:window=1020

Arms, all on one model in one process
    stock       transformers: attention `sdpa`, its `DynamicCache`
    function    our attention function without the native routine, `DynamicCache`
    native      the same with it: what every run of ours does on a CPU that has it
    METHOD      our function and the layers of that method, with the native routine
    METHOD/sdpa the same without it: beside `stock`, the price of our layers alone

The cache is filled with random keys and values, so no prompt has to be computed; then single tokens
are decoded on one thread, whose own CPU time is what counts, so that neighbours disturb little. Every
round runs each arm once, in shuffled order. Printed are the median time per token of each arm and the
ratio of medians to `stock` with a 95 % bootstrap interval: 1.02 is 2 % slower.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit import artefact as artefacts, catalogue, stats
from compresskit.hf import attention
from compresskit.hf.cache import new_dynamic
from compresskit.measure import environment
from compresskit.measure.clock import quiet
from compresskit.method import Context
from compresskit.spec import ModelSpec, ProtocolSpec, RunSpec
from compresskit.store import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.system import System

METHODS = ("kv/knorm:ratio=0",)


@contextmanager
def native(wanted: bool) -> Iterator[None]:
    """Let the native routine answer single tokens, or not."""
    before = os.environ.get("COMPRESSKIT_NATIVE")
    os.environ["COMPRESSKIT_NATIVE"] = str(int(wanted))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COMPRESSKIT_NATIVE"]
        else:
            os.environ["COMPRESSKIT_NATIVE"] = before


def filled(system: System, tokens: int) -> Any:
    """A cache that holds that many random rows (an evicting one drops what is too many)."""
    config = system.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = 1, config.num_key_value_heads, tokens, width
    generator = torch.Generator().manual_seed(0)
    cache = system.new_cache(tokens)
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        cache.update(keys.to(system.model.dtype), values.to(system.model.dtype), index)
    return cache


@torch.inference_mode()
def per_token(system: System, tokens: int, steps: int) -> float:
    """Median CPU seconds of a decoded token on this thread; the first token warms up."""
    cache, token, seconds = filled(system, tokens), torch.tensor([[1]]), []
    for _ in range(steps + 1):
        start = time.thread_time()
        token = system.step(token, cache)[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.thread_time() - start)
    return stats.median(seconds[1:])


def no_calibration(name: str, tokens: int) -> list[int]:
    """Refuse: cache methods that are timed here need none."""
    raise SystemExit(f"a method asks for calibration text ({name}, {tokens}): not timed here.")


def no_model(spec: ModelSpec) -> System:
    """Refuse: cache methods load no second model."""
    raise SystemExit(f"a method asks for a second model ({spec.name}): not timed here.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in the cache")
    parser.add_argument(
        "--steps", type=int, default=4, help="tokens decoded a round, after one more"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--method", action="append", default=[], help="default: kv/knorm:ratio=0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the raw numbers there")
    args = parser.parse_args()

    spec = RunSpec(
        model=ModelSpec(name=args.model, dtype=args.dtype),
        device="cpu",
        protocol=ProtocolSpec(threads=1),
    )
    with ExitStack() as stack:
        system = stack.enter_context(artefacts.opened(artefacts.plan(spec))).system
        model = system.model
        dense = replace(system, new_cache=lambda capacity: new_dynamic(model.config))
        context = Context(no_model, no_calibration, args.seed, args.dtype)
        arms = {"stock": ("sdpa", False, dense), "function": (attention.NAME, False, dense)}
        arms["native"] = (attention.NAME, True, dense)
        for name in args.method or METHODS:
            parsed = catalogue.parse_method(name)
            evicting = catalogue.decode(parsed.name, parsed.params).apply(dense, context)
            arms[name] = (attention.NAME, True, evicting)
            arms[f"{name}/sdpa"] = (attention.NAME, False, evicting)
        samples: dict[str, list[float]] = {name: [] for name in arms}
        rng, order = random.Random(args.seed), list(arms)
        for round_ in range(args.rounds + 1):
            rng.shuffle(order)
            for name in order:
                function, fast, arm = arms[name]
                model.set_attn_implementation(function)
                with native(fast), quiet():
                    seconds = per_token(arm, args.tokens, args.steps)
                if round_ > 0:  # the first round warms up
                    samples[name].append(seconds)

    print(f"{'arm':<44} {'ms/token':>9}   time against stock [95 %]")
    for name, seconds in samples.items():
        ratio = stats.ratio_of_medians(seconds, samples["stock"])
        print(
            f"{name:<44} {1000 * stats.median(seconds):9.2f}   "
            f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        )
    if args.out is not None:
        document = {
            **{key: value for key, value in vars(args).items() if key != "out"},
            "seconds_per_token": samples,
            "environment": environment.describe().model_dump(mode="json"),
            "started_at": environment.now(),
        }
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
