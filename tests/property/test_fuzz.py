"""Damaged and made-up input: nothing but our own errors comes out of specs, records and importers.

The cases are those of `benchmarks/fuzz.py`, which runs them for as long as one likes.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from benchmarks import fuzz
from compresskit.errors import CompressKitError

KINDS = fuzz.kinds()
SEEDS = st.integers(0, 2**63)
# A quarter of a second a case would be a hang here; hypothesis' own deadline would flake under load.
FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", sorted(KINDS))
@FEW
@given(seed=SEEDS)
def test_damaged_input_is_accepted_or_refused_in_words(name, tmp_path, seed):
    fuzz.run_one(KINDS[name], seed, tmp_path)


@pytest.mark.parametrize("name", sorted(KINDS))
@settings(FEW, max_examples=30)
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_are_accepted_or_refused_in_words(name, tmp_path, data):
    kind = fuzz.Kind(lambda dice: data, KINDS[name].read)
    fuzz.run_one(kind, 0, tmp_path)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_cases_are_neither_all_good_nor_all_bad(name, tmp_path):
    """The negative control: damage is damage, and some of it leaves the input readable."""
    outcomes = {fuzz.run_one(KINDS[name], seed, tmp_path) for seed in range(80)}
    assert outcomes == {True, False}


def test_a_foreign_error_would_be_seen(tmp_path):
    def broken(data, folder):
        raise KeyError("spec")

    with pytest.raises(KeyError):
        fuzz.run_one(fuzz.Kind(lambda dice: b"", broken), 0, tmp_path)


def test_an_error_without_words_would_be_seen(tmp_path):
    def mute(data, folder):
        raise CompressKitError("")

    with pytest.raises(AssertionError, match="without a sentence"):
        fuzz.run_one(fuzz.Kind(lambda dice: b"", mute), 0, tmp_path)


def test_a_seed_gives_the_same_case():
    for kind in KINDS.values():
        assert kind.make(random.Random(7)) == kind.make(random.Random(7))
