"""Train a student from a recipe and save it: the whole of `compresskit distill`."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator

from compresskit import card as cards, device as devices
from compresskit.card import Card
from compresskit.distill import checkpoint, product, school
from compresskit.distill.asking import FOLDER, ask
from compresskit.distill.budget import Amount
from compresskit.distill.curve import Curve
from compresskit.distill.effort import Effort
from compresskit.distill.interrupt import Interrupt
from compresskit.distill.progress import Silent
from compresskit.distill.trainer import Trainer
from compresskit.errors import RunError, UsageError
from compresskit.hf.sources import Progress, silent as no_progress
from compresskit.hf.student import sizes
from compresskit.measure.energy import counters
from compresskit.measure.environment import describe
from compresskit.record import Training

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.device import Device
    from compresskit.distill.progress import Watcher
    from compresskit.distill.recipe import Recipe
    from compresskit.distill.school import School


_OURS = {product.CURVE, FOLDER, f"{checkpoint.FILE}.partial", "curve.partial"}
"""What a training leaves that was killed before its first checkpoint: it begins again over them."""


class Outcome(NamedTuple):
    """A finished student."""

    card: Card
    folder: Path
    main: bool
    """Whether this process is the one that saves and prints."""


def train(
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "auto",
    threads: int = 1,
    resume: bool = False,
    cache: Path | None = None,
    watcher: Watcher | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Make the student of `recipe`, train it and save it in `folder`.

    cache: folder for what a cache keeps of the teacher (`Recipe.teacher_cache`), which then outlives the
    training.

    Launched several times by accelerate, the processes train it together.

    Raises:
        UsageError: something of the recipe cannot be used, or `folder` holds another training.
        RunError: the training cannot go on; its last checkpoint is kept.
    """
    if cache is not None and recipe.teacher_cache is None:
        raise UsageError(
            f"--cache {cache}: nothing is to be kept there. Say what with --teacher-cache, such as "
            "topk:k=64, or leave --cache out."
        )
    torch.set_num_threads(threads)
    found = devices.resolve(device)
    accelerator = Accelerator(mixed_precision="no", cpu=found.kind == "cpu")
    if watcher is None or not accelerator.is_main_process:
        watcher = Silent()
    counter = counters.find(found, tuple(range(accelerator.num_processes)))
    if Amount.parse(recipe.budget, option="--budget").kind == "joules" and not counter.answers():
        raise UsageError(
            f"--budget {recipe.budget}: this machine cannot count joules ({counter.reason()}). Give "
            "the budget in tokens, steps or minutes."
        )
    state = _state(folder, resume=resume)
    if state is not None:
        checkpoint.agree_on_recipe(state, recipe)
    with ExitStack() as stack:
        effort = stack.enter_context(Effort(counter))
        room = school.enrol(
            recipe, found, processes=accelerator.num_processes, notify=watcher.phase,
            progress=progress,
        )  # fmt: skip
        if accelerator.is_main_process:
            _make(folder)
        # The first process writes a cache, the others wait and read it.
        with accelerator.main_process_first():
            main = accelerator.is_main_process
            asking = ask(room, cache or folder / FOLDER, writes=main, progress=progress)
        trainer = Trainer(room, asking, folder, accelerator, effort, watcher)
        if state is not None:
            trainer.restore(state)
        elif asking.bill.teacher_tokens:
            trainer.charge(asking.bill)
        if accelerator.is_main_process:
            trainer.curve = stack.enter_context(Curve(folder, trainer.step))
        try:
            # Before this there is nothing to save, and Ctrl-C ends at once.
            with Interrupt() as interrupt:
                trainer.run(interrupt)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {trainer.step + 1}: {str(error).splitlines()[0]} Lower --batch and raise "
                "--accumulate by as much, or add --checkpointing."
            ) from error
        training = _training(trainer, found, threads)
    card = _card(room, trainer, training)
    if accelerator.is_main_process:
        watcher.phase("saving the student")
        product.save(room.draft.model, room.draft.tokenizer, folder, card)
        (folder / checkpoint.FILE).unlink(missing_ok=True)
        if cache is None:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
    main = bool(accelerator.is_main_process)
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return Outcome(card, folder, main)


def _state(folder: Path, *, resume: bool) -> dict[str, object] | None:
    """The checkpoint to go on from.

    Raises:
        UsageError: there is something in the folder and nobody asked to go on with it, or what is
            there is not ours.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: it is no folder. Name a new one.")
    if (folder / cards.FILE).exists():
        raise UsageError(
            f"--out {folder}: there is a finished student. Name another folder, or delete this one."
        )
    state = checkpoint.load(folder)
    if state is not None and not resume:
        raise UsageError(
            f"--out {folder}: a training that was interrupted at step {state['step']} lies there. Add "
            "--resume to go on with it, or name another folder."
        )
    if state is None and folder.exists():
        foreign = sorted({path.name for path in folder.iterdir()} - _OURS)
        if foreign:
            raise UsageError(
                f"--out {folder}: there are other files ({foreign[0]}), and a student would overwrite "
                "what is called alike. Name a new folder."
            )
        if not resume and any(folder.iterdir()):
            raise UsageError(
                f"--out {folder}: a training has begun there and has saved nothing yet. Add --resume to "
                "begin it again, or name a new folder."
            )
    return state


def _make(folder: Path) -> None:
    """Make the folder.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--out {folder}: it cannot be made ({error.strerror}). Name a folder that you may write to."
        ) from None


def _training(trainer: Trainer, device: Device, threads: int) -> Training:
    """What this training took, and what had gone into the student before it, where that is known."""
    now = Training(
        seconds=trainer.effort.seconds(),
        energy=trainer.effort.energy(),
        steps=trainer.step,
        tokens=trainer.tokens,
        teacher_tokens=trainer.teacher_tokens(),
        device=device.name,
        threads=threads if device.kind == "cpu" else None,
        processes=trainer.accelerator.num_processes,
        started_at=trainer.started_at,
    )
    given: Any = trainer.school.draft.facts.get("given", {})
    before = given.get("training")
    return now if before is None else cards.together(Training.model_validate(before), now)


def _card(room: School, trainer: Trainer, training: Training) -> Card:
    """The card; the student is turned into the type that it is saved in."""
    model = room.draft.model.eval().requires_grad_(False).to(room.dtype)
    return Card(
        recipe=room.recipe.model_dump(mode="json"),
        recipe_digest=room.recipe.digest(),
        teacher=room.source.name,
        teacher_revision=room.source.revision,
        teacher_baseline=room.source.baseline,
        teacher_size=room.teacher_size,
        predicted=room.predicted,
        size=sizes.size_of_model(model),
        facts={
            **room.draft.facts,
            **trainer.asking.told(),
            "training_rows": len(room.data.train),
            "held_out_rows": len(room.data.held_out),
            "training_rows_sha256": room.data.train.sha256,
            "held_out_overlap": room.data.overlap,
            "matrix_products": str(room.autocast or torch.float32).removeprefix("torch."),
        },
        training=training,
        checks=tuple(trainer.looks.checks),
        stopped=trainer.stopped,
        environment=describe(),
    )
