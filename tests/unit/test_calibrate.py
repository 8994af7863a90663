"""`compresskit calibrate`: live on a replayed A/A session, and on stored records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from compresskit import pairing, store
from compresskit.cli.calibrate import calibrate
from compresskit.errors import Exit, InputError, RunError, UsageError
from compresskit.metrics.noise import QUANTITIES, recorded
from compresskit.record import (
    Arrival,
    Block,
    LatencyPass,
    Passes,
    Record,
    Sample,
    ThroughputPass,
    Turn,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "records" / "v1"

app = typer.Typer()
app.command()(calibrate)


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def sample(ttft: float, step: float, tokens: int = 24, forwards: int | None = None) -> Sample:
    arrivals = (Arrival(ttft, 1), Arrival(ttft + step * (tokens - 1), tokens - 1))
    return Sample(arrivals=arrivals, forwards=forwards or tokens)


def measured(record: Record, ttfts, steps, *, pair: str | None) -> Record:
    """`record` with one block of these speeds; its turns are rounds 0, 1, 2 ..."""
    samples = tuple(map(sample, ttfts, steps))
    shape = {"batch": 1, "prompt_tokens": 64, "new_tokens": 24, "samples": samples}
    block = Block(
        pair=pair,
        turns=tuple(Turn(round=i, position=0, started=float(i)) for i in range(len(samples))),
        started_at="2026-01-01T00:00:00Z",
        passes=Passes(
            latency=LatencyPass(**shape, warmups=samples[:1]), throughput=(ThroughputPass(**shape),)
        ),
    )
    return record.model_copy(update={"blocks": (block,)})


def session(
    specs, *, slowdown: float = 1.0, shared: float = 0.0, own: float = 0.01, seed: int = 0
) -> list[Record]:
    """What `pairing.run` would return: two arms in `repeats` rounds, the second `slowdown` as slow."""
    rng = np.random.default_rng(seed)
    dense = store.load(GOLDEN / "synthetic-dense.json")
    rounds = specs[0].protocol.repeats
    machine = np.exp(rng.normal(0, shared, rounds))
    found = []
    for index, spec in enumerate(specs):
        record = dense.model_copy(update={"spec": spec, "digest": spec.digest()})
        times = np.exp(rng.normal(0, own, (2, rounds))) * machine * (slowdown if index else 1.0)
        found.append(measured(record, 0.1 * times[0], 0.01 * times[1], pair="aa"))
    return found


@pytest.fixture
def replay(monkeypatch):
    """Answer `pairing.run` from `session`; returns the specs that were asked for."""
    asked: list = []

    def install(**options):
        def run(specs, notify=pairing.silent, *, seed=0):
            asked.extend(specs)
            for number in range(specs[0].protocol.repeats):
                notify(0, "round", f"{number + 1}")
            return session(specs, **options)

        monkeypatch.setattr(pairing, "run", run)
        return asked

    return install


def test_a_quiet_machine_tells_equal_arms_apart_from_nothing(replay):
    asked = replay()
    result = invoke("--json", "--trials", "100", "--rounds", "25")
    assert result.exit_code == Exit.DONE
    document = json.loads(result.stdout)
    assert asked[0] == asked[1]
    assert asked[0].protocol.passes == ("latency", "throughput")
    assert asked[0].protocol.repeats == 25
    assert (document["source"], document["drifted"]) == ("A/A session", False)
    for entry in document["quantities"].values():
        assert entry["same_machine"]["verdict"] == "same"
        assert entry["same_machine"]["samples"] == [25, 25]
        assert entry["drawn_from"] == {"count": 25, "what": "rounds of two sides"}
        assert entry["variation"] == pytest.approx(0.01, abs=0.004)
        assert entry["false_alarms"]["value"] <= 0.01
        assert [row["samples"] for row in entry["smallest_effect"]] == [7, 8, 10, 15, 20]
    assert document["advice"] == []
    assert "round 10 of 25" in result.stderr


def test_a_machine_that_favours_one_arm_is_said_loudly(replay):
    replay(slowdown=1.2)
    result = invoke("--trials", "100")
    assert result.exit_code == Exit.INVALID
    assert "equal sides: worse" in result.stdout
    assert "Two equal sides were told apart" in result.stdout
    assert "two equal sides were told apart" in result.stderr


def test_a_noisy_machine_gets_advice(replay):
    replay(own=0.15)
    document = json.loads(invoke("--json", "--trials", "100").stdout)
    assert any("under 5% is quiet" in line for line in document["advice"])
    assert any(
        "to see a slowdown of 10%" in line or "out of sight" in line for line in document["advice"]
    )


def test_a_load_that_both_arms_share_hides_nothing(replay):
    replay(shared=0.15)
    document = json.loads(invoke("--json", "--trials", "100").stdout)
    assert not any("out of sight" in line for line in document["advice"])
    smallest = document["quantities"]["decode"]["smallest_effect"]
    assert {row["samples"]: row["slowdown"] for row in smallest}[10] <= 1.07


def test_too_few_samples_a_side_are_told(replay):
    replay()
    document = json.loads(invoke("--json", "--trials", "100", "--samples", "6").stdout)
    assert "take at least 7" in document["advice"][0]
    assert document["quantities"]["decode"]["smallest_effect"][0] == {
        "samples": 6,
        "slowdown": None,
    }


def test_people_read_a_table(replay):
    replay()
    text = invoke("--trials", "100").stdout
    assert "false alarms 0.0% [0.0%," in text
    assert "Smallest slowdown found in 95 of 100 comparisons" in text
    assert text.splitlines()[0].startswith("A/A session: 2 records (tiny, Synthetic CPU)")


def test_the_document_is_also_written(replay, tmp_path):
    replay()
    result = invoke("--json", "--trials", "100", "--out", str(tmp_path / "deep" / "c.json"))
    assert (tmp_path / "deep" / "c.json").read_text() == result.stdout


def test_an_arm_that_fails_is_an_error(monkeypatch):
    failed = store.load(GOLDEN / "synthetic-failed.json")
    monkeypatch.setattr(pairing, "run", lambda specs, notify, seed: [failed, failed])
    result = invoke("--trials", "100")
    assert isinstance(result.exception, RunError)
    assert "out of memory" in str(result.exception)


def test_stored_records_are_used_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(pairing, "run", lambda *a, **k: pytest.fail("measured"))
    for index, record in enumerate(stored := several(6)):
        (tmp_path / f"{index}.json").write_text(store.dumps(record))
    result = invoke(str(tmp_path), "--json", "--trials", "100")
    document = json.loads(result.stdout)
    assert (document["source"], document["records"]) == ("records", len(stored))
    decode = document["quantities"]["decode"]
    assert decode["same_machine"] is None
    assert decode["drawn_from"] == {"count": 30, "what": "samples"}
    assert any("runs on their own" in line for line in document["advice"])


def several(count: int, *, pair: str | None = None) -> list[Record]:
    """Records of unlike seeds with five samples each; no two share a session unless told to."""
    dense = store.load(GOLDEN / "synthetic-dense.json")
    rng = np.random.default_rng(0)
    found = []
    for seed in range(count):
        spec = dense.spec.replace(seed=seed, workload={"prompt_tokens": 64, "new_tokens": 24})
        times = np.exp(rng.normal(0, 0.02, (2, 5)))
        record = dense.model_copy(update={"spec": spec, "digest": spec.digest()})
        found.append(measured(record, 0.1 * times[0], 0.01 * times[1], pair=pair))
    return found


def test_too_few_records_are_refused_with_a_way_out():
    with pytest.raises(InputError, match="too few to know the noise"):
        raise invoke(str(GOLDEN / "synthetic-dense.json"), "--trials", "100").exception


def test_a_folder_that_is_not_there_is_a_usage_error():
    assert isinstance(invoke("/nothing/here").exception, UsageError)


def test_rounds_of_a_session_are_counted_once_however_many_arms_it_has():
    from compresskit.spec import RunSpec

    spec = RunSpec().replace(protocol={"repeats": 24})
    three = session([spec] * 3)
    found = recorded("decode", three)
    assert (found.series, found.noise.residuals.shape) == (1, (24, 2))


def test_short_sessions_fall_back_to_single_samples():
    found = recorded("decode", several(4, pair="p"))
    assert (found.noise.paired, len(found.noise.residuals)) == (False, 20)


def test_a_prompt_that_speculates_badly_is_no_noise():
    """Decode time is taken per forward pass: unlike numbers of passes, equal speed, no noise."""
    dense = store.load(GOLDEN / "synthetic-dense.json")
    record = measured(dense, [0.1] * 20, [0.01] * 20, pair=None)
    uneven = tuple(
        sample(0.1, 0.01 * (forwards - 1) / 23, forwards=forwards) for forwards in range(4, 24)
    )
    block = record.blocks[0]
    through = block.passes.throughput[0].model_copy(update={"samples": uneven})
    passes = block.passes.model_copy(update={"throughput": (through,)})
    record = record.model_copy(update={"blocks": (block.model_copy(update={"passes": passes}),)})
    assert QUANTITIES["decode"].samples(record) == pytest.approx([0.01] * 20)
    assert recorded("decode", [record]).noise.variation == pytest.approx(0, abs=1e-12)
