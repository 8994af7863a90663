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

import copy
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from compresskit.card import Check
from compresskit.distill import checkpoint, data, finish, optimizers, schedule
from compresskit.distill.budget import Amount
from compresskit.distill.held_out import HeldOut, one_on
from compresskit.distill.narrowed import Narrowed
from compresskit.distill.progress import Stride
from compresskit.errors import RunError
from compresskit.measure.environment import now
from compresskit.record import Measured, Reading, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from accelerate import Accelerator

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
        self.step = self.tokens = self.looks = self.stale = 0
        self.earlier_tokens = 0  # that the teacher read in earlier sittings
        self.checks: list[Check] = []
        self.best: dict[str, Any] | None = None
        self.started_at = now()
        self.stopped = ""
        self.curve: Curve | None = None
        """Of the first process; the others write none."""
        self._rounding = False
        self._saved = (0, 0, 0.0)
        world, rank = accelerator.num_processes, accelerator.process_index
        self.held_out = HeldOut(
            school.data.held_out, school.teacher, batch=self.recipe.batch,
            device=accelerator.device, share=slice(rank, None, world),
        )  # fmt: skip

    def identity(self) -> dict[str, str | int]:
        """What the recipe does not say and a checkpoint has to agree with."""
        return {
            "revision of the teacher": self.school.source.revision,
            "digest of the training rows": self.school.data.train.sha256,
            "digest of the held-out rows": self.school.data.held_out.sha256,
            "number of processes": self.accelerator.num_processes,
        }

    def run(self, interrupt: Interrupt) -> None:
        """Train until the budget is spent or nothing gets better; the student is then in `school`.

        Raises:
            RunError: the loss or the gradient is not finite, or a checkpoint cannot be written.
            Interrupted: it was asked for.
        """
        if not self.checks:
            self._look()
        self.lesson.train()
        spent = self._spent()
        while spent < 1 and not self.stopped:
            spent = self.advance(spent)
            # What is a whole number of shares but for rounding counts as one.
            due = math.floor(spent / self.recipe.check_every + 1e-9)
            if spent < 1 and due > self.looks:
                self.looks = due
                self._look()
            asked = self._agree(float(interrupt.wanted)) > 0
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
        weight = self._sum(sum(batch.label_weights().sum().double() for batch in batches))
        sums: dict[str, torch.Tensor] = {}
        for place, batch in enumerate(batches):
            target = self.asking.targets(batch)
            alone = place < len(batches) - 1
            with self.accelerator.no_sync(self.lesson) if alone else nullcontext():
                with self.school.casting():
                    said = self.lesson(batch.tokens, batch.weights, target)
                # Gradients of processes are averaged; this makes a sum of that.
                self.accelerator.backward(said.total * (self.accelerator.num_processes / weight))
            for name, value in {"loss": said.total, **said.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.recipe.clip))
        totals = self._sum(torch.stack(list(sums.values()))) / weight
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
        dealt = numbers.view(self.recipe.accumulate, self.accelerator.num_processes, -1)
        place, world = self.accelerator.process_index, self.accelerator.num_processes
        first = (self.step * self.recipe.accumulate) * world + place
        return [
            self.asking.posed(
                one_on(rows.pick(part), self.accelerator.device), first + turn * world
            )
            for turn, part in enumerate(dealt[:, place])
        ]

    def _rows_of_a_step(self) -> int:
        return self.recipe.batch * self.recipe.accumulate * int(self.accelerator.num_processes)

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
        if self.recipe.finish is not None and spent >= 1 - self.recipe.finish_share:
            if not self._rounding:
                self.watcher.phase(f"rounding as {self.recipe.finish} from here on")
                finish.begin(
                    self.school.draft.model, self.recipe.finish, saved_as=self.school.dtype
                )
                # Looks at weights that do not round yet would beat every look from here on.
                self.best, self.stale = None, 0
            self._rounding = True

    def _look(self) -> None:
        """Score the held-out text; remember the best student where training may stop early."""
        check = self._scored(self.step, self.tokens)
        if self.recipe.patience:
            self._judge(check)

    def _scored(self, step: int, tokens: int) -> Check:
        """Score the student as it stands, which is that of `step`."""
        self.watcher.phase("held-out text")
        with self.school.casting():
            score = self.held_out.look(self.school.judge, self._sum)
        self._refuse_nan(**{"held-out loss": score.nll, "held-out divergence": score.kl})
        # A teacher that is asked for some of its tokens only is not what the student is compared with.
        kl = None if isinstance(self.school.teacher, Narrowed) else score.kl
        check = Check(step=step, tokens=tokens, nll=score.nll, kl=kl)
        self.checks.append(check)
        self.watcher.look(check)
        return check

    def _judge(self, check: Check) -> None:
        value = self._worth(check)
        if self.best is None or value < self.best["worth"]:
            state = copy.deepcopy(self.school.lesson.state_dict())
            self.best = {"worth": value, "step": self.step, "lesson": state}
            self.stale = 0
            return
        self.stale += 1
        if self.stale >= self.recipe.patience:
            self.stopped = (
                f"no progress on held-out text in {self.stale} looks; the student of step "
                f"{self.best['step']} is kept"
            )

    def _worth(self, check: Check) -> float:
        """What is to fall: the divergence, unless the lesson is the text alone."""
        only_text = {term.name for term in self.school.lesson.terms} == {"ce"}
        return check.nll if check.kl is None or only_text else check.kl

    def _end(self) -> None:
        """Leave the student as it is to be saved, and score it a last time."""
        finish.end(self.school.draft.model)
        step, tokens = self.step, self.tokens
        if self.best is not None:
            self.school.lesson.load_state_dict(self.best["lesson"])
            step = self.best["step"]
            tokens = step * self._rows_of_a_step() * self.recipe.length
        self._scored(step, tokens)

    def _spent(self) -> float:
        """Share of the budget that is used up, the same in all processes."""
        counts = self.budget.kind in ("steps", "tokens")
        main = self.accelerator.is_main_process
        share = (
            self.budget.spent(
                steps=self.step, tokens=self.tokens, seconds=self.effort.seconds(),
                joules=(self.effort.joules() or 0.0) if self.budget.kind == "joules" else None,
            )
            if counts or main
            else 0.0
        )  # fmt: skip
        return share if counts else self._agree(share)

    def _due(self) -> bool:
        """Whether it is time for a checkpoint; the first process's clock decides."""
        step, tokens, seconds = self._saved
        share = self.save_every.spent(
            steps=self.step - step, tokens=self.tokens - tokens,
            seconds=self.effort.seconds() - seconds, joules=None,
        )  # fmt: skip
        return self._agree(share if self.accelerator.is_main_process else 0.0) >= 1

    def _agree(self, value: float) -> float:
        """The sum of `value` over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self._sum(torch.tensor(value, dtype=torch.float64)))

    def _sum(self, tensor: Any) -> torch.Tensor:
        """A tensor summed over all processes, where they are."""
        if self.accelerator.num_processes == 1:
            summed: torch.Tensor = tensor
            return summed
        total: torch.Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return total

    def teacher_tokens(self) -> int:
        """That the teacher has read in all sittings and processes, held-out text included."""
        mine = torch.tensor(float(self.school.teacher.tokens_read), dtype=torch.float64)
        return self.earlier_tokens + int(self._sum(mine))

    def save(self) -> None:
        """Write a checkpoint; the first process does."""
        teacher_tokens = self.teacher_tokens()
        self._saved = (self.step, self.tokens, self.effort.seconds())
        if not self.accelerator.is_main_process:
            return
        if self.curve is not None:
            self.curve.keep()
        checkpoint.save(
            self.folder,
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "identity": self.identity(),
                "lesson": self.school.lesson.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "rng": torch.get_rng_state(),
                "step": self.step, "tokens": self.tokens, "looks": self.looks, "stale": self.stale,
                "checks": [check.model_dump(mode="json") for check in self.checks],
                "best": self.best, "stopped": self.stopped, "started_at": self.started_at,
                "seconds": self.effort.seconds(),
                "energy": self.effort.energy().model_dump(mode="json"),
                "teacher_tokens": teacher_tokens,
                "generated_tokens": self.asking.generated_tokens,
                "writing_seconds": self.asking.writing_seconds,
            },
        )  # fmt: skip

    def charge(self, bill: Bill) -> None:
        """Add what was done for this training before, and was not metered."""
        self.earlier_tokens = bill.teacher_tokens
        reason = "part of the teacher cache was written in another sitting"
        self.effort.resume(bill.seconds, Unavailable(reason=reason))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this training.

        Raises:
            UsageError: it belongs to another.
        """
        checkpoint.agree(state, self.recipe, self.identity())
        self.school.lesson.load_state_dict(state["lesson"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        torch.set_rng_state(state["rng"])
        self.step, self.tokens, self.looks = state["step"], state["tokens"], state["looks"]
        self.stale, self.best, self.stopped = state["stale"], state["best"], state["stopped"]
        self.checks = [Check.model_validate(check) for check in state["checks"]]
        self.started_at = state["started_at"]
        self.earlier_tokens = state["teacher_tokens"]
        self.asking.generated_tokens = state["generated_tokens"]
        self.asking.writing_seconds = state["writing_seconds"]
        self.effort.resume(state["seconds"], _reading(state["energy"]))
        self._saved = (self.step, self.tokens, self.effort.seconds())


def _reading(document: dict[str, Any]) -> Reading:
    kind = Measured if document["kind"] == "measured" else Unavailable
    return kind.model_validate(document)
