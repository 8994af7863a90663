"""Energy of the GPUs from NVML: the cumulative counter, else their power sensor.

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, for the
whole board, from Volta on. Where a board or a virtual GPU lacks it, its power is integrated and
the readings say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from compresskit.measure.energy.counters.protocol import AbstractCounter
from compresskit.measure.nvml import Gpu, open_gpus, power_watts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _OfGpus(AbstractCounter):
    scope = "gpu"

    def __init__(self, gpus: tuple[Gpu, ...]) -> None:
        """Cover `gpus`: all that the run uses."""
        self.gpus = gpus
        self.devices = tuple(gpu.device for gpu in gpus)

    def watts(self) -> float | None:
        """Power of all boards now; None if one of them does not tell."""
        powers = [power_watts(gpu) for gpu in self.gpus]
        known = [power for power in powers if power is not None]
        return sum(known) if len(known) == len(powers) else None


@final
class Nvml(_OfGpus):
    """NVML's energy counters."""

    source = "nvml_counter"

    def parts(self) -> tuple[float, ...] | None:
        """Joules of each board since its driver was loaded; None if one stops answering."""
        joules = []
        for gpu in self.gpus:
            millijoules = gpu.ask("nvmlDeviceGetTotalEnergyConsumption")
            if millijoules is None:
                return None
            joules.append(millijoules / 1000)
        return tuple(joules)

    def reason(self) -> str:
        """Why a reading may be missing."""
        return "NVML energy counter did not answer"


@final
class NvmlPower(_OfGpus):
    """NVML's power sensors, to be integrated over time."""

    source = "nvml_power_integral"
    cumulates = False

    def parts(self) -> tuple[float, ...] | None:
        """Nothing is cumulated here."""
        return None

    def answers(self) -> bool:
        """Whether the sensors tell a power just now."""
        return self.watts() is not None

    def reason(self) -> str:
        """Why a reading may be missing."""
        return "NVML power sensor did not answer"


def open_nvml(
    ordinals: Sequence[int] = (0,),
    *,
    nvml: Any = None,
    uuid_of: Callable[[int], str | None] | None = None,
) -> Nvml | NvmlPower | str:
    """Return the counter of the GPUs that torch calls `cuda:<ordinal>`, or why there is none."""
    gpus = open_gpus(ordinals, nvml=nvml, uuid_of=uuid_of)
    if isinstance(gpus, str):
        return gpus
    counter = Nvml(gpus)
    if counter.parts() is not None:
        return counter
    power = NvmlPower(gpus)
    if power.watts() is not None:
        return power
    return "NVML gives neither energy nor power for this GPU"
