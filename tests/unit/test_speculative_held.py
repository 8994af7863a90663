"""Bytes of a drafter's tables: counted once each, as Python and torch hold them."""

from __future__ import annotations

import sys

import torch

from compresskit.methods.speculative._draft import Draft, EachRow, memory_bytes
from compresskit.methods.speculative._held import held_bytes


def test_containers_count_with_what_is_in_them():
    numbers = [100_000, 100_001]
    each = [sys.getsizeof(number) for number in numbers]
    assert held_bytes(numbers) == sys.getsizeof(numbers) + sum(each)
    table = {(numbers[0], numbers[1]): numbers[1]}
    key = next(iter(table))
    assert held_bytes(table) == sys.getsizeof(table) + sys.getsizeof(key) + sum(each)


def test_what_occurs_twice_counts_once():
    shared = list(range(1000, 1100))
    assert held_bytes(shared, shared) == held_bytes(shared)
    assert held_bytes([shared, shared]) < 2 * held_bytes(shared)
    matrix = torch.zeros(10, 10)
    assert held_bytes([matrix, matrix[2:]]) - held_bytes([None, None]) >= 400 - sys.getsizeof(None)
    assert held_bytes(matrix, matrix[2:], matrix.T) == 400


def test_rows_add_up_and_one_that_is_silent_leaves_the_sum_unknown():
    class Row:
        def observe(self, tokens):
            pass

        def draft(self, limit):
            return Draft([])

    class Telling(Row):
        def memory_bytes(self):
            return 7

    assert memory_bytes(EachRow([Telling(), Telling()])) == 14
    assert memory_bytes(EachRow([Telling(), Row()])) is None
    assert memory_bytes(Row()) is None
