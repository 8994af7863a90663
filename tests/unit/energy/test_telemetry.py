"""Looks at the machine: what NVML said, what it refused to say, and whose processes they are."""

from __future__ import annotations

import os

import pytest

from compresskit.device import resolve
from compresskit.measure import telemetry
from compresskit.measure.nvml import open_gpus

ME, MOTHER = os.getpid(), os.getppid()


def looked(fake_nvml, world, **entries):
    nvml = fake_nvml(one={"uuid": "GPU-aaaa", **entries})
    gpus = open_gpus(nvml=nvml, uuid_of=lambda ordinal: "GPU-aaaa")
    watch = telemetry.Watch(resolve("cpu"), gpus=gpus, clock=world.clock)
    world.now += 3.0
    watch.look()
    (look,) = watch.seen()
    assert look.seconds == 3.0
    return look.gpus[0]


def test_a_look_tells_clocks_heat_power_and_what_holds_them_down(fake_nvml, world):
    gpu = looked(
        fake_nvml,
        world,
        sm=1980,
        mem=2619,
        temperature=54,
        instant=412.5,
        limit=700_000,
        # Idle, power cap, SW thermal and the user's clocks: two of them mean less speed.
        reasons=0x01 | 0x02 | 0x04 | 0x20,
        power_ns=2_500_000_000,
        thermal_ns=0,
        pids=[ME],
    )
    assert (gpu.sm_clock_mhz, gpu.memory_clock_mhz, gpu.temperature_c) == (1980, 2619, 54)
    assert (gpu.power_watts, gpu.power_limit_watts) == (412.5, 700.0)
    assert gpu.throttle == ("power_cap", "sw_thermal")
    assert gpu.throttled_seconds == {"power": 2.5, "thermal": 0.0}
    assert gpu.foreign_processes == 0
    assert "aaaa" not in gpu.device


def test_what_the_driver_refuses_is_null_and_not_zero(fake_nvml, world):
    gpu = looked(fake_nvml, world)
    assert gpu.model_dump(exclude={"device", "throttle", "throttled_seconds"}) == {
        "sm_clock_mhz": None,
        "memory_clock_mhz": None,
        "temperature_c": None,
        "power_watts": None,
        "power_limit_watts": None,
        "foreign_processes": None,
    }
    assert (gpu.throttle, gpu.throttled_seconds) == ((), {})


class Process:
    def __init__(self, pid):
        self.pid = pid


@pytest.mark.parametrize(
    ("pids", "parents", "foreign"),
    [
        ([ME], {}, 0),
        # The other side of an interleaved session, a child of ours, and the process that began it.
        ([ME, 101, 102, MOTHER], {101: MOTHER, 102: ME}, 0),
        ([ME, 103], {103: 1}, 1),
        # Of another user: it cannot be asked for its parent.
        ([ME, 104], {104: None}, 1),
        # Numbers of another namespace: our own is not among them.
        ([105, 106], {105: 1, 106: 1}, None),
        ([], {}, None),
    ],
)
def test_processes_of_this_session_are_not_foreign(pids, parents, foreign):
    found = telemetry.foreign_processes([Process(pid) for pid in pids], parent=parents.get)
    assert found == foreign


def test_no_list_of_processes_is_no_evidence():
    assert telemetry.foreign_processes(None) is None


def test_the_parent_of_a_process_is_known_unless_it_has_gone():
    assert telemetry._parent(ME) == MOTHER
    assert telemetry._parent(2**22 + 1) is None


def test_the_clock_of_the_cpus_in_use_is_the_median(tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    for cpu in os.sched_getaffinity(0):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text("2500000\n")
    assert telemetry.cpu_mhz(tmp_path) == 2500.0


def test_a_clock_that_is_not_told_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry.psutil, "cpu_freq", lambda: None)
    assert telemetry.cpu_mhz(tmp_path) is None


def test_a_watch_of_a_cpu_or_of_a_gpu_that_cannot_be_asked_has_no_gpus(world):
    for gpus in (None, "no NVML: Driver Not Loaded"):
        watch = telemetry.Watch(resolve("cpu"), gpus=gpus, clock=world.clock)
        watch.look()
        watch.look()
        assert [look.gpus for look in watch.seen()] == [(), ()]
