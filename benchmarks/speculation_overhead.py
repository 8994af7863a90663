"""What a speculative step costs beside the models' passes: our loop against transformers'.

    python benchmarks/speculation_overhead.py --rounds 15
    python benchmarks/speculation_overhead.py --target pypi:smollm2-135m --prompt-tokens 128

Arms, on the same target and draft in one process
    draft model     our loop, and `generate(assistant_model=)`
    prompt lookup   our loop, and `generate(prompt_lookup_num_tokens=)`

Both models' forward methods are timed from inside; what remains of the whole is the host's: drafting
logic, masks, verification, bookkeeping. Draft length is fixed (transformers' confidence threshold and
schedules are off), the draft is the target's own size-reduced copy with random weights, so that hardly
anything is accepted and each step is drafted in full. Arms run in shuffled rounds; printed is the
median of host time per verification step with the ratio of medians and its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from compresskit import artefact as artefacts, stats, workload
from compresskit.hf.load import dtype_name
from compresskit.measure import environment
from compresskit.measure.clock import quiet
from compresskit.method import Context
from compresskit.methods.speculative.draft_model import DraftModel
from compresskit.methods.speculative.ngram import NGram
from compresskit.spec import ModelSpec, ProtocolSpec, RunSpec, SamplingSpec, WorkloadSpec
from compresskit.store import write_text
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.system import System


class Passes:
    """Seconds in the forward methods of some models, and how many passes each took."""

    def __init__(self, *models: Any) -> None:
        self.models = models
        self.seconds, self.counts = 0.0, [0] * len(models)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Time every call while this lasts."""
        self.seconds, self.counts = 0.0, [0] * len(self.models)
        for index, model in enumerate(self.models):
            model.forward = self._timed(index, model.forward)
        try:
            yield
        finally:
            for model in self.models:
                del model.forward  # the class's own is behind it

    def _timed(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began
                self.counts[index] += 1

        return timed


def opened(name: str, dtype: str) -> RunSpec:
    return RunSpec(
        model=ModelSpec(name=name, dtype=dtype), device="cpu", protocol=ProtocolSpec(threads=1)
    )


def theirs(target: System, prompt: list[int], new: int, **options: Any) -> None:
    """transformers' own loop, greedy, with nothing that ends it early."""
    target.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


def ours(system: System, prompt: list[int], new: int) -> None:
    for _ in system.generate(Request(torch.tensor([prompt]), new, SamplingSpec())):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", type=int, default=4, help="tokens drafted a step")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the raw numbers there")
    args = parser.parse_args()

    spec = opened(args.target, args.dtype)
    with (
        artefacts.opened(artefacts.plan(spec)) as target_opened,
        artefacts.opened(artefacts.plan(spec)) as draft_opened,
    ):
        target, draft = target_opened.system, draft_opened.system
        torch.manual_seed(args.seed)
        for weight in draft.model.parameters():  # a draft that is never right
            weight.data.normal_(std=0.02)
        assistant = draft.model
        assistant.generation_config.num_assistant_tokens = args.draft
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        prompts = workload.prompts(
            target.tokenizer,
            WorkloadSpec(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens),
            count=args.rounds + 1,
            seed=args.seed,
        ).ids
        context = Context(
            load=lambda model, methods=(), needs=frozenset(): draft,
            calibration=lambda name, count: [],
            seed=args.seed,
            dtype=dtype_name(target.model),
        )
        drafting = DraftModel(draft=args.draft).apply(target, context)
        looking = NGram(draft=args.draft).apply(replace(target), context)
        new = args.new_tokens
        arms: dict[str, Callable[[list[int]], None]] = {
            "draft model, ours": lambda prompt: ours(drafting, prompt, new),
            "draft model, transformers": lambda prompt: theirs(
                target, prompt, new, assistant_model=assistant
            ),
            "prompt lookup, ours": lambda prompt: ours(looking, prompt, new),
            "prompt lookup, transformers": lambda prompt: theirs(
                target, prompt, new, prompt_lookup_num_tokens=args.draft
            ),
        }
        seen: dict[str, SimpleNamespace] = {
            name: SimpleNamespace(host=[], steps=[]) for name in arms
        }
        passes, dice, order = Passes(target.model, assistant), random.Random(args.seed), list(arms)
        for round_ in range(args.rounds + 1):
            dice.shuffle(order)
            for name in order:
                with quiet(), passes.watched():
                    began = time.thread_time()
                    arms[name](prompts[round_])
                    whole = time.thread_time() - began
                if round_ > 0:  # the first round warms up
                    steps = passes.counts[0]
                    seen[name].host.append((whole - passes.seconds) / steps)
                    seen[name].steps.append(steps)

    print(f"{'arm':<30} {'steps':>6} {'host us/step':>13}")
    for name, found in seen.items():
        print(f"{name:<30} {stats.median(found.steps):6.0f} {1e6 * stats.median(found.host):13.0f}")
    for kind in ("draft model", "prompt lookup"):
        ratio = stats.ratio_of_medians(
            seen[f"{kind}, ours"].host, seen[f"{kind}, transformers"].host
        )
        print(
            f"{kind}: host time of ours over transformers' {ratio.value:.2f} "
            f"[{ratio.low:.2f}, {ratio.high:.2f}]"
        )
    if args.out is not None:
        document = {
            **{key: value for key, value in vars(args).items() if key != "out"},
            "host_seconds_per_step": {name: found.host for name, found in seen.items()},
            "steps": {name: found.steps for name, found in seen.items()},
            "environment": environment.describe().model_dump(mode="json"),
            "started_at": environment.now(),
        }
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
