"""The model drafts for itself with some of its layers left out.

target   0 1 2 3 4 5 6 7
draft    0 1   3   5   7      the same weights, no second model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

from pydantic import Field, JsonValue, model_validator

from compresskit.decode import autoregressive
from compresskit.errors import Conflict
from compresskit.hf import blocks
from compresskit.hf.cache import new_dynamic
from compresskit.hf.step import eager_step
from compresskit.hf.view import keeping
from compresskit.methods.speculative._base import Speculative
from compresskit.methods.speculative._model_drafter import WIDTHS, ModelDrafter
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.method import Context, Outline
    from compresskit.methods.speculative._draft import Drafter
    from compresskit.spec import ModelSpec
    from compresskit.system import Request, System


def spread(layers: int, keep: float) -> list[int]:
    """The layers that stay, fewer than all: the first, the last, and others evenly between them.

    >>> spread(8, 0.5)
    [0, 2, 5, 7]
    """
    count = max(1, min(round(layers * keep), layers - 1))
    if count == 1:
        return [0]
    return [round(place * (layers - 1) / (count - 1)) for place in range(count)]


@final
class LayerSkip(Speculative):
    """Draft with a part of the model's own layers, and verify with all of them.

    Paper: Zhang et al. 2023, Draft & Verify, arXiv 2309.08168.
    Differs: layers are skipped whole and evenly, not attention and MLP apart by a search; the draft
    keeps a cache of its own instead of overwriting the target's.
    Cost: for each guess a pass over the kept share of the layers and the whole head; a cache for the
    kept layers. No weights. Models that were not trained to exit early or to skip lose most of their
    sense with a few layers, and acceptance with it.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"keep": 0.75, "draft": 2}

    skip: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers left out, counted from 0; auto: evenly spread between the first and the last."""
    keep: float = Field(0.9, gt=0, lt=1)
    """auto: share of the layers that drafts."""
    draft: int = Field(3, ge=1)
    """Tokens drafted in a row per step."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.skip != "auto" and list(self.skip) != sorted(set(self.skip)):
            raise ValueError(f"skip names each layer once, in rising order, not {list(self.skip)}")
        if self.skip == ():
            raise ValueError('skip is empty: a draft of all layers saves nothing. Use "auto"')
        return self

    def effects(self) -> Effects:
        """As all; the layers must be modules that a view can share."""
        shared = super().effects()
        return shared.model_copy(update={"requires": shared.requires | {Trait.MODULES}})

    def vet(self, target: Outline, find: Callable[[ModelSpec], Outline]) -> None:
        """Refuse layers that the model does not have."""
        layers = target.config.get("num_hidden_layers", target.config.get("n_layer"))
        if isinstance(layers, int):
            self.kept(layers)

    def kept(self, layers: int) -> list[int]:
        """The layers that draft, of so many.

        Raises:
            Conflict: one that is to be skipped does not exist, or none would be left.
        """
        if layers < 2:
            raise Conflict("the model has one layer only, so it cannot draft with fewer.")
        if self.skip == "auto":
            return spread(layers, self.keep)
        if self.skip[-1] >= layers or self.skip[0] < 0 or len(self.skip) == layers:
            raise Conflict(
                f"skip={list(self.skip)}: the model has layers 0 to {layers - 1}, and one of them at "
                'least must stay. Name others, or use "auto".'
            )
        return [layer for layer in range(layers) if layer not in self.skip]

    def prepare(self, system: System, ctx: Context) -> System:
        """Make the view once the model is as it will be decoded with (packed, laid out)."""

        def settle(ready: System) -> System:
            kept = self.kept(len(blocks.find(ready.model)))
            draft = ctx.finish(viewed(ready, kept))
            facts: dict[str, JsonValue] = {**ready.facts, "draft_layers": [*kept]}
            return replace(ready, drafts=(*ready.drafts, draft), facts=facts)

        return replace(system, settle=(*system.settle, settle))

    def drafter(self, system: System, request: Request) -> Drafter:
        """The view with an empty cache."""
        return ModelDrafter(system.drafts[-1], request, draft=self.draft)


def viewed(system: System, kept: list[int]) -> System:
    """A dense eager system over the blocks `kept` of the model of `system`."""
    view = keeping(system.model, kept)
    return replace(
        system,
        model=view,
        step=eager_step(view),
        new_cache=lambda capacity: new_dynamic(view.config),
        decode=autoregressive,
        widths=WIDTHS,
        fixed_widths=False,
        settle=(),
        drafts=(),
    )
