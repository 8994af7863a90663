"""RAPL over a replayed powercap folder: which domains count, wraparound, mirrored dies, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.measure.energy import power
from compresskit.measure.energy.counters.rapl import Rapl, open_rapl

RANGE = 65_532_610_987
"""Microjoules: where an AMD server's counter wraps, after 262 s at 250 W."""


class Powercap:
    """A /sys/class/powercap of one's own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, zone: str, name: str, joules: float, *, watts: int | None = None) -> None:
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        if watts is not None:
            (folder / "constraint_0_max_power_uw").write_text(f"{watts * 1_000_000}\n")
        self.show(zone, joules)

    def show(self, zone: str, joules: float) -> None:
        (self.root / zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")

    def open(self) -> Rapl:
        counter = open_rapl(self.root)
        assert isinstance(counter, Rapl), counter
        return counter


@pytest.fixture
def powercap(tmp_path) -> Powercap:
    return Powercap(tmp_path)


def spent(counter: Rapl, before: tuple[float, ...]) -> float:
    after = counter.parts()
    return counter.total([b - a for a, b in zip(before, after, strict=True)])


def test_packages_are_summed_and_their_parts_and_wholes_are_not(powercap):
    powercap.add("intel-rapl:0", "package-0", 100)
    powercap.add("intel-rapl:0:0", "core", 100)
    powercap.add("intel-rapl:0:1", "uncore", 100)
    powercap.add("intel-rapl:0:2", "dram", 50)
    powercap.add("intel-rapl:1", "package-1", 900)
    powercap.add("intel-rapl:2", "psys", 100)
    powercap.add("intel-rapl-mmio:0", "package-0", 100)
    counter = powercap.open()
    before = counter.parts()
    for zone, joules in (
        ("0", 400),
        ("0:0", 9e3),
        ("0:1", 9e3),
        ("0:2", 57),
        ("1", 950),
        ("2", 9e3),
    ):
        powercap.show(f"intel-rapl:{zone}", joules)
    powercap.show("intel-rapl-mmio:0", 400)
    assert spent(counter, before) == pytest.approx(350)
    assert counter.apart() == {"dram": pytest.approx(7)}
    assert (counter.source, counter.scope, len(counter.devices)) == ("rapl", "package", 2)


def test_a_counter_that_wraps_once_goes_on(powercap):
    powercap.add("intel-rapl:0", "package-0", 65_500)
    counter = powercap.open()
    before = counter.parts()
    powercap.show("intel-rapl:0", 100)
    assert spent(counter, before) == pytest.approx(65_532.610987 - 65_500 + 100)


def test_a_counter_that_wraps_is_read_in_time(powercap, world):
    """With one package of 400 W: every 41 s, and a window of three wraps loses none of them."""
    powercap.add("intel-rapl:0", "package-0", 0, watts=400)
    counter = powercap.open()
    assert counter.poll_every == pytest.approx(65_532.6 / 1600, rel=1e-3)
    before = counter.parts()
    trace = power.Trace(counter, clock=world.clock)
    for second in range(10, 601, 10):
        world.now = float(second)
        powercap.show("intel-rapl:0", 380.0 * second % (RANGE / 1e6))
        trace.look()
    assert spent(counter, before) == pytest.approx(380.0 * 600)


def test_unread_wraps_would_be_lost(powercap):
    """Negative control: the same course without a look in between."""
    powercap.add("intel-rapl:0", "package-0", 0)
    counter = powercap.open()
    before = counter.parts()
    powercap.show("intel-rapl:0", 380.0 * 600 % (RANGE / 1e6))
    assert spent(counter, before) < 380.0 * 600 / 3


def test_an_unknown_or_empty_design_power_is_taken_as_large(powercap):
    powercap.add("intel-rapl:0", "package-0", 0, watts=0)
    assert powercap.open().poll_every == pytest.approx(65_532.6 / 2000, rel=1e-3)


def after(powercap: Powercap, *joules: float) -> float:
    counter = powercap.open()
    before = counter.parts()
    for index, value in enumerate(joules):
        powercap.show(f"intel-rapl:{index}", value)
    return spent(counter, before)


def test_dies_that_mirror_one_counter_count_once(powercap):
    powercap.add("intel-rapl:0", "package-0-die-0", 1000)
    powercap.add("intel-rapl:1", "package-0-die-1", 1000.2)
    assert after(powercap, 1680, 1680.4) == pytest.approx(680)


@pytest.mark.parametrize(
    ("names", "drawn"),
    [
        # Two dies with counters of their own.
        (("package-0-die-0", "package-0-die-1"), (680, 652)),
        # Two sockets that happen to draw the same.
        (("package-0", "package-1"), (680, 680)),
        # So little that agreeing proves nothing.
        (("package-0-die-0", "package-0-die-1"), (5, 5)),
    ],
)
def test_counters_that_are_their_own_are_all_summed(powercap, names, drawn):
    for index, name in enumerate(names):
        powercap.add(f"intel-rapl:{index}", name, 1000)
    assert after(powercap, *(1000 + one for one in drawn)) == pytest.approx(sum(drawn))


def test_a_machine_without_packages_says_so(powercap, tmp_path):
    assert "powercap is not exposed" in open_rapl(tmp_path / "nothing")
    powercap.add("intel-rapl:0", "psys", 1)
    assert "powercap is not exposed" in open_rapl(tmp_path)


def test_counters_that_only_root_may_read_are_refused(powercap, tmp_path, monkeypatch):
    powercap.add("intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def guarded(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)  # the tests may run as root
    assert "root only" in open_rapl(tmp_path)


def test_rubbish_in_the_file_is_a_reason(powercap, tmp_path):
    powercap.add("intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("unknown")
    assert "cannot be read" in open_rapl(tmp_path)


def test_a_counter_that_vanishes_has_no_reading(powercap, tmp_path):
    powercap.add("intel-rapl:0", "package-0", 1)
    powercap.add("intel-rapl:0:0", "dram", 1)
    counter = powercap.open()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0:0" / "energy_uj").unlink()
    assert counter.parts() is None
    assert counter.apart() == {}
    assert "stopped answering" in counter.reason()
