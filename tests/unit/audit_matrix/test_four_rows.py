"""The audit of every lossless speculative method, four rows at a time (see `conftest`)."""

from __future__ import annotations

import pytest

from compresskit import catalogue

from .conftest import MODES, NAMES, SAMPLINGS, asked_for, audited, check_lossless


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_lossless(name, how, mode, benches, shared):
    check_lossless(name, how, mode, 4, benches, shared)


def test_a_lossy_rule_does_not_pass_on_the_same_bench(benches, shared):
    """Negative control: typical acceptance, with greedy answers left out."""
    bench = benches("eager")
    method = catalogue.decode("speculative/ngram", {"draft": 4, "accept": "typical"})
    system = method.apply(bench.bare, bench.context)
    found = audited(system, asked_for(SAMPLINGS["temperature 1"], 4), shared, False)
    assert found.verdict == "lossy"
