"""The proof that a fast path engaged: operators of one step, and a verdict on dense ones in disguise."""

import pytest
import torch
from compresskit_kernels import dispatch
from compresskit_kernels.native import build

from compresskit.measure import engagement
from compresskit.measure.passes import Bench
from compresskit.spec import ProtocolSpec, SamplingSpec, WorkloadSpec


def profile(opened):
    system = opened.system
    prompts = [system.tokenizer.encode("the cat sat on the mat and the dog")[:8]]
    bench = Bench(
        system=system,
        prompts=prompts,
        workload=WorkloadSpec(prompt_tokens=8, new_tokens=6),
        protocol=ProtocolSpec(repeats=1, warmups=0),
        sampling=SamplingSpec(),
        seed=0,
        tick=lambda *_: None,
    )
    with torch.inference_mode():
        return engagement.profiled_step(bench)


def test_a_dense_model_calls_as_many_products_as_it_has_layers(open_stack):
    with open_stack() as opened:
        seen = profile(opened)
    assert seen["dense_products"] == seen["dense_layers"] > 0
    assert ["aten.linear", seen["dense_products"]] in seen["operators"]


@pytest.mark.skipif(not build.available(), reason=build.reason())
def test_packed_layers_call_none(open_stack):
    with open_stack("quant/int4") as opened:
        seen = profile(opened)
    assert seen["dense_products"] == seen["dense_layers"] == 0
    assert seen["routines"]["grouped_matmul"] == ["native: packed codes x int16"]


def test_a_layer_that_dequantises_is_found_out(open_stack):
    """Negative control: an un-engaged kernel."""
    with dispatch.forced("reference"), open_stack("quant/int4") as opened:
        seen = profile(opened)
    assert seen["dense_products"] > seen["dense_layers"] == 0


def test_experts_are_layers_too(open_stack):
    with open_stack(model="tiny:moe") as opened:
        dense = profile(opened)
    assert dense["dense_products"] <= dense["dense_layers"]
    with dispatch.forced("reference"), open_stack("quant/int4", model="tiny:moe") as opened:
        assert profile(opened)["dense_products"] > profile(opened)["dense_layers"]
