"""How a run goes: on the GPU with the Triton kernels, or dry, on the CPU with the references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Settings:
    """Device and implementation."""

    device: str
    impl: str
    is_dry: bool
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def dry(cls) -> Self:
        """Every step but the timing, anywhere."""
        return cls("cpu", "reference", True)

    @classmethod
    def cuda(cls) -> Self | None:
        """The real thing, or None where there is no CUDA device."""
        return cls("cuda", "triton", False) if torch.cuda.device_count() else None

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers: random, since products of zeros draw less power and run faster."""
        made = torch.randn(*shape, generator=self.generator(seed), device=self.device)
        return made.to(dtype or self.dtype)

    def randint(
        self, low: int, high: int, *shape: int, seed: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Integers from low to high - 1."""
        generator = self.generator(seed)
        return torch.randint(low, high, shape, generator=generator, device=self.device, dtype=dtype)
