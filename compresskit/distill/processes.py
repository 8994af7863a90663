"""Several processes that step together: how many there are, and what they add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """All processes of a training, seen from one of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Those that `accelerator` has been launched with."""
        self._accelerator = accelerator
        self.count = int(accelerator.num_processes)
        self.place = int(accelerator.process_index)
        """Of this process, from 0."""
        self.is_main = bool(accelerator.is_main_process)

    def sum(self, tensor: Any) -> torch.Tensor:
        """A tensor summed over all processes, where they are."""
        if self.count == 1:
            summed: torch.Tensor = tensor
            return summed
        total: torch.Tensor = self._accelerator.reduce(tensor.to(self._accelerator.device), "sum")
        return total

    def agree(self, value: float) -> float:
        """The sum of `value` over all processes."""
        if self.count == 1:
            return value
        return float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def of_main(self, value: float) -> float:
        """The `value` of the first process, in all of them."""
        return self.agree(value if self.is_main else 0.0)
