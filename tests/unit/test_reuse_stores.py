"""The two stores as bookkeeping: which tokens are found, what goes first when room is needed.

No tensor and no model: a store gives out slot numbers. The order of vLLM's free queue is the example
of its documentation ("Automatic Prefix Caching", section Example).
"""

from __future__ import annotations

import random

import pytest

from compresskit.methods.reuse._blocks import BlockPool, BlockStore, chain, root
from compresskit.methods.reuse._host import HostTier
from compresskit.methods.reuse._radix import RadixStore
from compresskit.replay.play import Stopwatch

MODEL = "model"


def put(store, tokens, salt="") -> tuple[int, list[int]]:
    """One request: tokens found, and the slots written."""
    written: list[int] = []
    match = store.lookup(tokens, salt)
    store.extend(match, written.extend)
    store.release(match)
    return match.length, written


def found(store, tokens, salt="") -> int:
    match = store.lookup(tokens, salt)
    store.release(match)
    return match.length


class Memory:
    """Contents of device blocks and host places."""

    def __init__(self) -> None:
        self.device: dict[int, object] = {}
        self.host: dict[int, object] = {}

    def spill(self, block: int, place: int) -> None:
        self.host[place] = self.device[block]

    def fetch(self, place: int, block: int) -> None:
        self.device[block] = self.host[place]


def test_the_documented_example_of_vllm():
    """Blocks of 4 tokens, 10 of them; three requests."""
    first, second, third = (
        list(range(15)),
        [*range(10), 90, 91, 92, 93],
        [*range(12), *range(50, 67)],
    )
    # Request 0 decodes a token into block 3, and one more into a new block.
    first_grown = [*first, 15, 16]
    begin = root(MODEL, "")
    pool = BlockPool(10)

    def take(count: int) -> list[int]:
        return [pool.allocate().block for _ in range(count)]

    def hits(tokens: list[int]) -> list[int]:
        blocks = []
        for key in chain(tokens, 4, begin):
            if (block := pool.find(key)) is None:
                break
            blocks.append(block)
        return blocks

    def name(blocks: list[int], tokens: list[int]) -> None:
        for block, key in zip(blocks, chain(tokens, 4, begin), strict=False):
            pool.name(block, key)

    assert hits(first) == []
    one = take(4)
    name(one, first)
    assert one == [0, 1, 2, 3]
    assert len(pool.block_of) == 3
    one += take(1)
    name(one, first_grown)
    assert one == [0, 1, 2, 3, 4]
    assert len(pool.block_of) == 4

    two = hits(second)
    assert two == [0, 1]  # 8 of its 14 tokens: the third block agrees in 2 of 4
    for block in two:
        pool.touch(block)
    two += take(2)
    name(two, second)
    assert two == [0, 1, 5, 6]

    pool.free(one)
    pool.free(two)
    assert list(pool.queue) == [7, 8, 9, 4, 3, 2, 6, 5, 1, 0]

    three = hits(third)
    assert three == [0, 1, 2]  # 12 of its 29 tokens
    for block in three:
        pool.touch(block)
    assert list(pool.queue) == [7, 8, 9, 4, 3, 6, 5]
    three += take(5)
    assert three == [0, 1, 2, 7, 8, 9, 4, 3]
    # Block 3 was still findable, and is not any more.
    assert hits(first_grown) == [0, 1, 2]


def test_the_block_store_finds_full_blocks_only():
    store = BlockStore(10, 4, MODEL)
    assert put(store, list(range(15))) == (0, [0, 1, 2])
    assert found(store, [*range(10), 90, 91, 92, 93]) == 8
    assert found(store, [*range(12), *range(50, 67)]) == 12
    assert found(store, list(range(12))) == 12
    assert found(store, list(range(11))) == 8
    assert found(store, [0, 1, 2]) == 0
    assert found(store, []) == 0


def test_the_radix_store_finds_every_token():
    store = RadixStore(100, MODEL)
    assert put(store, list(range(15)))[0] == 0
    assert found(store, [*range(10), 90, 91]) == 10
    assert found(store, list(range(15))) == 15
    assert found(store, list(range(30))) == 15
    assert found(store, [7]) == 0
    assert found(store, []) == 0


def test_an_edge_that_is_split_keeps_its_slots():
    store = RadixStore(100, MODEL)
    _, slots = put(store, list(range(10)))
    assert put(store, [0, 1, 2, 3, 70, 71])[0] == 4
    match = store.lookup(list(range(10)))
    assert match.slots == slots
    store.release(match)


@pytest.mark.parametrize(
    "make", [lambda n: BlockStore(n, 2, MODEL), lambda n: RadixStore(2 * n, MODEL)]
)
def test_salts_are_apart(make):
    store = make(20)
    put(store, [1, 2, 3, 4], salt="a")
    assert found(store, [1, 2, 3, 4], salt="a") == 4
    assert found(store, [1, 2, 3, 4], salt="b") == 0
    assert found(store, [1, 2, 3, 4]) == 0


def test_a_key_stands_for_everything_before_it():
    """Same block, other parent: another key. Nor can parts of the root pass for one another."""
    begin = root(MODEL, "")
    first, second = list(chain([1, 2, 3, 4], 2, begin)), list(chain([9, 2, 3, 4], 2, begin))
    assert not set(first) & set(second)
    assert list(chain([1, 2, 3, 4, 5], 2, begin)) == first
    # Ids are not read as digits in a row, nor is the salt as the end of the identity.
    assert list(chain([12, 3], 2, begin)) != list(chain([1, 23], 2, begin))
    assert root("ab", "c") != root("a", "bc")
    assert root("a", "") != root("b", "")


def test_the_key_is_sha256_of_parent_and_ids():
    """The independent source is hashlib over the bytes written down by hand."""
    import hashlib

    begin = root("m", "")
    assert begin == hashlib.sha256((1).to_bytes(8, "little") + b"m" + bytes(8)).digest()
    block = (258).to_bytes(8, "little") + (7).to_bytes(8, "little")
    assert list(chain([258, 7], 2, begin)) == [hashlib.sha256(begin + block).digest()]


def test_the_least_recently_used_block_goes_first_and_the_end_of_a_prompt_before_its_start():
    store = BlockStore(4, 1, MODEL)
    put(store, [1, 2])
    put(store, [3, 4])
    assert found(store, [1, 2]) == 2  # used again
    put(store, [5])
    assert found(store, [3, 4]) == 1
    assert found(store, [1, 2]) == 2
    assert store.statistics.evicted_tokens == 1


def test_the_least_recently_used_leaf_goes_first():
    store = RadixStore(6, MODEL)
    put(store, [1, 2, 3])
    put(store, [1, 2, 4])
    put(store, [7, 8])
    assert store.stored_tokens == 6
    found(store, [1, 2, 3])
    put(store, [9])
    assert found(store, [1, 2, 4]) == 2  # its leaf went, what it shares stays
    assert found(store, [1, 2, 3]) == 3
    assert found(store, [7, 8]) == 2
    assert store.statistics.evicted_tokens == 1


def test_a_parent_without_children_can_go_too():
    store = RadixStore(4, MODEL)
    put(store, [1, 2, 3])
    put(store, [1, 2, 4])
    put(store, [5, 6, 7, 8])
    assert found(store, [5, 6, 7, 8]) == 4
    assert found(store, [1, 2]) == 0


@pytest.mark.parametrize("make", [lambda: BlockStore(3, 2, MODEL), lambda: RadixStore(6, MODEL)])
def test_a_prompt_longer_than_the_store_is_stored_as_far_as_it_fits(make):
    store = make()
    assert put(store, list(range(20)))[0] == 0
    assert found(store, list(range(20))) == 6
    # What it has found is held: longer prompts do not push it out to store their own ends.
    put(store, list(range(20)))
    assert found(store, list(range(20))) == 6
    assert store.statistics.evicted_tokens == 0


@pytest.mark.parametrize("make", [lambda: BlockStore(9, 2, MODEL), lambda: RadixStore(18, MODEL)])
def test_rows_that_could_not_be_written_are_not_found(make):
    store = make()

    def fail(slots):
        raise MemoryError

    match = store.lookup([1, 2, 3, 4])
    with pytest.raises(MemoryError):
        store.extend(match, fail)
    store.release(match)
    assert found(store, [1, 2, 3, 4]) == 0
    assert store.stored_tokens == 0
    assert put(store, list(range(18)))[1] != []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["block", "host", "radix"])
def test_what_is_found_is_what_was_written(kind, seed):
    """Against a plain account of what each slot holds: no slot serves a text that is not its own."""
    rng = random.Random(seed)
    memory = Memory()
    unit = 1 if kind == "radix" else 2
    if kind == "radix":
        store = RadixStore(24, MODEL)
    else:
        host = HostTier(5, memory) if kind == "host" else None
        store = BlockStore(12, unit, MODEL, host)
    hits = 0
    for _ in range(400):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(12))]
        salt = rng.choice(["", "s"])
        match = store.lookup(tokens, salt)
        assert match.length <= len(tokens)
        assert len(set(match.slots)) == len(match.slots)
        for place, slot in enumerate(match.slots):
            assert memory.device[slot] == (salt, tuple(tokens[: (place + 1) * unit]))
        hits += match.length
        known = match.length // unit

        def write(slots, known=known, salt=salt, tokens=tokens):
            for place, slot in enumerate(slots, start=known):
                memory.device[slot] = (salt, tuple(tokens[: (place + 1) * unit]))

        store.extend(match, write)
        store.release(match)
        assert store.stored_tokens <= store.slots * unit
    assert hits > 100
    assert store.statistics.evicted_tokens > 0
    assert (store.statistics.fetched_tokens > 0) == (kind == "host")


def test_the_account_above_notices_a_slot_given_away_too_early():
    """Negative control: without holding, a prompt's own prefix is overwritten by its end."""
    memory: dict[int, tuple[int, ...]] = {}

    class Forgetful(BlockStore):
        def lookup(self, tokens, salt=""):
            match = super().lookup(tokens, salt)
            self.pool.free(match.slots)
            return match

        def release(self, match):
            match.slots = []

    store = Forgetful(2, 1, MODEL)

    def request(tokens):
        match = store.lookup(tokens)
        for place, slot in enumerate(match.slots):
            assert memory[slot] == tuple(tokens[: place + 1])
        known = match.length

        def write(slots):
            for place, slot in enumerate(slots, start=known):
                memory[slot] = tuple(tokens[: place + 1])

        slots = list(match.slots)
        store.extend(match, write)
        for place, slot in enumerate(slots):
            assert memory[slot] == tuple(tokens[: place + 1])
        store.pool.free(match.slots[known:])

    request([1, 2])
    with pytest.raises(AssertionError):
        request([1, 3, 4])


def test_evicted_blocks_come_back_from_the_host():
    memory = Memory()
    store = BlockStore(2, 1, MODEL, HostTier(4, memory))

    def request(tokens):
        match = store.lookup(tokens)

        def write(slots):
            for place, slot in enumerate(slots, start=match.length):
                memory.device[slot] = tuple(tokens[: place + 1])

        store.extend(match, write)
        contents = [memory.device[slot] for slot in match.slots]
        store.release(match)
        return match.length, contents

    request([1, 2])
    request([3, 4])
    assert store.statistics.spilled_tokens == 2
    assert request([1, 2]) == (2, [(1,), (1, 2)])
    assert store.statistics.fetched_tokens == 2
    # The two that made room went to the host in turn.
    assert request([3, 4]) == (2, [(3,), (3, 4)])
    # Without a host tier they would be gone.
    bare = BlockStore(2, 1, MODEL)
    put(bare, [1, 2])
    put(bare, [3, 4])
    assert found(bare, [1, 2]) == 0


def test_the_stopwatch_times_lookups_and_changes_nothing():
    ticks = iter([1.0, 1.5, 7.0, 7.25])
    store = Stopwatch(BlockStore(4, 2, MODEL), now=lambda: next(ticks))
    assert put(store, [1, 2, 3]) == (0, [0])
    assert found(store, [1, 2, 3]) == 2
    assert store.seconds == 0.75
    assert store.stored_tokens == 2
