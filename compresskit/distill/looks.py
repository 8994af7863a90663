"""What was found on held-out text, and the best student so far where training may stop early.

A student that learns with rounded weights (`finish`) is scored twice: with its weights as they are, which
is what is saved, and as its quantiser will store them. The first such look is taken when rounding
begins, so that its card shows what the finish has bought.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from compresskit.card import Check
from compresskit.distill import finish
from compresskit.distill.narrowed import Narrowed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from compresskit.distill.held_out import HeldOut, Score
    from compresskit.distill.school import School


class Looks:
    """The looks of one training."""

    def __init__(
        self, school: School, held_out: HeldOut, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Nothing has been looked at.

        reduce: adds a tensor up over all processes.
        """
        self.school, self.held_out, self._reduce = school, held_out, reduce
        self.checks: list[Check] = []
        self.best: dict[str, Any] | None = None
        """`worth`, `step` and state of the lesson; kept where training may stop early."""
        self.stale = 0
        """Looks since then."""

    @property
    def has_packed(self) -> bool:
        """Whether rounded weights have been scored."""
        return any(check.packed_nll is not None for check in self.checks)

    def score(self) -> dict[str, Score]:
        """Score the student as it is saved (`dense`) and, where weights round, as it is stored (`packed`)."""
        model, method = self.school.draft.model, self.school.recipe.finish
        if not finish.rounds(model):
            return {"dense": self._score()}
        packed = self._score()
        finish.end(model)
        dense = self._score()
        assert method is not None
        finish.begin(model, method, saved_as=self.school.dtype)
        return {"dense": dense, "packed": packed}

    def add(self, found: dict[str, Score], *, step: int, tokens: int) -> Check:
        """Keep what `score` found of the student of `step`."""
        # A teacher that is asked for some of its tokens only is not what the student is compared with.
        whole = not isinstance(self.school.teacher, Narrowed)
        dense, packed = found["dense"], found.get("packed")
        check = Check(
            step=step,
            tokens=tokens,
            nll=dense.nll,
            kl=dense.kl if whole else None,
            packed_nll=None if packed is None else packed.nll,
            packed_kl=packed.kl if packed is not None and whole else None,
        )
        if packed is not None and self.checks[-1].step == step and not self.has_packed:
            self.checks.pop()  # the same student, looked at just before rounding began
        self.checks.append(check)
        return check

    def judge(self, check: Check) -> str:
        """Remember the student if it is the best; else say why training stops, or nothing."""
        value = self._worth(check)
        if self.best is None or value < self.best["worth"]:
            state = copy.deepcopy(self.school.lesson.state_dict())
            self.best = {"worth": value, "step": check.step, "lesson": state}
            self.stale = 0
            return ""
        self.stale += 1
        if self.stale < self.school.recipe.patience:
            return ""
        return (
            f"no progress on held-out text in {self.stale} looks; the student of step "
            f"{self.best['step']} is kept"
        )

    def _worth(self, check: Check) -> float:
        """What is to fall: the divergence, unless the lesson is the text alone."""
        only_text = {term.name for term in self.school.lesson.terms} == {"ce"}
        return check.nll if check.kl is None or only_text else check.kl

    def _score(self) -> Score:
        with self.school.casting():
            return self.held_out.look(self.school.judge, self._reduce)
