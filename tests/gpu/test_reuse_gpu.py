"""The host tier of the prefix store on a real GPU: blocks go to pinned memory and come back."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_went_to_the_host_come_back_unchanged(dtype):
    from compresskit import artefact as artefacts, catalogue
    from compresskit.hf.cache import TOKENS
    from compresskit.spec import ModelSpec, RunSpec

    spec = RunSpec(
        model=ModelSpec(name="tiny", dtype=dtype),
        device="cuda",
        # 2048 bytes a token in float32: room for 8 blocks of 8 on the device at least.
        stack=(catalogue.parse_method("reuse/prefix_block:block=8,capacity=131072,host_capacity=1000000"),),
    )  # fmt: skip
    with artefacts.opened(artefacts.plan(spec)) as opened, torch.inference_mode():
        system = opened.system
        statistics = system.step.store.statistics
        texts = [
            torch.arange(start, start + 120, device="cuda").unsqueeze(0) for start in (5, 150, 300)
        ]
        first = system.new_cache(128)
        system.step(texts[0], first)
        for text in texts[1:]:
            system.step(text, system.new_cache(128))
        again = system.new_cache(128)
        system.step(texts[0], again)
        assert statistics.spilled_tokens > 0
        assert statistics.fetched_tokens > 0
        assert statistics.hit_tokens > 0
        hit = statistics.hit_tokens
        for layer, stored in zip(again.layers, first.layers, strict=True):
            assert layer.keys.is_cuda
            assert layer.keys.shape[TOKENS] == 120
            assert torch.equal(layer.keys[..., :hit, :], stored.keys[..., :hit, :])
            assert torch.equal(layer.values[..., :hit, :], stored.values[..., :hit, :])
