"""The adapter over a fake zeus that behaves as zeus 0.16 does: millijoules, and 0 for missing."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from compresskit.errors import MissingExtra
from compresskit.measure.energy.counters import zeus


class ZeusBaseError(Exception):
    """As zeus.exception has it."""


class FakeGpus:
    """AMD GPUs: energy since the driver was loaded and power, in thousandths."""

    def __init__(self, *energies, powers=()):
        self.energies, self.powers = list(energies), list(powers)

    def get_total_energy_consumption(self, index):
        if self.energies[index] is None:
            raise ZeusBaseError("Total energy consumption is not supported on this AMD GPU.")
        return self.energies[index]

    def get_instant_power_usage(self, index):
        if not self.powers:
            raise ZeusBaseError("not supported")
        return self.powers[index]


@dataclass
class Apple:
    """The fields of AppleSiliconMeasurement that are read, and one that is part of another."""

    cpu_total_mj: int | None = None
    performance_cores_mj: tuple[int, ...] | None = None
    gpu_mj: int | None = None
    gpu_sram_mj: int | None = None
    ane_mj: int | None = None
    dram_mj: int | None = None


@dataclass
class Jetson:
    """The fields of JetsonMeasurement."""

    cpu_energy_mj: float | None = None
    gpu_energy_mj: float | None = None
    total_energy_mj: float | None = None


class FakeSoc:
    def __init__(self, answer):
        self.answer = answer

    def get_total_energy_consumption(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def library(*, gpus=None, soc=None):
    def get(what):
        if what is None:
            raise ZeusBaseError("No observable SoC was found on the current machine.")
        return what

    device = SimpleNamespace(get_gpus=lambda: get(gpus), get_soc=lambda: get(soc))
    return zeus.Library(device, SimpleNamespace(ZeusBaseError=ZeusBaseError))


def opened(kind, ordinals=(0,), **devices):
    return zeus.open_zeus(kind, ordinals, library=library(**devices))


def test_amd_gpus_are_counted_in_joules():
    counter = opened("cuda", (0, 2), gpus=FakeGpus(5_000, 7_000, 9_500, powers=[1, 2, 300_000]))
    assert counter.parts() == (5.0, 9.5)
    assert counter.watts() == pytest.approx(300.001)
    assert (counter.source, counter.scope) == ("zeus_amd_counter", "gpu")
    assert len(set(counter.devices)) == 2


@pytest.mark.parametrize("energies", [(None,), (0,)], ids=["odd die", "zero means missing"])
def test_a_gpu_without_a_counter_is_refused(energies):
    assert "no energy counter" in opened("cuda", gpus=FakeGpus(*energies))


def test_a_counter_that_stops_has_no_reading():
    gpus = FakeGpus(5_000, 6_000)
    counter = opened("cuda", (0, 1), gpus=gpus)
    gpus.energies[1] = 0
    assert counter.parts() is None
    assert counter.watts() is None


def test_apple_silicon_is_the_sum_of_its_units_without_memory():
    apple = Apple(
        cpu_total_mj=1_000,
        performance_cores_mj=(400, 500),
        gpu_mj=2_000,
        gpu_sram_mj=10,
        dram_mj=700,
    )
    counter = opened("cpu", soc=FakeSoc(apple))
    assert counter.parts() == (pytest.approx(3.01),)
    assert counter.apart() == {"dram": 0.7}
    assert (counter.source, counter.scope) == ("zeus_apple_counter", "soc")
    assert counter.cumulates


def test_a_jetson_is_its_total_rail_and_an_integral():
    counter = opened("cpu", soc=FakeSoc(Jetson(1.0, 2.0, 5_000.0)))
    assert counter.parts() == (5.0,)
    assert counter.apart() == {}
    assert (counter.source, counter.scope) == ("zeus_jetson_integral", "module")


@pytest.mark.parametrize(
    "answer", [Jetson(cpu_energy_mj=9.0), Apple(), queue.Empty(), ZeusBaseError("gone")]
)
def test_a_chip_that_tells_no_total_is_refused(answer):
    assert "no energy counter" in opened("cpu", soc=FakeSoc(answer))


def test_no_chip_is_a_reason():
    assert "No observable SoC" in opened("cpu")


def test_a_machine_that_zeus_cannot_help_is_not_asked(monkeypatch):
    """An x86 guest without powercap: nothing is imported, and no extra is recommended."""
    monkeypatch.setattr(zeus, "_bears_on", lambda kind: False)
    monkeypatch.setattr(zeus, "load", lambda: pytest.fail("zeus was imported"))
    assert zeus.open_zeus("cpu") is None


def test_where_zeus_would_help_and_is_missing_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(zeus, "_bears_on", lambda kind: True)
    monkeypatch.setattr(zeus, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="zeus"):
        zeus.load()
    assert "pip install 'compresskit[zeus]'" in zeus.open_zeus("cpu")
