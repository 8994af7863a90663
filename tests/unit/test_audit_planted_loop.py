"""The audit finds faults of the loop and its cache: prompt lookup on the tiny model, spoilt.

What is wrong here shows only after a rejection, a ragged step or a stop, on a model that minds what
it has read.
"""

from __future__ import annotations

import pytest

from compresskit.audit.answer import loop
from compresskit.audit.conduct import conduct, laws, plainly
from compresskit.audit.document import Asked
from compresskit.hf import slots
from compresskit.methods.speculative import _base, _loop
from compresskit.methods.speculative._rows import Rows
from compresskit.methods.speculative._verify import Verdict, verify


def found_by(audit) -> set[str]:
    return {reason.partition(":")[0] for reason in audit.reasons}


@pytest.fixture(scope="module")
def lookup(open_stack):
    """Audit prompt lookup on the tiny model; a judge of one's own may be put in."""
    with open_stack("speculative/ngram:draft=3") as opened:
        known = {}

        def audited(batch=4):
            asked = Asked(batch=batch, prompts=8, greedy_tokens=20)
            if batch not in known:
                known[batch] = laws(opened.system, asked)
            return conduct(
                loop(opened.system),
                plainly(opened.system),
                asked,
                label="planted",
                model="tiny",
                law=lambda asked: known[batch],
                rule=False,
            )

        yield audited


def test_lookup_as_it_is_passes(lookup):
    found = lookup()
    assert found.verdict == "lossless", found.reasons
    assert found.stops.inside > 10


def bonus_lost(logits, drafts, sampling, generator):
    """The cache is told of the whole draft, and the token behind it is forgotten."""
    return [
        Verdict(v.tokens[:-1], v.path) if v.path and v.accepted == len(d.tokens) else v
        for v, d in zip(verify(logits, drafts, sampling, generator), drafts, strict=True)
    ]


def test_a_lost_bonus_token_is_found(lookup, monkeypatch):
    monkeypatch.setattr(_base, "verify", bonus_lost)
    found = lookup()
    assert found.verdict == "lossy"
    assert "greedy" in found_by(found)


def test_a_cache_that_is_not_rolled_back_is_found(lookup, monkeypatch):
    monkeypatch.setattr(slots, "roll_back", lambda cache, count: None)
    found = lookup(batch=1)
    assert found.verdict == "lossy"
    assert {"sampled", "greedy"} <= found_by(found)


def test_rows_that_change_places_after_a_ragged_step_are_found(lookup, monkeypatch):
    keep = Rows.keep

    def swapped(self, kept):
        keep(self, kept)
        if len({len(places) for places in kept}) > 1:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys.roll(1, 0), layer.values.roll(1, 0)

    monkeypatch.setattr(Rows, "keep", swapped)
    found = lookup()
    assert found.verdict == "lossy"
    assert "greedy" in found_by(found)


def test_a_stop_token_that_is_overrun_is_found(lookup, monkeypatch):
    monkeypatch.setattr(_loop, "_until_stop", lambda tokens, stop: tokens)
    found = lookup()
    assert found.verdict == "lossy"
    assert found_by(found) == {"stops"}
