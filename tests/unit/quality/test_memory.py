"""Scoring many tokens takes time, not memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compresskit.quality.evaluate import evaluate
from compresskit.spec import QualitySpec

VOCABULARY = 49_152  # SmolLM2's: one window of 512 is 100 MB of float32 logits
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.slow


def kilobytes(field):
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0])


def growth(work):
    """Peak resident megabytes of `work` above what was resident before."""
    try:
        CLEAR.write_text("5")  # resets the peak
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) / 1024


@pytest.fixture
def wide(lab, bytes_tokenizer):
    class Wide(bytes_tokenizer):
        def decode(self, ids):
            return "x" * len(ids)

    return replace(lab.system("llama", vocabulary=VOCABULARY), tokenizer=Wide(), context=512)


def test_peak_does_not_grow_with_the_tokens(wide, tmp_path):
    path = tmp_path / "text.txt"
    letters = torch.randint(97, 123, (21_000,), generator=torch.Generator().manual_seed(0))
    path.write_bytes(bytes(letters.tolist()))

    def score(tokens):
        found = evaluate(
            wide,
            wide,
            QualitySpec(text=str(path), tokens=tokens, greedy_prompts=0),
            cache_changed=False,
            batch_allowed=True,
            baseline_digest="0" * 12,
        )
        assert found.fidelity.scored_tokens == tokens
        assert found.fidelity.kl.mean == 0

    score(512)  # what the first pass allocates for good is not the window's
    few, many = growth(lambda: score(1024)), growth(lambda: score(20_480))
    assert many < 1000
    assert many < few + 100
