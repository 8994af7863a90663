"""Peak memory and time of a distillation loss: chunk by chunk, and with all logits at a time.

    OMP_NUM_THREADS=1 python benchmarks/distill_memory.py --out memory.json

The loss is the forward KL, whose plain form torch has ready: two heads, two log-softmaxes, one
`kl_div`. The shape is SmolLM2-135M's with random weights, since neither bytes nor time depend on
their values. Two scopes:

    loss   hidden states of student and teacher are given: the heads and what is behind them
    step   the student's blocks too, embedding and head tied; the teacher's hidden states are given

The teacher's own forward pass keeps nothing for a backward pass and is the same in both arms, so it
is left out. Counted are

    tensors   most bytes of new tensors alive at a time, gradients included, weights not; every
              operation that torch dispatches is looked at, so the figure is exact
    rss       how far resident memory rose in one more step, by the kernel's high-water mark;
              allocators add to it
    seconds   this thread's CPU time without the counting, arms interleaved in shuffled order

Printed is the ratio chunked / plain; of times that of medians, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit import device as devices, stats
from compresskit.distill.batch import Dense
from compresskit.distill.lesson import Lesson
from compresskit.distill.losses.chunked import Places, chunk_of, summed
from compresskit.distill.losses.terms import parse
from compresskit.hf.head import Head, Shape
from compresskit.measure import environment
from compresskit.measure.clock import quiet
from compresskit.measure.memory.activations import LiveTensors
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.store import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], torch.Tensor]
    """Forward and backward pass of one arm; returns the loss."""

TERMS = parse("forward_kl")
MEBIBYTE = 1 << 20


def student(args: argparse.Namespace) -> Any:
    """A decoder of SmolLM2-135M's shape with fewer blocks."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 192),
        head_dim=64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def plain(logits: torch.Tensor, dense: Dense) -> torch.Tensor:
    """Forward KL, summed over places, of whole matrices."""
    with torch.no_grad():
        theirs = dense.head(dense.hidden).float().log_softmax(-1)
    ours = logits.float().log_softmax(-1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True)


def scopes(args: argparse.Namespace) -> dict[str, dict[str, Step]]:
    """The arms of both scopes; within a scope they share every weight and input."""
    torch.manual_seed(args.seed)
    rows = args.places // args.length
    tokens = torch.randint(3, args.vocabulary, (rows, args.length + 1))
    count = rows * args.length
    teacher = Head(nn.Linear(args.width, args.vocabulary, bias=False), Shape()).requires_grad_(
        False
    )
    dense = Dense(torch.randn(count, args.width), teacher, {})
    top = Head(nn.Linear(args.width, args.vocabulary, bias=False), Shape())
    hidden = torch.randn(count, args.width, requires_grad=True)
    places = Places(tokens[:, 1:].flatten(), torch.ones(count), dense)
    model = student(args)
    lesson = Lesson(model, TERMS, chunk=args.chunk)
    weights = torch.ones(tokens.shape)

    def arm(loss: Callable[[], torch.Tensor], *trained: Any) -> Step:
        def step() -> torch.Tensor:
            for one in trained:
                one.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                total = loss()
            total.backward()
            return total.detach()

        return step

    mine, all_ = (hidden, *top.parameters()), tuple(model.parameters())
    return {
        "loss": {
            "plain": arm(lambda: plain(top(hidden), dense), *mine),
            "chunked": arm(
                lambda: summed(hidden, top, TERMS, places, chunk=args.chunk).total, *mine
            ),
        },
        "step": {
            "plain": arm(
                lambda: plain(model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1), dense),
                *all_,
            ),
            "chunked": arm(lambda: lesson(tokens, weights, dense).total, *all_),
        },
    }


def resident(step: Step) -> int | None:
    """Bytes by which resident memory rose; None where the kernel does not tell."""
    meter = PeakMeter(devices.resolve("cpu"))
    meter.start()
    before = psutil.Process().memory_info().rss
    step()
    value = meter.read()["rss"].value
    return None if value is None else int(value) - before


def measured(arms: dict[str, Step], rounds: int, rng: random.Random) -> dict[str, dict[str, Any]]:
    """All figures of one scope, every sample of them."""
    found: dict[str, dict[str, Any]] = {}
    losses = {}
    for name, step in arms.items():
        with LiveTensors() as live:  # warms up as well
            losses[name] = step().item()
        found[name] = {"tensors": live.peak, "rss": resident(step), "seconds": []}
    off = abs(losses["chunked"] / losses["plain"] - 1)
    if off > 1e-3:
        raise SystemExit(f"the arms disagree: {losses}. Their costs are not comparable.")
    order = list(arms)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            with quiet():
                start = time.thread_time()
                arms[name]()
                found[name]["seconds"].append(time.thread_time() - start)
    return found


def line(scope: str, found: dict[str, dict[str, Any]]) -> str:
    """One line of the table."""
    ours, theirs = found["chunked"], found["plain"]
    seconds = stats.ratio_of_medians(ours["seconds"], theirs["seconds"])
    cells = [f"{scope:<6}"]
    for name in ("tensors", "rss"):
        before, after = theirs[name], ours[name]
        cells.append(
            f"{'unavailable':>22}"
            if before is None or after is None
            else f"{before / MEBIBYTE:7.0f} {after / MEBIBYTE:7.0f} {after / before:6.2f}"
        )
    cells.append(f"{stats.median(theirs['seconds']):6.2f} {stats.median(ours['seconds']):6.2f}")
    cells.append(f"{seconds.value:.3f} [{seconds.low:.3f}, {seconds.high:.3f}]")
    return "   ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--places", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256, help="places of a row")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the student")
    parser.add_argument("--chunk", type=int, default=None, help="places at a time; default by size")
    parser.add_argument("--scope", action="append", choices=("loss", "step"), help="default: both")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16 (autocast)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the raw numbers there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    found = {}
    print(f"{'':<6}   {'tensors, MiB':^22}   {'rss, MiB':^22}   {'CPU seconds':^13}")
    heads = "  plain chunked  ratio"
    print(f"{'scope':<6}   {heads}   {heads}    plain  chunked  ratio [95 %]")
    for scope, arms in scopes(args).items():
        if args.scope and scope not in args.scope:
            continue
        found[scope] = measured(arms, args.rounds, rng)
        print(line(scope, found[scope]), flush=True)
    if args.out is not None:
        document = {
            **{key: value for key, value in vars(args).items() if key != "out"},
            "places_in_a_chunk": args.chunk or chunk_of(args.vocabulary),
            "loss": "forward_kl",
            "measured": found,
            "environment": environment.describe().model_dump(mode="json"),
            "started_at": environment.now(),
        }
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
