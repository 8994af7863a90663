"""Memory of one process on a GPU, against a fake NVML."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

from compresskit.measure.memory.vram import ProcessVram


class Gpu:
    """Answers with the next list of (process, bytes), the last one for good."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def ask(self, function):
        assert function == "nvmlDeviceGetComputeRunningProcesses"
        now = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return now and [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in now]


ME, OTHER = os.getpid(), os.getpid() + 1


def test_only_our_own_memory_counts():
    assert ProcessVram((Gpu([(OTHER, 900), (ME, 50)]),)).now().value == 50


def test_a_container_hides_us_and_that_is_no_zero():
    for answer, why in (
        ([(OTHER, 900)], "container"),
        ([], "container"),
        ([(ME, None)], "does not tell"),
        (None, "does not list"),
    ):
        with ProcessVram((Gpu(answer),)) as vram:
            found = vram.peak()
        assert found.kind == "unavailable"
        assert why in found.reason


def test_a_machine_without_nvml_says_so():
    with ProcessVram("no NVML: driver not loaded") as vram:
        vram.restart()
        assert "driver not loaded" in vram.peak().reason
        assert "driver not loaded" in vram.now().reason


def test_a_peak_between_two_looks_of_ours_is_caught_by_the_thread():
    high = [(ME, 700)]
    gpu = Gpu([(ME, 50)], high, high, [(ME, 60)])
    with ProcessVram((gpu,)) as vram:
        until = time.monotonic() + 30
        while len(gpu.answers) > 1 and time.monotonic() < until:
            time.sleep(0.005)
        assert vram.peak().value == 700
        vram.restart()
        assert vram.peak().value == 60
    assert vram._thread is None
