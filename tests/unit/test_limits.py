"""The machine's limits: arithmetic with a fake clock, and a machine file that keeps them."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from compresskit import device as devices
from compresskit.cli import doctor
from compresskit.errors import RecordError
from compresskit.measure import limits, machine
from compresskit.measure.limits import Sizes
from compresskit.record import Limits, Measured, Unavailable
from compresskit.units import Unit

TINY = Sizes(buffer_bytes=4096, matmul=8, dispatches=10, goes=3)
CPU = devices.resolve("cpu")


class Clock:
    """Each reading is so much later than the one before; the list starts again when used up."""

    def __init__(self, *gaps: float) -> None:
        self.gaps, self.now, self.reads = gaps, 0.0, 0

    def __call__(self) -> float:
        self.now += self.gaps[self.reads % len(self.gaps)]
        self.reads += 1
        return self.now


def test_a_copy_counts_what_is_read_and_what_is_written():
    found = limits.measure(CPU, work=TINY, clock=Clock(0.5))
    assert found.copy_bytes_per_second.value == pytest.approx(2 * 4096 / 0.5)
    assert found.copy_bytes_per_second.unit is Unit.BYTE_PER_SECOND


def test_a_product_is_two_operations_per_element_and_a_launch_is_shared():
    found = limits.measure(CPU, work=TINY, clock=Clock(0.5))
    assert found.matmul_flops_per_second.value == pytest.approx(2 * 8**3 / 0.5)
    assert found.dispatch_seconds.value == pytest.approx(0.5 / 10)


def test_the_best_go_counts():
    # Reads come in pairs (begin, end): goes of 3, 1 and 2 seconds.
    found = limits.measure(CPU, work=TINY, clock=Clock(0, 3, 0, 1, 0, 2))
    assert found.copy_bytes_per_second.value == pytest.approx(2 * 4096 / 1)


def test_threads_are_as_asked_and_given_back():
    before = torch.get_num_threads()
    found = limits.measure(CPU, threads=2, work=TINY, clock=Clock(1))
    assert found.threads == 2
    assert torch.get_num_threads() == before


def test_too_little_memory_is_a_reason_and_the_other_limits_stand():
    found = limits.measure(CPU, work=Unavailable(reason="too small"), clock=Clock(1))
    assert found.copy_bytes_per_second == Unavailable(reason="too small")
    assert isinstance(found.dispatch_seconds, Measured)


def available(monkeypatch, size: int) -> None:
    class Memory:
        available = size

    monkeypatch.setattr(limits.psutil, "virtual_memory", Memory)


def test_buffers_are_far_larger_than_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(limits, "last_level_cache", lambda: 2**26)
    available(monkeypatch, 2**36)
    assert limits.sizes(CPU).buffer_bytes == 8 * 2**26
    available(monkeypatch, 2**29)
    assert "last-level cache" in limits.sizes(CPU).reason


def test_the_last_level_cache_is_the_largest(tmp_path):
    for index, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert limits.last_level_cache(tmp_path) == 32 * 2**20
    assert limits.last_level_cache(tmp_path / "nowhere") is None


# The machine file


def some_limits() -> Limits:
    return limits.measure(CPU, work=TINY, clock=Clock(1))


def test_describing_a_machine_again_keeps_its_limits(tmp_path):
    description = machine.describe(CPU)
    measured = description.model_copy(update={"limits": some_limits()})
    machine.update(tmp_path, measured)
    assert machine.update(tmp_path, description) == measured
    assert machine.limits(tmp_path) == measured.limits


def test_new_limits_stand_in_for_old_ones(tmp_path):
    description = machine.describe(CPU)
    machine.update(tmp_path, description.model_copy(update={"limits": some_limits()}))
    faster = limits.measure(CPU, work=TINY, clock=Clock(0.25))
    machine.update(tmp_path, description.model_copy(update={"limits": faster}))
    assert machine.limits(tmp_path) == faster


def test_limits_of_another_machine_are_not_taken_over(tmp_path):
    description = machine.describe(CPU)
    other = description.model_copy(update={"id": "other", "limits": some_limits()})
    machine.update(tmp_path, other)
    assert machine.update(tmp_path, description).limits is None


def test_the_name_of_a_machine_does_not_depend_on_its_limits(tmp_path):
    before = machine.describe(CPU)
    machine.update(tmp_path, before.model_copy(update={"limits": some_limits()}))
    assert machine.describe(CPU).id == before.id


def test_a_machine_file_from_before_there_were_limits_is_read(tmp_path):
    old = machine.describe(CPU).model_dump(mode="json", exclude={"limits"})
    (tmp_path / machine.FILE).write_text(json.dumps(old))
    assert machine.limits(tmp_path) is None


def test_no_file_no_limits(tmp_path):
    assert machine.limits(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"id": 3}', '{"limits": NaN}'])
def test_a_broken_machine_file_is_named_when_read_and_replaced_when_written(tmp_path, text):
    path = tmp_path / machine.FILE
    path.write_text(text)
    with pytest.raises(RecordError, match=r"machine\.json"):
        machine.limits(tmp_path)
    machine.update(tmp_path, machine.describe(CPU))
    assert machine.limits(tmp_path) is None


# The command


@pytest.fixture
def quick(monkeypatch) -> None:
    """Measuring and looking at kernels take seconds: not what is tested here."""
    monkeypatch.setattr(limits, "sizes", lambda device: TINY)
    monkeypatch.setattr(doctor, "_kernels", lambda device: [])


def invoke(*words: str):
    app = typer.Typer()
    app.command()(doctor.doctor)
    return CliRunner().invoke(app, ["--device", "cpu", *words])


def test_doctor_says_how_to_measure_and_then_what_was_measured(tmp_path, quick):
    out = ("--out", str(tmp_path))
    assert "doctor --measure" in invoke(*out).stdout
    assert not list(tmp_path.iterdir())
    measured = json.loads(invoke("--measure", "--json", *out).stdout)["limits"]
    (file,) = tmp_path.rglob(machine.FILE)
    assert machine.limits(file.parent).model_dump(mode="json") == measured
    said = invoke(*out).stdout
    assert "copy" in said
    assert "1 CPU thread" in said
    assert "doctor --measure" not in said
