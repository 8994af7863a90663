"""Live tensors, against sequences of operations whose bytes can be counted by hand."""

from __future__ import annotations

import torch

from compresskit.measure.memory.activations import LiveTensors, allocated_peak


def test_new_tensors_count_until_their_last_view_is_gone():
    weight = torch.ones(100, 100)
    live = LiveTensors()
    with live:
        turned = weight.t()
        assert live.live == 0  # a view of what was there
        first = weight + 1
        assert live.live == 40_000
        part = first[3:]
        first.add_(1)
        assert live.live == 40_000  # neither views nor operations in place hold anything new
        del first
        assert live.live == 40_000
        del part
        assert live.live == 0
    assert (live.peak, live.operations) == (40_000, 2)
    assert turned.shape == (100, 100)


def test_the_peak_holds_old_and_new_at_once_as_a_growing_cache_does():
    rows = torch.ones(1000)
    live = LiveTensors()
    with live:
        held = torch.cat((rows, rows))
        held = torch.cat((held, rows))
    assert live.live == 12_000
    assert live.peak == 20_000
    live.begin()
    assert live.peak == 12_000
    del held
    assert live.live == 0  # also when switched off


def test_what_an_operation_returns_in_parts_is_one_storage():
    live = LiveTensors()
    with live:
        left, right = torch.ones(10, 8).chunk(2, dim=1)
        values, places = torch.ones(1000).topk(4)
    assert live.live == 10 * 8 * 4 + 4 * 4 + 4 * 8
    assert left.shape == right.shape
    assert values.shape == places.shape


def test_high_marks_are_told_at_the_start_and_when_they_rise_by_much():
    told = []
    live = LiveTensors(lambda: told.append(live.live))
    with live:
        small = torch.ones(10)
        more = torch.ones(20)
        large = torch.ones(1 << 20)
        larger = torch.ones(1 << 10)
    assert told == [40, 40 + 80 + (4 << 20)]
    assert len((small, more, large, larger)) == 4


def test_the_allocators_peak_counts_what_was_alive_at_once():
    def work():
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second * 2
        del second
        return third

    # Beside two tensors the scalars that torch makes of 1 and 2.
    assert 8000 <= allocated_peak(work) < 8100
