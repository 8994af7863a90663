"""What a checkpoint holds of a training, and how a training goes on from it.

    weights, optimizers, random numbers      what the next step depends on
    step, tokens, looks, best student        where the training stands
    seconds, joules, tokens of the teacher   what it has cost
    recipe and identity                      which training it is: it goes on with nothing else

Rows, learning rate and finish are not in it: they follow from the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compresskit.card import Check
from compresskit.distill import checkpoint
from compresskit.record import Measured, Reading, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.distill.trainer import Trainer


def identity(trainer: Trainer) -> dict[str, str | int]:
    """What the recipe does not say and a checkpoint has to agree with."""
    school = trainer.school
    return {
        "revision of the teacher": school.source.revision,
        "digest of the training rows": school.data.train.sha256,
        "digest of the held-out rows": school.data.held_out.sha256,
        "number of processes": trainer.processes.count,
    }


def of(trainer: Trainer) -> dict[str, Any]:
    """The state of a training between two steps; all processes have to ask together."""
    looks, asking, effort = trainer.looks, trainer.asking, trainer.effort
    return {
        "recipe": trainer.recipe.model_dump(mode="json"),
        "identity": identity(trainer),
        "lesson": trainer.school.lesson.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "rng": torch.get_rng_state(),
        "device_rng": device_rng(trainer.accelerator.device),
        "step": trainer.step,
        "tokens": trainer.tokens,
        "looks": trainer.looked,
        "stale": looks.stale,
        "checks": [check.model_dump(mode="json") for check in looks.checks],
        "best": looks.best,
        "stopped": trainer.stopped,
        "started_at": trainer.started_at,
        "seconds": effort.seconds(),
        "energy": effort.energy().model_dump(mode="json"),
        "teacher_tokens": trainer.teacher_tokens(),
        "generated_tokens": asking.generated_tokens,
        "writing_seconds": asking.writing_seconds,
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put `trainer` where it was when `of` was asked.

    Raises:
        UsageError: the state belongs to another training.
    """
    checkpoint.agree(state, identity(trainer))
    trainer.school.lesson.load_state_dict(state["lesson"])
    for optimizer, held in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(held)
    torch.set_rng_state(state["rng"])
    set_device_rng(trainer.accelerator.device, state["device_rng"])
    trainer.step, trainer.tokens, trainer.looked = state["step"], state["tokens"], state["looks"]
    looks, asking = trainer.looks, trainer.asking
    looks.stale, looks.best = state["stale"], state["best"]
    looks.checks = [Check.model_validate(check) for check in state["checks"]]
    trainer.stopped, trainer.started_at = state["stopped"], state["started_at"]
    trainer.earlier_tokens = state["teacher_tokens"]
    asking.generated_tokens = state["generated_tokens"]
    asking.writing_seconds = state["writing_seconds"]
    trainer.effort.resume(state["seconds"], _reading(state["energy"]))


def device_rng(device: torch.device) -> torch.Tensor | None:
    """Where the random numbers of a GPU stand (dropout draws there); None on a CPU."""
    if device.type == "cpu":
        return None
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_device_rng(device: torch.device, held: torch.Tensor | None) -> None:
    """Put them back there; nothing to do for a training that began on a CPU."""
    if held is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(held, device)


def _reading(document: dict[str, Any]) -> Reading:
    kind = Measured if document["kind"] == "measured" else Unavailable
    return kind.model_validate(document)
