"""Small heads on the model's own features guess several tokens at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit import text as texts
from compresskit.errors import RunError, SpecError
from compresskit.hf import modules
from compresskit.hf.features import fingerprint, frozen_head, states
from compresskit.methods.speculative import _heads as kit
from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._head_tree import HeadsDrafter, grow
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.method import Context
    from compresskit.methods.speculative._draft import Drafter
    from compresskit.system import Request, System

ROWS = 8
"""Rows of calibration tokens that pass the model at a time."""


@final
class DraftingHeads(Speculative):
    """Draft a tree with heads trained on the model's frozen features, and verify it in one pass.

    Each head maps the hidden state under the newest logits to the token one place further on than
    the head before it, through the model's own output head.

    Paper: Cai et al. 2024, Medusa, arXiv 2401.10774 (Medusa-1: the model stays as it is).
    Differs: heads share the model's output head instead of a copy each, and are trained here, for
    minutes, on the calibration text; acceptance is exact unless asked otherwise.
    Cost: training once, kept in `path`; E x E weights a head; per step one pass of the heads and of
    the output head for each of them, and a pass of the model over 1 + nodes tokens.
    """

    trees: ClassVar[bool] = True
    example: ClassVar[Mapping[str, JsonValue]] = {
        "draft": 2,
        "nodes": 6,
        "steps": 60,
        "samples": 16,
    }

    draft: int = Field(3, ge=1)
    """Number of heads: each guesses one token further on."""
    nodes: int = Field(24, ge=1)
    """Most tokens of one tree of drafts."""
    path: str | None = None
    """File of trained heads (safetensors). Where it does not exist yet, heads are trained and written
    to it."""
    text: str = "calibration"
    """Text to train on: "calibration" (shipped), "docstrings" (long), a file or a data set."""
    samples: int = Field(64, ge=8)
    """Rows of that text; one of eight is only counted on."""
    row_tokens: int = Field(256, ge=16)
    """Tokens a row."""
    steps: int = Field(300, ge=0)
    """Steps of AdamW; 0 leaves heads that repeat the model's own next token."""
    positions: int = Field(256, ge=1)
    """Positions of the text a step."""
    rate: float = Field(1e-3, gt=0)
    """Learning rate at first; it falls to nothing along a cosine."""

    def effects(self) -> Effects:
        """As every tree; the head must be a module."""
        shared = super().effects()
        return shared.model_copy(update={"requires": shared.requires | {Trait.MODULES}})

    def widest(self) -> int:
        """All nodes of the tree."""
        return self.nodes

    def prepare(self, system: System, ctx: Context) -> System:
        """Read the heads from `path`, or train them."""
        width = int(system.model.config.get_text_config().hidden_size)
        stored = None if self.path is None else Path(self.path)
        if stored is not None and stored.exists():
            mark = fingerprint(system.model)
            heads = kit.load(stored, model=mark, number=self.draft, width=width)
            told: dict[str, JsonValue] = {"from": "path"}
        else:
            heads, told = self._trained(system, ctx, width)
            if stored is not None:
                kit.save(heads, stored, model=fingerprint(system.model))
        heads.to(device=system.device.torch, dtype=system.model.dtype)
        tree = grow(heads.accuracy, self.nodes)
        facts: dict[str, JsonValue] = {
            **told,
            "accuracy": [[round(share, 6) for share in ranks] for ranks in heads.accuracy],
            "tree": [list(node) for node in tree],
            "parameters": sum(parameter.numel() for parameter in heads.parameters()),
        }
        return replace(
            system,
            beside=(*system.beside, heads),
            facts={**system.facts, "draft_heads": facts},
        )

    def drafter(self, system: System, request: Request) -> Drafter:
        """The heads in front of the head that the model has now."""
        heads = system.beside[-1]
        top = modules.head(system.model)
        if top is None:
            raise RunError("the model has no output head, so heads cannot speak through it.")
        return HeadsDrafter(heads, top, grow(heads.accuracy, self.nodes))

    def _trained(
        self, system: System, ctx: Context, width: int
    ) -> tuple[kit.Heads, dict[str, JsonValue]]:
        """Train on the text's features.

        Raises:
            SpecError: it is the evaluation text, or a row is no use.
            Conflict: the model's head passes no gradient.
        """
        top = frozen_head(system.model)
        rows, told = self._rows(system, ctx)
        learn, count_on = kit.split(range(len(rows)))
        seen = torch.cat(states(system.model, torch.split(rows, ROWS)))
        heads = kit.Heads(self.draft, width).to(rows.device)
        kit.train(
            heads,
            top,
            kit.examples(rows[learn], seen[learn], self.draft),
            steps=self.steps,
            positions=self.positions,
            rate=self.rate,
            seed=ctx.seed,
            progress=ctx.progress,
        )
        held_out = kit.examples(rows[count_on], seen[count_on], self.draft)
        kit.count(heads, top, held_out)
        return heads, told

    def _rows(self, system: System, ctx: Context) -> tuple[torch.Tensor, dict[str, JsonValue]]:
        """Rows of calibration tokens `[R, L]`, and what a record says about them."""
        text = texts.load(self.text)
        if text.sha256 == texts.load("embedded").sha256:
            raise SpecError(
                f"text: {self.text!r} is the text that acceptance is measured on; heads trained on "
                "it would flatter the result. Use 'calibration', 'docstrings' or a text of your own."
            )
        if self.row_tokens > system.context or self.row_tokens < self.draft + 2:
            raise SpecError(
                f"row_tokens: {self.row_tokens} tokens a row do not suit {self.draft} heads on a model that "
                f"reads {system.context} at once. Take from {self.draft + 2} to {system.context}."
            )
        first = texts.bos(system.tokenizer)
        prefix = [] if first is None else [first]
        body = self.row_tokens - len(prefix)
        ids = ctx.calibration(self.text, self.samples * body)
        table = [prefix + ids[start : start + body] for start in range(0, len(ids), body)]
        told: dict[str, JsonValue] = {
            "from": "training",
            "text": text.source,
            "text_sha256": text.sha256,
            "tokens": sum(map(len, table)),
            "steps": self.steps,
        }
        return torch.tensor(table, device=system.device.torch), told
