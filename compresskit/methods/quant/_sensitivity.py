"""How much each part of a model minds being rounded, measured one part at a time.

The measure is the divergence of the next-token predictions on calibration text when that part alone
is rounded to b bits and all else is left as it is. Summed over the parts it predicts, roughly, what
rounding all of them costs: errors of different parts are nearly independent as long as they are
small, and a second one adds to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from compresskit.methods.quant import _budget, _parts
from compresskit.methods.quant._divergence import Dense, batches, block_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import JsonValue

    from compresskit.method import Progress
    from compresskit.methods.quant._parts import Rounding, Weight
    from compresskit.system import System


@dataclass(frozen=True)
class Entry:
    """One part of the table."""

    part: str
    members: tuple[str, ...]
    """Names of its weights."""
    parameters: int
    cost: dict[int, int]
    """Bits -> bits of storage, scales included."""
    kl: dict[int, float] = field(default_factory=dict)
    """Bits -> mean KL in nats per token with this part alone rounded."""


@dataclass(frozen=True)
class Table:
    """Sensitivities of every part."""

    entries: tuple[Entry, ...]
    tokens: int
    """Tokens whose predictions were compared."""

    @property
    def parameters(self) -> int:
        """Weights that are quantised."""
        return sum(entry.parameters for entry in self.entries)

    def choose(self, budget: float) -> _budget.Choice:
        """Widths under `budget` bits per quantised weight.

        Raises:
            SpecError: the budget is too small for the narrowest widths.
        """
        options = [
            _budget.Part(
                entry.part,
                tuple(_budget.Option(bits, entry.cost[bits], entry.kl[bits]) for bits in entry.kl),
            )
            for entry in self.entries
        ]
        return _budget.choose(options, int(budget * self.parameters))

    def predicted(self, chosen: dict[str, int]) -> float:
        """Sum of the measured KLs of the parts at their chosen widths."""
        return sum(entry.kl[chosen[entry.part]] for entry in self.entries)

    def document(self, chosen: dict[str, int]) -> list[JsonValue]:
        """JSON-ready rows, in the order of the model."""
        return [
            {
                "part": entry.part,
                "layers": len(entry.members),
                "parameters": entry.parameters,
                "kl_nats": {str(bits): value for bits, value in entry.kl.items()},
                "bits": chosen[entry.part],
            }
            for entry in self.entries
        ]


@torch.no_grad()
def measure(
    system: System,
    rows: torch.Tensor,
    parts: dict[str, list[Weight]],
    *,
    choices: Sequence[int],
    rounding: Rounding,
    progress: Progress,
) -> Table:
    """Round each of `parts` to each of `choices` bits and see what it does to the predictions.

    rows: int64 `[B, S]` of calibration text. The model is left as it was, bit for bit.

    Raises:
        RunError: the model gives NaN or infinite logits.
    """
    first = {
        name: min(block_of(system.model, module) for w in weights for module, _ in w.holders)
        for name, weights in parts.items()
    }
    entries = {
        name: Entry(
            name,
            tuple(weight.name for weight in weights),
            sum(weight.parameter().numel() for weight in weights),
            {bits: sum(rounding.stored_bits(w, bits) for w in weights) for bits in choices},
            dict.fromkeys(choices, 0.0),
        )
        for name, weights in parts.items()
    }
    pieces = batches(system, rows)
    done, total = 0, len(pieces) * len(parts) * len(choices)
    for tokens in pieces:
        dense = Dense(system.model, tokens)
        for name, weights in parts.items():
            for bits in choices:
                with _parts.replaced(weights, lambda w, bits=bits: rounding.rounded(w, bits)):  # type: ignore[misc]
                    found = dense.kl(first[name])
                entries[name].kl[bits] += found * tokens.shape[0] / rows.shape[0]
                done += 1
                progress("sensitivity", done, total)
        del dense
    return Table(tuple(entries.values()), rows.numel())
