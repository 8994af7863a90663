"""The draft: a student of the shipped target, made and taught by compresskit itself.

    lesson   rows                              begins with
    copying  128 tokens: pairs and drills      random weights
    text     512 tokens: the corpus as it is   what the first lesson left

Short rows that ask for little else teach two narrow blocks to carry a word over a distance. Taught on
long rows alone, from the first step on, a draft agreed with the target on stories sooner, but was still
guessing whose value was asked when half of the steps were gone; the trial ended there. The loss
of both lessons is half cross-entropy, half the divergence from the target; the second begins with the
first one's student (`given`), whose cost is added to its own.

What makes each lesson is in `LESSONS`, as fields of a recipe; the rows are packed by `rows`. A lesson
that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.tiny.rows import Stage, load_or_pack
from benchmarks.tiny.tokenizer import train_tokenizer
from compresskit import card as cards
from compresskit.assets import tiny_path
from compresskit.distill.progress import Silent
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from compresskit.distill.progress import Stride

SHAPE = "scratch:hidden_size=64,num_hidden_layers=2,intermediate_size=256,embedding_spread=8"
"""Beside what the target has already: vocabulary, heads, tied embeddings."""
COMMON: dict[str, Any] = {
    "loss": "ce:weight=0.5 + forward_kl:weight=0.5",
    "optimizer": "muon",
    "weight_decay": 0.05,
    "betas": [0.9, 0.98],
    "held_out_rows": 48,
    "seed": 20,
}
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json", "generation_config.json", "distillation.json")
PRINT_EVERY = 50


@dataclass(frozen=True)
class Lesson:
    """One training: what is read, and the fields of its recipe that are its own."""

    name: str
    stages: tuple[Stage, ...]
    """Their rows together, in an order that the seed draws; all of one length."""
    batch: int
    steps: int
    fields: dict[str, Any]


LESSONS = (
    Lesson(
        "copying",
        (
            Stage("pairs", 0, 128, 16, 560, 270, 4, 20, stated_weight=0, drills=4, lesson="pairs"),
            Stage("drill", 2_000_000, 128, 16, 160, 270, 4, 12, stated_weight=0, drills=3),
        ),
        16,
        700,
        # Everything but attention moves slowly until copying is learned, see `train.optimizers_of`.
        {"rate": 3e-3, "others_rate": 0.2, "warmup": 0.1, "floor": 0.5},
    ),
    Lesson(
        "text",
        (
            Stage("long", 4_000_000, 512, 4, 480, 1100, 3, 8, drills=1),
            Stage("last", 6_000_000, 512, 4, 432, 1100, 2, 4),
        ),
        4,
        912,
        {"rate": 2e-3, "others_rate": 0.7, "warmup": 0.02, "floor": 0.03},
    ),
)


def recipe_of(lesson: Lesson, *, teacher: str, student: str, rows: str, share: float) -> Recipe:
    """The whole recipe of a lesson; `share` of its steps, at least one."""
    return Recipe.decode(
        {
            **COMMON,
            **lesson.fields,
            "teacher": {"name": teacher},
            "student": student,
            "data": f"rows:{rows}",
            "length": lesson.stages[0].context,
            "batch": lesson.batch,
            "budget": f"{max(1, round(share * lesson.steps))} steps",
        },
        where=lesson.name,
    )


def teach(*, out: Path, work: Path, share: float, resume: bool) -> dict[str, Any]:
    """Teach the draft, save it under `out/draft` and return the account of it."""
    target = out / "target"
    if not (target / WEIGHTS).exists():
        raise SystemExit("draft: it learns from the target; train that first")
    shipped = (target / WEIGHTS).read_bytes() == (tiny_path("target") / WEIGHTS).read_bytes()
    tokenizer, student, accounts = train_tokenizer(), SHAPE, []
    for lesson in LESSONS:
        folder = work / f"draft-{lesson.name}-{share:g}"
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        path, digests = _write_rows(tokenizer, lesson, work / "rows")
        teacher = "tiny" if shipped else _near(target)
        recipe = recipe_of(lesson, teacher=teacher, student=student, rows=_near(path), share=share)
        if cards.read(folder) is None:
            train(recipe, folder, device="cpu", resume=resume, watcher=_Printed(lesson.name))
        accounts.append(_account(lesson, recipe, folder, digests))
        student = f"given:model={_near(folder)}"
    (out / "draft").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, out / "draft" / name)
    tokenizer.save_pretrained(out / "draft")
    card = cards.read(folder)
    assert card is not None
    return {
        "parameters": card.size.parameters,
        "steps": card.training.steps,
        "tokens": card.training.tokens,
        "seconds": round(card.training.seconds, 1),
        "distilled_from": "target",
        "lessons": accounts,
    }


def _write_rows(
    tokenizer: PreTrainedTokenizerFast, lesson: Lesson, folder: Path
) -> tuple[Path, dict[str, str]]:
    """Write the rows of a lesson for `rows:FILE`; return the file, and the digest of each stage."""
    packed = [load_or_pack(tokenizer, stage, folder) for stage in lesson.stages]
    weights = np.concatenate([rows.weights for rows in packed]).astype(np.float32)
    tokens = np.concatenate([rows.tokens for rows in packed]).astype(np.int32)
    asked = weights[:, 1:].any(
        axis=1
    )  # a row of statements alone, which weigh nothing, says nothing
    path = folder / f"draft-{lesson.name}.safetensors"
    save_file(
        {"tokens": torch.from_numpy(tokens[asked]), "weights": torch.from_numpy(weights[asked])},
        path,
    )
    names = [stage.name for stage in lesson.stages]
    return path, {name: rows.digest for name, rows in zip(names, packed, strict=True)}


def _account(
    lesson: Lesson, recipe: Recipe, folder: Path, digests: dict[str, str]
) -> dict[str, Any]:
    card = cards.read(folder)
    assert card is not None
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    every = max(1, len(lines) // 30)
    return {
        "name": lesson.name,
        "recipe": recipe.model_dump(mode="json"),
        "stages": [asdict(stage) for stage in lesson.stages],
        "rows_sha256": digests,
        "held_out_nats_per_token": [
            {"step": check.step, "nll": round(check.nll, 4), "kl": check.kl and round(check.kl, 4)}
            for check in card.checks
        ],
        "loss": [
            {"step": line["step"], "loss": round(line["loss"], 4)}
            for line in lines[every - 1 :: every]
        ],
    }


def _near(path: Path) -> str:
    """`path` as seen from here: a recipe that travels names no folder of this machine."""
    return os.path.relpath(path)


class _Printed(Silent):
    """Tells how far a lesson is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def step(self, stride: Stride) -> None:
        if stride.step % PRINT_EVERY == 0:
            print(
                f"draft {self.name} {stride.step} loss {stride.loss:.4f} {stride.seconds:.0f} s",
                flush=True,
            )
