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


def peak(work):
    """Most resident megabytes while `work` runs."""
    try:
        CLEAR.write_text("5")  # resets the peak
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    work()
    return kilobytes("VmHWM") / 1024


@pytest.fixture
def wide(lab, bytes_tokenizer):
    class Wide(bytes_tokenizer):
        def decode(self, ids):
            return "x" * len(ids)

    return replace(lab.system("llama", vocabulary=VOCABULARY), tokenizer=Wide(), context=512)


@pytest.mark.parametrize("protocol", ["window", "split"])
def test_peak_does_not_grow_with_the_tokens(wide, tmp_path, protocol):
    path = tmp_path / "text.txt"
    letters = torch.randint(97, 123, (30_000,), generator=torch.Generator().manual_seed(0))
    path.write_bytes(bytes(letters.tolist()))

    def score(windows):
        tokens = 512 * windows if protocol == "window" else 64 * windows
        found = evaluate(
            wide,
            wide,
            QualitySpec(
                text=str(path), protocol=protocol, tokens=tokens, windows=windows, greedy_prompts=0
            ),
            cache_changed=False,
            batch_allowed=True,
            baseline_digest="0" * 12,
        )
        assert found.fidelity.scored_tokens == tokens
        assert found.fidelity.kl.mean == 0

    before = kilobytes("VmRSS") / 1024
    few, many = peak(lambda: score(8)), peak(lambda: score(40))
    assert many - before < 1000
    # Kept, the logits of the 32 further windows would take 3.2 GB (window) or 0.4 GB (split).
    assert many < few + 150
