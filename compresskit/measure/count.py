"""Count forward passes of the target model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from compresskit.system import Step, System


@dataclass
class Counter:
    """A step that counts its calls; costs one integer addition per forward pass."""

    step: Step
    calls: int = 0

    def __call__(
        self,
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Count, then step."""
        self.calls += 1
        return self.step(
            tokens, cache, mask=mask, positions=positions, keep=keep, features=features
        )


def counting(system: System) -> tuple[System, Counter]:
    """Return the system with a counting step, and the counter."""
    counter = Counter(system.step)
    return replace(system, step=counter), counter
