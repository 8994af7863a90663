"""Bytes that the tables of a drafter take: Python's containers and torch's tensors alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set

import torch


def held_bytes(*roots: object) -> int:
    """Bytes of what can be reached from `roots` through mappings, sequences and sets.

    As Python and torch hold it: a small integer in a list takes its pointer and its object, objects
    and storages that occur twice count once. Other objects count without what they refer to.
    """
    queue, total = list(roots), 0
    seen: set[int] = set()
    while queue:
        one = queue.pop()
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
            continue
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, Mapping):
            queue += [*one.keys(), *one.values()]
        elif isinstance(one, Sequence | Set) and not isinstance(one, str | bytes):
            queue += list(one)
    return total
