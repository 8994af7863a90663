"""NVML's counters over a fake `pynvml`: which GPUs, which calls, and every way to be refused."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch

from compresskit.device import resolve
from compresskit.measure.energy import counters
from compresskit.measure.energy.counters import Null
from compresskit.measure.energy.counters.nvml import Nvml, NvmlPower, open_nvml
from compresskit.measure.energy.turns import ordinals
from compresskit.measure.nvml import torch_uuid

UUIDS = ("GPU-aaaa", "GPU-bbbb")


def opened(nvml, which=(0,)):
    return open_nvml(which, nvml=nvml, uuid_of=lambda ordinal: UUIDS[ordinal])


def board(uuid="GPU-aaaa", **entries):
    return {"uuid": uuid, "millijoules": 5_000, "instant": 300.0, **entries}


def test_the_counter_is_in_joules_and_names_no_board(fake_nvml):
    counter = opened(fake_nvml(one=board(millijoules=1_234_567)))
    assert isinstance(counter, Nvml)
    assert counter.parts() == (1234.567,)
    assert counter.watts() == 300.0
    assert (counter.source, counter.scope) == ("nvml_counter", "gpu")
    assert counter.devices == (hashlib.sha256(b"GPU-aaaa").hexdigest()[:12],)


def test_torchs_number_leads_to_the_board_by_its_uuid_not_by_nvmls_number(fake_nvml):
    # torch's cuda:0 is NVML's second board, as under CUDA_VISIBLE_DEVICES=1.
    nvml = fake_nvml(first=board("GPU-bbbb", millijoules=1), second=board(millijoules=2_000))
    assert opened(nvml).parts() == (2.0,)


def test_all_gpus_of_the_run_are_read(fake_nvml):
    nvml = fake_nvml(
        one=board(millijoules=1_000, instant=100.0),
        two=board("GPU-bbbb", millijoules=2_000, instant=50.0),
    )
    counter = opened(nvml, (0, 1))
    assert counter.parts() == (1.0, 2.0)
    assert counter.watts() == 150.0
    assert len(set(counter.devices)) == 2


def test_a_gpu_that_stops_answering_leaves_no_partial_sum(fake_nvml):
    nvml = fake_nvml(one=board(), two=board("GPU-bbbb"))
    counter = opened(nvml, (0, 1))
    nvml.boards["two"].update(millijoules=None, instant=None)
    assert counter.parts() is None
    assert counter.watts() is None
    assert "did not answer" in counter.reason()


def test_the_average_power_stands_in_for_the_instant_one(fake_nvml):
    counter = opened(fake_nvml(one=board(instant=None, average=280.0)))
    assert counter.watts() == 280.0


def test_a_field_that_failed_is_no_power(fake_nvml):
    """The call succeeds and the value is rubbish: only the field's own return code tells."""
    assert opened(fake_nvml(one=board(instant=None))).watts() is None


def test_power_is_integrated_where_the_counter_is_missing(fake_nvml):
    counter = opened(fake_nvml(one=board(millijoules=None)))
    assert isinstance(counter, NvmlPower)
    assert not counter.cumulates
    assert counter.source == "nvml_power_integral"
    assert counter.answers()
    assert counter.parts() is None


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"mig": 1}, "MIG is on"),
        ({"millijoules": None, "instant": None}, "neither energy nor power"),
    ],
)
def test_a_gpu_without_an_energy_of_its_own_is_refused(fake_nvml, entries, reason):
    assert reason in opened(fake_nvml(one=board(**entries)))


def test_mig_that_is_off_is_no_reason_to_refuse(fake_nvml):
    assert isinstance(opened(fake_nvml(one=board(mig=0))), Nvml)


def test_a_mig_slice_has_no_board(fake_nvml):
    refused = open_nvml(nvml=fake_nvml(one=board()), uuid_of=lambda ordinal: "MIG-1234")
    assert "MIG is on" in refused


def test_a_missing_driver_is_a_reason(fake_nvml):
    nvml = fake_nvml()
    nvml.driver = False
    assert "Shared Library Not Found" in opened(nvml)


def test_a_board_that_nvml_does_not_know_is_a_reason(fake_nvml):
    assert "cuda:0" in opened(fake_nvml(other=board("GPU-cccc")))


def test_without_a_gpu_torch_tells_no_uuid(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if torch.version.cuda is not None:
        pytest.skip("this torch may see a GPU")
    assert torch_uuid(0) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-42/1/0")
    assert torch_uuid(0) == "MIG-42/1/0"


def test_the_real_library_says_why_there_is_no_counter():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert "no NVML" in open_nvml()
    else:
        pytest.skip("there is an NVIDIA driver here")


def test_every_gpu_that_holds_a_parameter_is_metered():
    def placed(*devices):
        return SimpleNamespace(
            parameters=lambda: [SimpleNamespace(device=torch.device(name)) for name in devices]
        )

    assert ordinals(placed("cuda:0", "cuda:2", "cpu", "cuda:2")) == (0, 2)
    assert ordinals(placed("cpu")) == (0,)
    assert ordinals(object()) == (0,)


def test_this_machine_has_a_counter_or_a_reason():
    counter = counters.find(resolve("cpu"))
    if isinstance(counter, Null):
        assert counter.parts() is None
        assert not counter.answers()
        assert counter.reason()
    else:
        assert counter.answers()
