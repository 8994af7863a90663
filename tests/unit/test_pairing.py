"""Arms take turns in shuffled rounds; one that dies leaves the others alone; sessions fit memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from compresskit import pairing, runner, sweep
from compresskit.catalogue import parse_method
from compresskit.pairing import Arm
from compresskit.spec import ProtocolSpec, RunSpec

if TYPE_CHECKING:
    from compresskit.record import Record
    from compresskit.runner import Go

DENSE = RunSpec(device="cpu", protocol=ProtocolSpec(repeats=8))


def with_method(text: str, spec: RunSpec = DENSE) -> RunSpec:
    return spec.replace(stack=[parse_method(text).model_dump(mode="json")])


INT8, INT4, KV = with_method("quant/int8"), with_method("quant/int4"), with_method("kv/int8")


class FakeChild:
    """Remembers its turns in one list that all children share."""

    taken: ClassVar[list[tuple[str, Go]]] = []
    pairs: ClassVar[list[str | None]] = []
    dies_at: ClassVar[dict[str, int]] = {}
    alive: ClassVar[int] = 0

    def __init__(self, spec: RunSpec, notify: Any, *, pair: str | None, speed_only: bool) -> None:
        self.spec = spec
        self.dead = False
        self.pairs.append(pair)

    def __enter__(self) -> FakeChild:
        type(self).alive += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.dead:
            type(self).alive -= 1
        self.dead = True

    def ready(self) -> bool:
        return self.dies_at.get(self.spec.digest(), 1) >= 0

    def turn(self, go: Go) -> bool:
        self.taken.append((self.spec.digest(), go))
        return self.dies_at.get(self.spec.digest(), 99) > go.round

    def finish(self) -> Record:
        return runner.failed(self.spec, "a fake")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    monkeypatch.setattr(pairing, "Child", FakeChild)
    monkeypatch.setattr(pairing, "LONGEST_GAP", 0.0)
    FakeChild.taken, FakeChild.pairs, FakeChild.dies_at, FakeChild.alive = [], [], {}, 0
    return FakeChild


def test_every_round_holds_one_turn_of_every_arm(fake: type[FakeChild]) -> None:
    pairing.run([DENSE, INT8, INT4])
    for number in range(8):
        turns = fake.taken[3 * number : 3 * number + 3]
        assert {go.round for _, go in turns} == {number}
        assert [go.position for _, go in turns] == [0, 1, 2]
        assert {digest for digest, _ in turns} == {s.digest() for s in (DENSE, INT8, INT4)}
    orders = {tuple(d for d, _ in fake.taken[3 * n : 3 * n + 3]) for n in range(8)}
    assert len(orders) > 1, "the order within a round is shuffled"
    assert fake.alive == 0


def test_the_order_follows_the_seed(fake: type[FakeChild]) -> None:
    runs = []
    for seed in (0, 0, 1):
        fake.taken = []
        pairing.run([DENSE, INT8, INT4], seed=seed)
        runs.append(fake.taken)
    assert runs[0] == runs[1] != runs[2]


def test_arms_share_a_pair_and_one_alone_has_none(fake: type[FakeChild]) -> None:
    pairing.run([DENSE, DENSE])
    assert len(set(fake.pairs)) == 1
    assert fake.pairs[0] is not None
    pairing.run([DENSE])
    assert fake.pairs[-1] is None


def test_an_arm_that_dies_leaves_the_session(fake: type[FakeChild]) -> None:
    fake.dies_at = {INT8.digest(): 2}
    found = pairing.run([DENSE, INT8])
    assert [d for d, _ in fake.taken].count(INT8.digest()) == 3
    assert [d for d, _ in fake.taken].count(DENSE.digest()) == 8
    assert [record.digest for record in found] == [DENSE.digest(), INT8.digest()]


def test_an_arm_that_cannot_start_takes_no_turn(fake: type[FakeChild]) -> None:
    fake.dies_at = {INT8.digest(): -1}
    pairing.run([DENSE, INT8])
    assert INT8.digest() not in {d for d, _ in fake.taken}


def planned(specs: list[RunSpec], done: set[str] | None = None, **options: Any) -> Any:
    options = {"paired": True, "resident": 3, **options}
    return [
        [(arm.spec.label(), arm.speed_only) for arm in arms]
        for arms in sweep.sessions(specs, frozenset(done or set()), **options)
    ]


def test_sessions_hold_the_dense_row_and_what_fits_beside_it() -> None:
    assert planned([DENSE, INT8, INT4, KV]) == [
        [("dense", False), ("quant/int8", False), ("quant/int4", False)],
        [("dense", True), ("kv/int8", False)],
    ]


def test_a_kept_dense_row_is_measured_once_more_beside_new_variants() -> None:
    done = {DENSE.digest(), INT8.digest()}
    assert planned([DENSE, INT8, KV], done) == [[("dense", True), ("kv/int8", False)]]
    assert planned([DENSE, INT8], done) == []


def test_unlike_workloads_are_not_in_one_session() -> None:
    longer = DENSE.replace(workload={"prompt_tokens": 99})
    assert planned([DENSE, longer]) == [[("dense", False)], [("dense", False)]]


def test_single_runs_stay_possible() -> None:
    assert planned([DENSE, INT8], paired=False) == [[("dense", False)], [("quant/int8", False)]]


class Deaf:
    """A watcher that remembers nothing."""

    def begin(self, index: int, total: int, label: str) -> None:
        pass

    def phase(self, phase: str, detail: str = "") -> None:
        pass

    def end(self, record: Record, *, reused: bool) -> None:
        pass


def test_a_repeat_appends_its_block_and_a_failed_one_changes_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.record import Block, Passes

    def record(status: str, pair: str) -> Record:
        block = Block(pair=pair, started_at="2026-01-01T00:00:00Z", passes=Passes())
        return runner.failed(DENSE, "").model_copy(update={"status": status, "blocks": (block,)})

    outcomes = iter([record("ok", "a"), record("ok", "b"), record("failed", "c")])

    def session(arms: list[Arm], notify: Any, *, seed: int) -> Any:
        yield 0, next(outcomes)
        for index, arm in enumerate(arms[1:], 1):
            yield index, runner.failed(arm.spec, "a fake").model_copy(update={"status": "ok"})

    monkeypatch.setattr(sweep.pairing, "session", session)
    specs = [DENSE, INT8, INT4, KV]
    swept = sweep.run(specs, suite="s", out=tmp_path, resume=False, watcher=Deaf(), resident=2)
    assert [block.pair for block in swept.records[0].blocks] == ["a", "b"]
    assert swept.records[0].status == "ok"
