"""Cost curves: a filled cache is what a prefill would leave, and the words follow from the numbers."""

from __future__ import annotations

import pytest
import torch

from compresskit.curve import document, measure
from compresskit.curve.fill import filled, shapes
from compresskit.curve.measure import Point
from compresskit.errors import Conflict
from compresskit.hf.cache import cache_bytes
from compresskit.methods.kv.int8 import Int8Cache
from compresskit.methods.kv.kivi import Kivi
from compresskit.methods.kv.none import NoCache
from compresskit.methods.kv.quest import Quest
from compresskit.methods.kv.snapkv import SnapKV
from compresskit.report.plot import curve as picture

ARCHITECTURES = ("llama", "gemma3_text", "gpt_neox", "gpt2", "mixtral")


def prefilled(system, tokens):
    cache = system.new_cache(tokens)
    with torch.inference_mode():
        system.step(torch.arange(tokens).remainder(300).unsqueeze(0), cache)
    return cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_fill_has_the_bytes_shapes_and_types_of_a_prefill(lab, architecture):
    system = lab.system(architecture)
    ours, real = filled(system, 40, 64), prefilled(system, 40)
    assert cache_bytes(ours) == cache_bytes(real)
    assert ours.get_seq_length() == real.get_seq_length() == 40
    for mine, theirs in zip(ours.layers, real.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert mine.values.dtype is theirs.values.dtype
    assert cache_bytes(filled(system, 41, 64)) != cache_bytes(real)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "method",
    [Int8Cache(), Kivi(group=8, residual=8), SnapKV(ratio=0.5, window=4), Quest(budget=16, page=4)],
    ids=lambda method: type(method).__name__,
)
def test_decoding_goes_on_from_a_fill(lab, architecture, method):
    system = method.apply(lab.system(architecture), None)
    cache = filled(system, 40, 64)
    assert cache.get_seq_length() == 40
    with torch.inference_mode():
        logits = system.step(torch.tensor([[5]]), cache)
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 41


def test_an_evicting_cache_keeps_what_its_rule_says(lab):
    system = SnapKV(ratio=0.75, window=4).apply(lab.system("llama"), None)
    cache = filled(system, 40, 64, batch=3)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {10}
    assert {layer.keys.shape[0] for layer in cache.layers} == {3}
    dense = filled(lab.system("llama"), 40, 64, batch=3)
    assert 4 * cache_bytes(cache)["keys_values"] == cache_bytes(dense)["keys_values"]


def test_a_cache_without_rows_is_refused(lab):
    with pytest.raises(Conflict, match="Leave the method out"):
        filled(NoCache().apply(lab.system("llama"), None), 40, 64)


def test_shapes_are_those_of_key_value_heads(lab):
    (first, *_) = shapes(lab.system("llama"))
    assert first.keys == first.values == (2, 8)


def test_every_row_takes_every_turn(lab):
    system = lab.system("llama")
    points = measure.at_length({"dense": system, "b": system}, 16, rounds=3, batch=1, seed=0)
    assert [len(point.seconds) for point in points.values()] == [3, 3]
    assert all(second > 0 for point in points.values() for second in point.seconds)
    assert points["b"].cache_bytes == points["dense"].cache_bytes


def made(dense, other, held=(100, 25)):
    """An entry from two constant times, with a little spread."""
    spread = [1 + 0.001 * index for index in range(10)]
    points = {
        "dense": Point(tuple(dense * one for one in spread), {"keys_values": held[0]}),
        "x": Point(tuple(other * one for one in spread), {"codes": held[1]}),
    }
    return document.entry(points, {"dense": 1000, "x": 900})


def test_the_verdict_and_the_break_even_follow_from_the_times():
    lengths = {
        512: made(1.0, 1.2),
        1024: made(1.0, 1.0),
        2048: made(1.0, 0.8),
        4096: made(1.0, 0.5),
    }
    assert [lengths[n]["x"]["verdict"] for n in lengths] == ["worse", "same", "better", "better"]
    assert document.break_even(lengths, "x") == "between 1,024 and 2,048 tokens"
    assert document.break_even({512: made(1.0, 0.5)}, "x") == "at 512 or less"
    # Better once and worse later is no length from which it pays.
    lengths[8192] = made(1.0, 1.2)
    assert document.break_even(lengths, "x") == "not up to 8,192 tokens"


def test_the_batch_that_fits_is_weights_and_caches():
    row = made(1.0, 1.0)["x"]
    assert document.reachable_batch(row, batch=1, memory=1000) == 4
    assert document.reachable_batch(row, batch=2, memory=1000) == 8
    assert document.reachable_batch(row, batch=1, memory=800) == 0


def test_the_picture_names_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    facts = {"model": "m", "device": "d", "threads": 1, "dtype": "float32"}
    found = document.document(
        {512: made(1.0, 1.2), 1024: made(1.0, 0.5)},
        ["dense", "x"],
        facts=facts,
        batch=1,
        memory=2000,
    )
    assert found["reachable_batch_estimated"]["x"] == {"512": 44, "1024": 44}
    picture.draw(found, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
