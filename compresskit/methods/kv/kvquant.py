"""Low-bit keys and values with levels learnt from text, outliers apart, the first tokens untouched.

    key  ──► positions off ──► (k - middle) / half, by channel ─┬─► nearest of 2^bits levels
    value ────────────────────► (v - offset) / scale, by row ───┘
                                                                └─► outliers as they are: place, number

The levels come from calibration (`_nonuniform`), and are not evenly spaced. Keys are coded without
their rotary positions (`_unrotated`), which are put on again when attention reads them
(`_kvquant_layer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from pydantic import Field, JsonValue

from compresskit import text as texts
from compresskit.errors import Conflict, SpecError
from compresskit.hf import attention
from compresskit.method import AbstractMethod, Context, Stage
from compresskit.methods.kv._kvquant_layer import KVQuantLayer
from compresskit.methods.kv._layers import install
from compresskit.methods.kv._nonuniform import Levels, fit, observe, watch
from compresskit.methods.kv._unrotated import Positions
from compresskit.traits import Effects, Trait

if TYPE_CHECKING:
    from compresskit.system import System

REPEATED = 16
"""Tokens of the text that tries whether positions were understood."""


@final
class KVQuant(AbstractMethod):
    """Code keys and values in 2 to 4 bits with levels learnt from calibration text.

    Paper: Hooper et al. 2024, KVQuant, arXiv 2401.18079.
    Differs: outliers are a fixed number in each row of a head, which is a place and a number each,
    not those beyond a threshold in a sparse matrix. The range of values is that of one head's row,
    not of all heads together. Keys are taken from the cache and their positions turned back, so that
    no projection has to be hooked. No normalisation of the 2-bit levels.
    Cost: calibration runs `samples` texts forward and, with `fisher`, backward. A step decodes every
    row, turns the keys and drops them again: a tile at a time in our kernel for CPUs, elsewhere a
    stretch at a time in torch, which is several times slower than a dense cache.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    example: ClassVar[Mapping[str, JsonValue]] = {"bits": 3, "samples": 2, "length": 128}

    bits: Literal[2, 3, 4] = 4
    """Bits of a number."""
    outliers: float = Field(0.01, ge=0, lt=0.5)
    """Share of the numbers of a row of a head that are kept as they are; rounded up."""
    sink: int = Field(5, ge=0)
    """First tokens of the text that are kept as they are."""
    sensitivity: Literal["fisher", "none"] = "fisher"
    """fisher: levels are drawn to numbers with large squared gradients, which needs weights that
    gradients can pass. none: all numbers count the same."""
    samples: int = Field(8, ge=1)
    """Rows of calibration text."""
    length: int = Field(256, ge=2)
    """Tokens a row."""

    def effects(self) -> Effects:
        """Floats are gone, but every token is there and the last ones can be taken back."""
        requires = {Trait.OWN_CACHE, Trait.DENSE_CACHE, Trait.ATTENTION_HOOK}
        if self.sensitivity == "fisher":
            requires.add(Trait.FLOAT_WEIGHTS)
        return Effects(
            requires=frozenset(requires),
            removes=frozenset(
                {
                    Trait.DENSE_CACHE,
                    # By row number padding would be taken for positions.
                    Trait.PADDED_BATCH,
                    Trait.STATIC_SHAPES,
                    Trait.LOSSLESS,
                }
            ),
        )

    def apply(self, system: System, ctx: Context) -> System:
        """Learn the levels, then give every full-attention layer a cache of codes.

        Raises:
            Conflict: the positions cannot be taken off the keys, or a head's numbers do not fill
                whole bytes.
            SpecError: a row of calibration text is longer than the context, or shorter than `sink`.
            InputError: the calibration text has too few tokens.
        """
        config, device = system.model.config, system.device.torch
        attention.use(system.model)
        positions = Positions.of(system.model)
        rows = self._rows(system, ctx).to(device)
        with torch.inference_mode():
            repeated, _ = watch(system, rows[:1, -1:].expand(1, REPEATED))
        positions.check(system.model, [(one.keys, one.values) for one in repeated.values()])
        for one in repeated.values():
            _check_width(one.keys.shape[-1])
            _check_width(one.values.shape[-1])
        seen = observe(
            system,
            rows,
            positions,
            skip=self.sink,
            fisher=self.sensitivity == "fisher",
            progress=lambda done, total: ctx.progress("kv/kvquant text", done, total),
        )
        levels: dict[int, Levels] = {}
        for index in sorted(seen):
            fitted = fit(seen.pop(index), self.bits, self.outliers)
            levels[index] = Levels(*(part.to(device) for part in fitted))
            ctx.progress("kv/kvquant levels", len(levels), len(repeated))

        def make(index: int) -> KVQuantLayer:
            return KVQuantLayer(
                config,
                levels[index],
                positions,
                bits=self.bits,
                outliers=self.outliers,
                sink=self.sink,
            )

        return install(
            system,
            make,
            cache=f"{self.bits}-bit codes, {self.outliers:.1%} outliers, first {self.sink} tokens",
            nominal={"bits": self.bits},
        )

    def _rows(self, system: System, ctx: Context) -> torch.Tensor:
        """Calibration tokens, int64 `[samples, length]`."""
        if not self.sink + 1 < self.length <= system.context:
            raise SpecError(
                f"length: rows of {self.length} calibration tokens must be longer than sink "
                f"({self.sink}) + 1 and fit the model's context of {system.context}."
            )
        first = texts.bos(system.tokenizer)
        prefix = [] if first is None else [first]
        body = self.length - len(prefix)
        ids = ctx.calibration("calibration", self.samples * body)
        return torch.tensor([prefix + ids[at : at + body] for at in range(0, len(ids), body)])


def _check_width(width: int) -> None:
    if width % 8:
        raise Conflict(
            f"kv/kvquant packs a row into whole bytes, and the model's head dimension of {width} is "
            "no multiple of 8. Use another cache method."
        )
