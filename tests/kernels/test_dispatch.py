"""Choosing an implementation, and the record of what ran."""

import pytest
import torch
from compresskit_kernels import dispatch, host
from compresskit_kernels.int8_matmul import OP, Int8Weight, int8_matmul

WEIGHT = Int8Weight(torch.ones(4, 8, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16))
needs_fast = pytest.mark.skipif(not host.has_int8_pack(), reason="no packed product on this CPU")


@pytest.fixture(autouse=True)
def clean_record():
    dispatch.reset()
    yield
    dispatch.reset()


def test_an_explicit_choice_is_taken():
    assert dispatch.choose(OP, torch.ones(1, 8), WEIGHT, "reference").name == "reference"


def test_an_explicit_choice_that_cannot_run_raises():
    with pytest.raises(ValueError, match=r"'cpu' cannot take float64 .* it needs .* 'auto'"):
        dispatch.choose(OP, torch.ones(1, 8, dtype=torch.float64), WEIGHT, "cpu")
    with pytest.raises(ValueError, match="CUDA device"):
        dispatch.choose(OP, torch.ones(1, 8), WEIGHT, "dequantised")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        LookupError, match=r"'tritn'.*auto, .*native, cpu, .*dequantised, reference"
    ):
        dispatch.choose(OP, torch.ones(1, 8), WEIGHT, "tritn")


def test_integers_have_no_implementation():
    with pytest.raises(ValueError, match="nothing supports int64"):
        dispatch.choose(OP, torch.ones(1, 8, dtype=torch.int64), WEIGHT)


def test_nothing_ran_before_something_ran():
    assert dispatch.used() == {}
    dispatch.choose(OP, torch.ones(1, 8), WEIGHT).prepare(WEIGHT)
    assert dispatch.used() == {}


@needs_fast
def test_the_record_names_the_branches_that_ran():
    int8_matmul(torch.ones(1, 8), WEIGHT, impl="cpu")
    assert dispatch.used() == {"int8_matmul": ("cpu: _weight_int8pack_mm bf16",)}
    int8_matmul(torch.ones(100, 8), WEIGHT, impl="cpu")
    assert len(dispatch.used()["int8_matmul"]) == 2
    dispatch.reset()
    int8_matmul(torch.ones(1, 8), WEIGHT, impl="reference")
    assert dispatch.used() == {"int8_matmul": ("reference: dequantise float32",)}


def test_automatic_takes_the_first_that_can(monkeypatch):
    x = torch.ones(1, 8)
    able = [way.name for way in OP.implementations if way.supports(x, WEIGHT)]
    assert dispatch.choose(OP, x, WEIGHT).name == able[0]
    assert dispatch.choose(OP, x.double(), WEIGHT).name == "reference"


def test_a_wish_holds_for_every_choice_of_its_block():
    x = torch.ones(1, 8)
    before = dispatch.choose(OP, x, WEIGHT).name
    with dispatch.forced("reference"):
        assert dispatch.choose(OP, x, WEIGHT).name == "reference"
        with dispatch.forced("auto"):
            assert dispatch.choose(OP, x, WEIGHT).name == before
    assert dispatch.choose(OP, x, WEIGHT).name == before
    with pytest.raises(LookupError, match="tritn"), dispatch.forced("tritn"):
        dispatch.choose(OP, x, WEIGHT)
