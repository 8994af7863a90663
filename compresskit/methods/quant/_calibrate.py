"""What quantisers with calibration share: the text, and the walk through the blocks.

    text --> rows of tokens --> hidden states --block by block--> `Shared`: layers and statistics
                                                                     |
                                              the method quantises them, the walk goes on

What calibration does not reach (experts in 3-D parameters, layers outside the blocks or never
called) is rounded to nearest and named in the facts.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from compresskit import text as texts
from compresskit.errors import RunError, SpecError
from compresskit.hf import modules
from compresskit.hf.blocks import Stream
from compresskit.methods.quant._base import AbstractQuant
from compresskit.methods.quant._experts import pack_experts
from compresskit.methods.quant._linear import find_embedding, replace_embedding, select
from compresskit.methods.quant._moments import Collector
from compresskit.methods.quant._packed import PackedLinear
from compresskit.methods.quant._packing import Packing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import JsonValue

    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.methods.quant._moments import Shared
    from compresskit.methods.quant._packing import Scheme
    from compresskit.system import System

TOKENS = 4096
"""Tokens that pass a block at a time: bounds the memory for activations."""

KEPT = 256
"""Tokens kept as such, where a method wants some."""


class AbstractCalibrated(AbstractQuant, ABC):
    """A quantiser that looks at activations."""

    text: str = "calibration"
    """Calibration text: "calibration" (shipped), "docstrings" (long), a file or a data set; never
    the evaluation text."""
    samples: Annotated[int, Field(ge=1)] = 32
    """Rows of calibration tokens."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens a row."""


@dataclass(frozen=True)
class Rows:
    """Calibration tokens."""

    batches: list[torch.Tensor]
    """int64 `[B, length]` each."""
    facts: dict[str, JsonValue]


def rows(method: AbstractCalibrated, system: System, ctx: Context) -> Rows:
    """Cut the calibration text into rows, each with a BOS token if the tokenizer adds one.

    Raises:
        SpecError: the text is the evaluation text, or a row is longer than the model's context.
        InputError: the text is unusable or has too few tokens.
    """
    text = texts.load(method.text)
    if text.sha256 == texts.load("embedded").sha256:
        raise SpecError(
            f"text: {method.text!r} is the text that quality is measured on; calibrating on it "
            "would flatter the result. Use 'calibration', 'docstrings' or a text of your own."
        )
    if method.length > system.context:
        raise SpecError(
            f"length: {method.length} tokens a row are more than the {system.context} that the "
            "model can read at once."
        )
    first = texts.bos(system.tokenizer)
    prefix = [] if first is None else [first]
    body = method.length - len(prefix)
    ids = ctx.calibration(method.text, method.samples * body)
    table = [prefix + ids[start : start + body] for start in range(0, len(ids), body)]
    tokens = torch.tensor(table, device=modules.embedding(system.model).weight().device)
    facts: dict[str, JsonValue] = {
        "text": text.source,
        "text_sha256": text.sha256,
        "samples": method.samples,
        "length": method.length,
        "tokens": tokens.numel(),
        "tokens_sha256": texts.ids_sha256(table),
    }
    return Rows(list(torch.split(tokens, max(1, TOKENS // method.length))), facts)


class Walk:
    """Takes a method through the blocks, then packs what calibration did not reach."""

    def __init__(
        self,
        method: AbstractCalibrated,
        system: System,
        ctx: Context,
        scheme: Scheme[Any],
        label: str,
    ) -> None:
        """Send the calibration text up to the first block; `scheme` rounds what it does not reach."""
        self.sites = select(system.model, with_head=method.head, skip=method.skip)
        model = system.model
        for site in self.sites:
            if not bool(torch.isfinite(site.weight()).all()):
                raise RunError(
                    f"The weight of {site.name} holds NaN or infinity; it cannot be quantised. "
                    f"Leave it out with skip = ['{site.name}']."
                )
        self.method, self.ctx, self.scheme, self.label = method, ctx, scheme, label
        self.embedding = find_embedding(model, with_head=method.head) if method.embeddings else None
        self.packing = Packing(system)
        self.head = modules.head(model)
        self.tied = modules.is_tied(model)
        self.fell_back: dict[str, JsonValue] = {}
        self.text = rows(method, system, ctx)
        self.stream = Stream(model, self.text.batches)
        self.keep = max(1, KEPT // len(self.text.batches))

    def blocks(
        self, *, products: bool, keep: bool = False, advance: bool = False
    ) -> Iterator[tuple[int, list[Shared]]]:
        """Observe one block after the other; the caller quantises it before it asks for the next.

        With `advance` the next block is given what this one puts out before it is quantised;
        without, what it puts out afterwards.
        """
        total = len(self.stream.blocks) + 1
        for index, block in enumerate(self.stream.blocks):
            inside = [site for site in self.sites if site.name.startswith(f"{block.name}.")]
            self.sites = [site for site in self.sites if site not in inside]
            collector = Collector(inside, products=products, keep=self.keep if keep else 0)
            # A block without layers to quantise is passed once: with its output, or at the end.
            for batch in range(len(self.stream.hidden) if inside or advance else 0):
                out = collector.over(block.module, partial(self.stream.run, index, batch))
                if advance:
                    self.stream.hidden[batch] = out
            seen = collector.result()
            missed = {site.name for site in inside} - {s.name for one in seen for s in one.sites}
            yield index, seen
            self.round([site for site in inside if site.name in missed], "never called")
            if not advance:
                self.stream.advance(index)
            modules.release_freed()
            self.ctx.progress(self.label, index + 1, total)

    def at_head(self, *, products: bool, keep: bool = False) -> Shared | None:
        """Statistics of the output head, after all blocks; None if it is not to be quantised."""
        site = next((site for site in self.sites if site.module is self.head), None)
        if site is None:
            return None
        self.sites.remove(site)
        collector = Collector([site], products=products, keep=self.keep if keep else 0)
        for x in self.stream.inputs_of_head(site.module):
            collector.take(frozenset({site.name}), x)
        return collector.result()[0]

    def round(self, sites: list[Site], reason: str) -> None:
        """Round `sites` to nearest, because of `reason`."""
        for site in sites:
            self.fell_back[site.name] = reason
            site.replace(self.packing.pack(site, self.scheme))

    def finish(self, **facts: JsonValue) -> System:
        """Pack what is left: other linear layers, experts, the embedding."""
        model, scheme, total = self.packing.system.model, self.scheme, len(self.stream.blocks) + 1
        self.round(self.sites, "outside the blocks")
        self.sites = []
        before = len(self.packing.done)
        pack_experts(
            self.packing, lambda _: scheme, skip=self.method.skip, progress=self.ctx.progress
        )
        if len(self.packing.done) > before:
            self.fell_back["experts"] = "3-D parameters"
        if self.embedding is not None:
            head = modules.head(model)
            tied = [head.product] if self.tied and isinstance(head, PackedLinear) else []
            replace_embedding(self.packing, self.embedding, scheme, tied)
        self.ctx.progress(self.label, total, total)
        return self.packing.finish(
            calibration=self.text.facts, rounded_to_nearest=self.fell_back, **facts
        )
