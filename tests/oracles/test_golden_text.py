"""Published-text golden values: SmolLM2-135M on WikiText-2, which is not shipped.

Protocol: the first 8,000 bytes of wiki.test.raw, one window of 512 scored tokens, no BOS. Point
COMPRESSKIT_TEST_DATA at a folder that holds wikitext-2-raw/wiki.test.raw.

The model is the bfloat16 copy of the Q4_1 file; values: torch 2.13 on an x86 CPU.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from compresskit.device import resolve
from compresskit.engines.native import Native
from compresskit.hf import sources
from compresskit.quality.evaluate import evaluate
from compresskit.spec import ModelSpec, QualitySpec

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
IDS_SHA256 = "7ddddae88ea5"
FLOAT32, BFLOAT16 = 3.038321, 3.040620


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = os.environ.get("COMPRESSKIT_TEST_DATA")
    if not folder:
        pytest.skip("needs WikiText-2: set COMPRESSKIT_TEST_DATA")
    raw = (Path(folder) / "wikitext-2-raw" / "wiki.test.raw").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == WIKITEXT_SHA256
    path = tmp_path_factory.mktemp("golden") / "text.txt"
    path.write_bytes(raw[:8000])
    return QualitySpec(text=str(path), protocol="window", tokens=512, window=512, greedy_prompts=0)


def systems(dtype):
    torch.set_num_threads(1)
    source = sources.resolve("pypi:smollm2-135m")
    return Native().open(source.path, ModelSpec(dtype=dtype), resolve("cpu"))


def test_likelihood_and_the_distance_between_two_types(spec):
    with systems("float32") as baseline, systems("bfloat16") as system:
        found = evaluate(
            system,
            baseline,
            spec,
            cache_changed=False,
            batch_allowed=True,
            baseline_digest="0" * 12,
        )
    assert f"ids=sha256:{IDS_SHA256}" in found.likelihood.protocol_id
    assert (found.likelihood.scored_tokens, found.likelihood.scored_bytes) == (512, 1907)
    assert found.likelihood.nll_mean == pytest.approx(BFLOAT16, abs=0.005)
    assert found.fidelity.baseline_nll == pytest.approx(FLOAT32, abs=0.002)
    # The floor below which a KL in bfloat16 says nothing about a method.
    assert 0.0003 < found.fidelity.kl.mean < 0.002
    assert found.fidelity.top1_agreement > 0.97
