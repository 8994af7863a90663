"""The finished student: a folder that every other command loads as a model.

    model.safetensors config.json generation_config.json tokenizer …   as transformers keeps them
    distillation.json     the card: what it was made of, what it cost (`compresskit.card`)
    curve.jsonl           the loss of every step
    README.md             the same in a few lines, for people

Files are written beside the folder's own and moved in one by one, the card last: a folder with a card
is complete.
"""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING, Any

from compresskit import card as cards
from compresskit.errors import RunError
from compresskit.record import Measured

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.card import Card

CURVE = "curve.jsonl"
_PARTIAL = "student.partial"


def save(model: Any, tokenizer: Any, folder: Path, card: Card) -> None:
    """Write `model`, which is in the type that it is to be saved in, with its tokenizer and card.

    Raises:
        RunError: it could not be written, and what is there is kept.
    """
    partial = folder / _PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(readme(card), encoding="utf-8")
        for path in sorted(partial.iterdir()):
            # safetensors leaves its file readable by the owner alone.
            path.chmod(0o644)
            path.replace(folder / path.name)
        partial.rmdir()
        fresh = folder / f"{cards.FILE}.partial"
        fresh.write_text(cards.dumps(card), encoding="utf-8")
        fresh.replace(folder / cards.FILE)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = error.errno == errno.ENOSPC
        raise RunError(
            f"{folder}: the student could not be saved ({'the disk is full' if full else error}). Its "
            "checkpoint is kept: make room, then give the same command with --resume."
        ) from error


def readme(card: Card) -> str:
    """The card in a few lines."""
    training, last = card.training, card.checks[-1]
    energy = training.energy
    joules = (
        f"{energy.value:,.0f} J" if isinstance(energy, Measured) else "energy not measured"
    )  # fmt: skip
    apart = "" if last.kl is None else f", {last.kl:.4f} nats per token from its teacher"
    packed = (
        ""
        if last.packed_nll is None
        else f" With its weights stored as {card.recipe['finish']}: {last.packed_nll:.4f}."
    )
    return (
        f"# Student of {card.teacher}\n\n"
        f"Made by compresskit: `{card.recipe['student']}`, {card.size.parameters:,} parameters "
        f"(the teacher has {card.teacher_size.parameters:,}).\n\n"
        f"Trained on {training.tokens:,} tokens in {training.seconds:,.0f} s on {training.device} "
        f"({joules}). Held-out text: {last.nll:.4f} nats per token{apart}.{packed}\n\n"
        "The licence of the teacher applies to what was made of it. Everything that repeats the "
        "training is in `distillation.json`.\n"
    )
