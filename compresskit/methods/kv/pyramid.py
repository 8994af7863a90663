"""SnapKV with more rows in low layers than in high ones.

layer 0   ████████████████   most
layer 1   ███████████
layer 2   ██████
layer 3   █                  fewest; on average as many as asked for
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from pydantic import Field, JsonValue

from compresskit.hf.cache import Layer, build_cache
from compresskit.methods.kv._judged import Judged, JudgedLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compresskit.method import Context
    from compresskit.methods.kv._evict import EvictingLayer, Rule
    from compresskit.system import System

USED = "cache_rows_by_layer"
"""Fact: rows that each layer was given, by length of the prompt."""


def layout(prompt: int, keep: float, layers: int, *, window: int, beta: int) -> list[int]:
    """Rows of each layer, from the first to the last, for a prompt of that many tokens.

    They fall evenly from `2 keep - keep / beta` to `keep / beta`. Where the first layer would keep
    more than there is outside the window, it keeps that and the last one what is left. Where the
    last layer would then keep less than the window, or more than the first, all keep the same: with
    a window of 64 and a beta of 20 that is so for every budget below 1280, unless the first layer
    keeps all it can.

    Args:
        prompt: tokens.
        keep: rows kept on average.
        layers: their number.
        window: rows that every layer keeps.
        beta: steepness; 1 is flat.
    """
    lowest = keep / beta
    highest = 2 * keep - lowest
    if highest >= prompt - window:
        highest = prompt - window
        lowest = 2 * keep - highest
    if layers == 1 or not prompt >= highest >= lowest >= window:
        return [max(round(keep), window)] * layers
    step = (highest - lowest) / (layers - 1)
    return [round(highest - place * step) for place in range(layers)]


class PyramidLayer(JudgedLayer):
    """Layer `place` of those that share the budget."""

    def __init__(
        self, rule: Rule, layouts: Callable[[int], list[int]], place: int, **judging: Any
    ) -> None:
        """Hold nothing yet; `layouts` gives the rows of all layers for the length of a prompt."""
        super().__init__(rule, **judging)
        self.layouts, self.place = layouts, place
        self.used: dict[str, JsonValue] = {}
        """Layouts that were used, by length of the prompt."""

    def budget(self, prompt: int) -> int:
        """What the pyramid gives this layer."""
        rows = self.layouts(prompt)
        self.used[str(prompt)] = [min(row, prompt) for row in rows]
        return rows[self.place]


@final
class PyramidKV(Judged):
    """Keep what the newest queries look at: more rows in low layers, fewer in high ones.

    Paper: Cai et al. 2024, PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling, arXiv 2406.02069. The layout is that of NVIDIA's kvpress.
    Differs: the budget of a layer counts its window. Only layers with full attention share in the
    pyramid. Where no pyramid fits (see `layout`) all layers keep the same; the rows that each layer
    was given are in the fact `cache_rows_by_layer`, by length of the prompt.
    Cost: as kv/snapkv.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5, "window": 4}

    beta: int = Field(20, ge=1)
    """Steepness: the last layer keeps a share of 1 / beta of the mean; 1 is flat."""

    def layer(self, rule: Rule, index: int, layers: int) -> PyramidLayer:
        """Number `index` of `layers` layers that share the budget."""
        return PyramidLayer(
            rule,
            lambda prompt: self.layout(prompt, layers),
            index,
            window=self.window,
            kernel=self.kernel,
            pooling=self.pooling,
            heads=self.heads,
        )

    def layout(self, prompt: int, layers: int) -> list[int]:
        """Rows of each of `layers` layers for a prompt of that many tokens."""
        keep = self.tokens or prompt * (1 - self.ratio)
        return layout(prompt, keep, layers, window=self.window, beta=self.beta)

    def maker(self, system: System, rule: Rule) -> Callable[[int], EvictingLayer]:
        """Layers share the budget with others that have full attention, not with sliding ones."""
        full = full_layers(system)
        used = cast("dict[str, JsonValue]", system.facts[USED])

        def make(index: int) -> EvictingLayer:
            layer = self.layer(rule, full.index(index), len(full))
            layer.used = used
            return layer

        return make

    def apply(self, system: System, ctx: Context) -> System:
        """Give every full-attention layer its part of the pyramid."""
        # The layout depends on the prompt, so this fact is filled in when prompts arrive.
        return super().apply(replace(system, facts={**system.facts, USED: {}}), ctx)

    def describe(self) -> str:
        """One phrase about what is kept."""
        return (
            f"{super().describe()}, more in low layers, judged by the newest {self.window} queries"
        )


def full_layers(system: System) -> list[int]:
    """Indices of the model's layers with full attention."""
    found: list[int] = []

    def note(index: int) -> Layer:
        found.append(index)
        return Layer()

    build_cache(system.model.config, note)
    return found
