"""Speculative decoding on a CUDA machine: audit, kinds of work, and the speed surface.

    python benchmarks/gpu/speculation.py --out results/h100 --model /models/SmolLM2-135M
    python benchmarks/gpu/speculation.py --out results/h100 --stages audit
    python benchmarks/gpu/speculation.py --out /tmp/dry --dry-run          on a CPU, `tiny`, few turns

    audit     every lossless method on the shipped pair, eager and with CUDA graphs, batch 1 and 4
    work      copying, editing and free text, each against the dense rows of its own (--questions adds
              the kinds of a data set in Spec-Bench's form)
    surface   `oracle`: speed at acceptance 0.5 to 0.95, drafts of 2 to 8, batch 1 to 16, so that the
              speed-up of a draft can be told before one is trained

Each stage is a suite or an audit of the command line, writes ordinary records, goes on where it was
interrupted, and starts nothing new after `--minutes`. No network is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("audit", "work", "surface")
DRAFTERS = ("speculative/ngram", "speculative/suffix", "speculative/token_recycling",
            "speculative/layer_skip")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    device: str
    modes: tuple[str, ...]
    prompt: int
    new: int
    repeats: int
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    lengths: tuple[int, ...]


FULL = Size(
    "cuda", ("eager", "compiled"), 512, 128, 10, (1, 4, 16), (0.5, 0.7, 0.8, 0.9, 0.95), (2, 4, 8)
)
DRY = Size("cpu", ("eager",), 160, 24, 2, (1, 2), (0.5, 0.9), (2,))


def suite(name: str, model: str, size: Size, texts: list[str], variants: list[str]) -> str:
    """A suite of those variants on each of the texts."""
    batches = ", ".join(map(str, size.batches))
    return "\n".join(
        [
            f'name = "{name}"',
            f'model = "{model}"',
            f'device = "{size.device}"',
            "[workload]",
            f"prompt_tokens = {size.prompt}",
            f"new_tokens = {size.new}",
            f"batch_sizes = [{batches}]",
            "[protocol]",
            'passes = ["latency", "throughput", "memory", "energy"]',
            f"repeats = {size.repeats}",
            *(block for text in texts for block in _of_text(text, variants)),
            "",
        ]
    )


def _of_text(text: str, variants: list[str]) -> list[str]:
    return [f'{variant}\n[variant.sweep]\n"workload.text" = ["{text}"]' for variant in variants]


def _variant(stack: str, mode: str) -> str:
    return f'[[variant]]\nstack = [{stack}]\nmode = "{mode}"'


def work(model: str, size: Size, questions: Path | None) -> str:
    """Drafters on each kind of work, beside the dense rows of every mode."""
    kinds = ("translation", "summarization", "qa", "math_reasoning", "rag", "mt_bench")
    texts = ["copy", "edit", "pydoc"]
    if questions is not None:
        texts += [f"questions:{questions}#{kind}" for kind in kinds]
    stacks = ["", *(f'"{name}"' for name in DRAFTERS), '"speculative/ngram:length=adaptive"']
    variants = [_variant(stack, mode) for mode in size.modes for stack in stacks]
    return suite("speculation-work", model, size, texts, variants)


def surface(model: str, size: Size) -> str:
    """Acceptance by oracle at every rate and length."""
    stacks = [
        f'"speculative/oracle:rate={rate},draft={length}"'
        for rate in size.rates
        for length in size.lengths
    ]
    mode = size.modes[-1]
    variants = [_variant(stack, mode) for stack in ("", *stacks)]
    return suite("speculation-surface", model, size, ["pydoc"], variants)


class Session:
    """Runs commands of compresskit until the time is up."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.ends = out, time.perf_counter() + 60 * minutes
        self.failed = False

    def run(self, *words: str) -> None:
        """One command, unless the time is up; a failure is remembered."""
        left = self.ends - time.perf_counter()
        if left <= 0:
            print("time is up; start again to go on", file=sys.stderr)
            return
        print("compresskit", *words, file=sys.stderr, flush=True)
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "compresskit", *words],
                env=environment,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print("time is up; start again to go on", file=sys.stderr)
            return
        self.failed |= done.returncode not in (
            0,
            3,
        )  # 3: invalid or inconclusive, which the table says

    def suite(self, name: str, text: str) -> None:
        """Write a suite beside the results, run it, and print its table."""
        path = self.out / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.run("run", str(path), "--out", str(self.out))
        self.run("table", str(self.out), "--by", "speculation", "--format", "md")


def audit(session: Session, size: Size) -> None:
    """Every drafter on the shipped pair."""
    for mode in size.modes:
        for batch in (1, 4):
            for method in (*DRAFTERS, "speculative/draft_model"):
                session.run(
                    "audit", "-m", "tiny", "--method", method, "--mode", mode, "--device", size.device,
                    "--batch", str(batch), "--out", str(session.out / "audit"),
                )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; return 1 if a command failed or an audit found a method lossy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by comma")
    parser.add_argument("--model", default="tiny", help="of the stages work and surface")
    parser.add_argument("--questions", type=Path, help="question.jsonl in Spec-Bench's form")
    parser.add_argument("--minutes", type=float, default=9, help="start nothing new after this")
    parser.add_argument("--dry-run", action="store_true", help="`tiny` on the CPU, few turns")
    options = parser.parse_args(arguments)
    wanted = options.stages.split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    size = DRY if options.dry_run else FULL
    session = Session(options.out, options.minutes)
    if "audit" in wanted:
        audit(session, size)
    if "work" in wanted:
        session.suite("speculation-work", work(options.model, size, options.questions))
    if "surface" in wanted:
        session.suite("speculation-surface", surface(options.model, size))
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
