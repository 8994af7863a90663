"""The loop: steps until the budget is spent, with looks at held-out text and checkpoints in between.

    rows of the step ──► teacher ──► lesson ──► gradient ──► clipped ──► optimizers
          ▲                                                                  │
          └── share of the budget that is spent ──► rate, finish, look, checkpoint ◄┘

A step's loss is the weighted sum over all its places, of all batches and processes, divided by the
sum of their weights: it does not depend on how the rows are dealt out. Rows, rate and random numbers
follow from the step and the share that is spent, and all else that a step changes is in the
checkpoint, so a training whose budget counts steps or tokens can be killed anywhere and goes on as if
nothing had happened.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from compresskit.distill import checkpoint, data, finish, optimizers, schedule, state
from compresskit.distill.budget import Amount
from compresskit.distill.held_out import HeldOut, one_on
from compresskit.distill.looks import Looks
from compresskit.distill.processes import Processes
from compresskit.distill.progress import Stride
from compresskit.errors import RunError
from compresskit.measure.environment import now
from compresskit.record import Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator

    from compresskit.card import Check
    from compresskit.distill.asking import Asking, Bill
    from compresskit.distill.batch import Batch
    from compresskit.distill.curve import Curve
    from compresskit.distill.effort import Effort
    from compresskit.distill.interrupt import Interrupt
    from compresskit.distill.progress import Watcher
    from compresskit.distill.school import School


class Interrupted(RunError):
    """Somebody asked the training to stop; its state is saved."""


class Trainer:
    """One training in one process; several processes hold one each and step together."""

    def __init__(
        self,
        school: School,
        asking: Asking,
        folder: Path,
        accelerator: Accelerator,
        effort: Effort,
        watcher: Watcher,
    ) -> None:
        """Ready to begin at step 0."""
        self.school, self.recipe, self.folder = school, school.recipe, folder
        self.asking = asking
        self.accelerator, self.effort, self.watcher = accelerator, effort, watcher
        self.budget = Amount.parse(self.recipe.budget, option="--budget")
        self.save_every = Amount.parse(self.recipe.save_every, option="--save-every")
        self.optimizers = optimizers.build(school.lesson, self.recipe)
        prepared = accelerator.prepare(school.lesson, *self.optimizers)
        self.lesson, self.moving = prepared[0], prepared[1:]
        self.trained = [item for item in school.lesson.parameters() if item.requires_grad]
        self.step = self.tokens = 0
        self.looked = 0  # how many looks were due by now
        self.earlier_tokens = 0  # that the teacher read in earlier sittings
        self.started_at = now()
        self.stopped = ""
        self.curve: Curve | None = None
        """Of the first process; the others write none."""
        self._saved = (0, 0, 0.0)
        self.processes = Processes(accelerator)
        held_out = HeldOut(
            school.data.held_out, school.teacher, batch=self.recipe.batch,
            device=accelerator.device, share=slice(self.processes.place, None, self.processes.count),
        )  # fmt: skip
        self.looks = Looks(school, held_out, self.processes.sum)

    def run(self, interrupt: Interrupt) -> None:
        """Train until the budget is spent or nothing gets better; the student is then in `school`.

        Raises:
            RunError: the loss or the gradient is not finite, or a checkpoint cannot be written.
            Interrupted: it was asked for.
        """
        if not self.looks.checks:
            self._look()
        self.lesson.train()
        spent = self._spent()
        while spent < 1 and not self.stopped:
            spent = self.advance(spent)
            # What is a whole number of shares but for rounding counts as one.
            due = math.floor(spent / self.recipe.check_every + 1e-9)
            if spent < 1 and due > self.looked:
                self.looked = due
                self._look()
            asked = self.processes.agree(float(interrupt.wanted)) > 0
            if asked or self._due() or spent >= 1 or self.stopped:
                self.save()
            if asked and spent < 1 and not self.stopped:
                raise Interrupted(
                    f"stopped at step {self.step}, {spent:.0%} of the budget spent. The checkpoint in "
                    f"{self.folder} is kept; the same command with --resume goes on."
                )
        self.stopped = self.stopped or f"the budget of {self.recipe.budget} is spent"
        self._end()

    def advance(self, spent: float) -> float:
        """Take one step with the share `spent` of the budget used up; return the share after it."""
        self._finish_if_due(spent)
        stride = self._stride(spent)
        if self.curve is not None:
            self.curve.add(stride)
        self.watcher.step(stride)
        return self._spent()

    def _stride(self, spent: float) -> Stride:
        """Take one step, at a rate that follows from the share `spent`."""
        rate = self.recipe.rate * schedule.factor(
            spent, warmup=self.recipe.warmup, floor=self.recipe.floor
        )
        optimizers.set_rate(self.optimizers, rate)
        batches = self._batches()
        weight = self.processes.sum(sum(batch.label_weights().sum().double() for batch in batches))
        sums: dict[str, torch.Tensor] = {}
        for place, batch in enumerate(batches):
            target = self.asking.targets(batch)
            alone = place < len(batches) - 1
            with self.accelerator.no_sync(self.lesson) if alone else nullcontext():
                with self.school.casting():
                    said = self.lesson(batch.tokens, batch.weights, target)
                # Gradients of processes are averaged; this makes a sum of that.
                self.accelerator.backward(said.total * (self.processes.count / weight))
            for name, value in {"loss": said.total, **said.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.recipe.clip))
        totals = self.processes.sum(torch.stack(list(sums.values()))) / weight
        found = dict(zip(sums, totals.tolist(), strict=True))
        self._refuse_nan(loss=found["loss"], gradient=norm)
        for optimizer in self.moving:
            optimizer.step()
        for optimizer in self.moving:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self._rows_of_a_step() * self.recipe.length
        loss = found.pop("loss")
        return Stride(self.step, self.tokens, loss, found, rate, norm, spent, self.effort.seconds())

    def _batches(self) -> list[Batch]:
        """What this process reads in the next step."""
        rows = self.school.data.train
        numbers = data.numbers_of(
            self.step, rows=len(rows), batch=self._rows_of_a_step(), seed=self.recipe.seed
        )
        place, world = self.processes.place, self.processes.count
        dealt = numbers.view(self.recipe.accumulate, world, -1)
        first = (self.step * self.recipe.accumulate) * world + place
        return [
            self.asking.posed(
                one_on(rows.pick(part), self.accelerator.device), first + turn * world
            )
            for turn, part in enumerate(dealt[:, place])
        ]

    def _rows_of_a_step(self) -> int:
        return self.recipe.batch * self.recipe.accumulate * self.processes.count

    def _refuse_nan(self, **numbers: float) -> None:
        """Stop before anything that is not finite reaches the weights, or a checkpoint.

        Raises:
            RunError: one of the numbers is not.
        """
        wrong = next((name for name, value in numbers.items() if not math.isfinite(value)), None)
        if wrong is None:
            return
        kept = (
            f"The last checkpoint, of step {self._saved[0]}, is kept in {self.folder}"
            if (self.folder / checkpoint.FILE).exists()
            else "No checkpoint had been written yet"
        )
        raise RunError(
            f"step {self.step + 1}: the {wrong} is {numbers[wrong]}. {kept}. Train again with a lower "
            "--rate, with --precision float32, or without the rows that cause it."
        )

    def _finish_if_due(self, spent: float) -> None:
        """Let the weights round, once the last part of the budget has begun."""
        method, model = self.recipe.finish, self.school.draft.model
        if method is None or spent < 1 - self.recipe.finish_share or finish.rounds(model):
            return
        self.watcher.phase(f"rounding as {method} from here on")
        finish.begin(model, method, saved_as=self.school.dtype)
        if not self.looks.has_packed:  # else it has begun in an earlier sitting
            self._scored(self.step, self.tokens)

    def _look(self) -> None:
        """Score the held-out text; remember the best student where training may stop early."""
        check = self._scored(self.step, self.tokens)
        if self.recipe.patience:
            self.stopped = self.looks.judge(check)

    def _scored(self, step: int, tokens: int) -> Check:
        """Score the student as it stands, which is that of `step`."""
        self.watcher.phase("held-out text")
        found = self.looks.score()
        for score in found.values():
            self._refuse_nan(**{"held-out loss": score.nll, "held-out divergence": score.kl})
        check = self.looks.add(found, step=step, tokens=tokens)
        self.watcher.look(check)
        return check

    def _end(self) -> None:
        """Score the student as it is to be saved a last time, and leave it so."""
        step, tokens, best = self.step, self.tokens, self.looks.best
        if best is not None:
            self.school.lesson.load_state_dict(best["lesson"])
            step = best["step"]
            tokens = step * self._rows_of_a_step() * self.recipe.length
        method, model = self.recipe.finish, self.school.draft.model
        if method is not None and not finish.rounds(model):
            # Killed behind its last step and resumed, or no step began in the last part of the budget.
            finish.begin(model, method, saved_as=self.school.dtype)
        self._scored(step, tokens)
        finish.end(model)

    def _spent(self) -> float:
        """Share of the budget that is used up, the same in all processes."""
        counts = self.budget.kind in ("steps", "tokens")
        share = (
            self.budget.spent(
                steps=self.step, tokens=self.tokens, seconds=self.effort.seconds(),
                joules=(self.effort.joules() or 0.0) if self.budget.kind == "joules" else None,
            )
            if counts or self.processes.is_main
            else 0.0
        )  # fmt: skip
        return share if counts else self.processes.of_main(share)

    def _due(self) -> bool:
        """Whether it is time for a checkpoint; the first process's clock decides."""
        step, tokens, seconds = self._saved
        share = self.save_every.spent(
            steps=self.step - step, tokens=self.tokens - tokens,
            seconds=self.effort.seconds() - seconds, joules=None,
        )  # fmt: skip
        return self.processes.of_main(share) >= 1

    def teacher_tokens(self) -> int:
        """That the teacher has read in all sittings and processes, held-out text included."""
        mine = torch.tensor(float(self.school.teacher.tokens_read), dtype=torch.float64)
        return self.earlier_tokens + int(self.processes.sum(mine))

    def save(self) -> None:
        """Write a checkpoint; the first process does."""
        held = state.of(self)
        self._saved = (self.step, self.tokens, self.effort.seconds())
        if not self.processes.is_main:
            return
        if self.curve is not None:
            self.curve.keep()
        checkpoint.save(self.folder, held)

    def charge(self, bill: Bill) -> None:
        """Add what was done for this training before, and was not metered."""
        self.earlier_tokens = bill.teacher_tokens
        reason = "part of the teacher cache was written in another sitting"
        self.effort.resume(bill.seconds, Unavailable(reason=reason))

    def restore(self, held: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this training.

        Raises:
            UsageError: it belongs to another.
        """
        state.restore(self, held)
        self._saved = (self.step, self.tokens, self.effort.seconds())
