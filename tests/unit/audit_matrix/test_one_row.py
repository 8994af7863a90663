"""The audit of every lossless speculative method, one row at a time (see `conftest`)."""

from __future__ import annotations

import pytest

from .conftest import MODES, NAMES, SAMPLINGS, check_lossless


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_lossless(name, how, mode, benches, shared):
    check_lossless(name, how, mode, 1, benches, shared)


def test_methods_are_found():
    assert "speculative/ngram" in NAMES
