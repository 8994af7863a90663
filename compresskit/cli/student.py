"""What `compresskit distill` shows: predicted sizes, a bar while it trains, a verdict at the end."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskProgressColumn, TextColumn
from rich.table import Table

from compresskit.cli.progress import console, source_progress
from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from compresskit.card import Card, Check, Size
    from compresskit.distill.progress import Stride
    from compresskit.distill.recipe import Recipe
    from compresskit.distill.train import Outcome

_SELDOM = 15.0
"""Seconds between two lines where there is no terminal to draw on."""


class TrainingProgress:
    """A bar with loss, tokens per second and the time that is left."""

    def __init__(self) -> None:
        """Nothing is drawn before it is entered."""
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=1.0, state="")
        self._first: tuple[float, Stride] | None = None
        self._said = -_SELDOM

    def __enter__(self) -> Self:
        """Start drawing, on a terminal."""
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Clear the bar."""
        if console.is_terminal:
            self._bar.stop()

    def phase(self, text: str) -> None:
        """Something begins that is no step."""
        if console.is_terminal:
            self._bar.update(self._task, state=text)
        elif text != "held-out text":
            self._say(text)

    def step(self, stride: Stride) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, stride)
        state = f"step {stride.step}  loss {stride.loss:.4f}{self._pace(now, stride)}"
        self._bar.update(self._task, completed=min(stride.spent, 1.0), state=state)
        if not console.is_terminal and now - self._said >= _SELDOM:
            self._said = now
            self._say(f"{stride.spent:4.0%}  {state}")

    def look(self, check: Check) -> None:
        """The held-out text was scored."""
        apart = "" if check.kl is None else f", {check.kl:.4f} from the teacher"
        packed = (
            "" if check.packed_nll is None else f"; with rounded weights {check.packed_nll:.4f}"
        )
        self._say(
            f"      step {check.step}: held-out {check.nll:.4f} nats per token{apart}{packed}"
        )

    def _pace(self, now: float, stride: Stride) -> str:
        """Tokens per second and remaining time, from the steps of this sitting."""
        began, first = self._first or (now, stride)
        took = now - began
        if took <= 0 or stride.spent <= first.spent:
            return ""
        pace = (stride.tokens - first.tokens) / took
        left = (1 - stride.spent) * took / (stride.spent - first.spent)
        return f"  {pace:,.0f} tok/s  {_minutes(left)} left"

    def _say(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def train_with_progress(
    recipe: Recipe, folder: Path, *, device: str, threads: int, resume: bool, cache: Path | None
) -> Outcome | None:
    """Train with a bar on stderr; None if it was interrupted, which is said there."""
    from compresskit.distill.train import train
    from compresskit.distill.trainer import Interrupted

    try:
        with source_progress() as progress, TrainingProgress() as watcher:
            return train(
                recipe, folder, device=device, threads=threads, resume=resume, cache=cache,
                watcher=watcher, progress=progress,
            )  # fmt: skip
    except Interrupted as reason:
        console.print(str(reason), markup=False, highlight=False, soft_wrap=True)
        return None


def show_prediction(recipe: Recipe, *, as_json: bool) -> None:
    """Print how large the student will be."""
    from compresskit.distill.school import predict

    with source_progress() as progress:
        known = predict(recipe, progress)
    if as_json:
        document = {
            "teacher": known.teacher.model_dump(mode="json"),
            "student": known.student.model_dump(mode="json"),
        }
        print(json.dumps(document, allow_nan=False))
        return
    Console().print(sizes({"teacher": known.teacher, "student, predicted": known.student}))


def verdict(outcome: Outcome) -> None:
    """Print what became of the student, what it cost, and what to do next."""
    card, screen = outcome.card, Console()
    screen.print(
        sizes({"teacher": card.teacher_size, "predicted": card.predicted, "student": card.size})
    )
    for line in (*_learned(card), *_cost(card)):
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    screen.print(
        f"\nNext:\n  compresskit run -m {card.teacher} --method distill/student:path={outcome.folder}\n"
        f"  compresskit generate -m {outcome.folder} --prompt 'Once upon a time'",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def sizes(named: dict[str, Size]) -> Table:
    """One column a model; the first is what the others are compared with."""
    table = Table("", *named, title=None)
    first = next(iter(named.values()))
    rows = {
        "parameters": ("parameters", Unit.COUNT),
        "weights": ("weight_bytes", Unit.BYTE),
        "FLOPs per token": ("flops_per_token", Unit.COUNT),
        "KV cache per token": ("kv_bytes_per_token", Unit.BYTE),
    }
    for label, (field, unit) in rows.items():
        whole = getattr(first, field)
        cells = []
        for size in named.values():
            value = getattr(size, field)
            share = "" if size is first or not whole else f" ({value / whole:.0%})"
            cells.append(f"{format_quantity(value, unit)}{share}")
        table.add_row(label, *cells)
    return table


def _learned(card: Card) -> list[str]:
    before, after = card.checks[0], card.checks[-1]
    lines = [
        f"held-out text: {before.nll:.4f} -> {after.nll:.4f} nats per token, "
        f"measured over {card.facts['held_out_rows']} rows"
    ]
    if before.kl is not None and after.kl is not None:
        lines.append(f"from the teacher: {before.kl:.4f} -> {after.kl:.4f} nats per token")
    return [*lines, *_finished(card), f"ended: {card.stopped}"]


def _finished(card: Card) -> list[str]:
    """What became of the student as its quantiser stores it, from the first rounded step on."""
    looks = [check for check in card.checks if check.packed_nll is not None]
    if not looks:
        return []
    lost = [f"{(check.packed_nll or 0.0) - check.nll:+.4f}" for check in (looks[0], looks[-1])]
    return [
        f"stored as {card.recipe['finish']}: {looks[0].packed_nll:.4f} -> {looks[-1].packed_nll:.4f} nats "
        f"per token since the finish began; storing it so costs {lost[0]} -> {lost[1]}"
    ]


def _cost(card: Card) -> list[str]:
    training = card.training
    energy = training.energy
    joules = (
        f"energy not measured ({energy.reason})"
        if energy.kind == "unavailable"
        else f"{energy.value:,.0f} J"
    )
    return [
        f"cost: {_minutes(training.seconds)}, {joules}; {training.steps:,} steps, "
        f"{training.tokens:,} tokens learned from, {training.teacher_tokens:,} read by the teacher"
    ]


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
