"""Records of every schema stay readable: frozen files, values where they belong, clear refusals."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest

from compresskit import migrate, store
from compresskit.errors import RecordError
from compresskit.metrics import METRICS
from compresskit.record import SCHEMA, Measured, Unavailable

TESTS = Path(__file__).parents[1]
RECORDS = TESTS / "golden" / "records"
RESULTS = TESTS.parent / "results"
FROZEN = dict(
    reversed(line.split()) for line in (RECORDS / "SHA256SUMS").read_text().strip().splitlines()
)
V1, V2 = (sorted((RECORDS / version).glob("*.json")) for version in ("v1", "v2"))
ON_DISK = [
    path for path in store.files(RESULTS) if '"schema_version"' in path.read_text("utf-8")[:200]
]


def stem(path: Path) -> str:
    return path.stem


def document(name: str, version: str = "v1") -> dict:
    return json.loads((RECORDS / version / f"synthetic-{name}.json").read_text(encoding="utf-8"))


def test_the_frozen_records_were_not_touched():
    """A file that changes here is a record of some user that would no longer be the same."""
    found = {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*V1, *V2)
    }
    assert found == FROZEN
    assert len(V1) == len(V2) == 8


@pytest.mark.parametrize("path", V1, ids=stem)
def test_a_record_of_schema_1_is_read_as_the_present_one(path):
    record = store.load(path)
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    assert record.schema_version == SCHEMA
    assert record.digest == record.spec.digest()


@pytest.mark.parametrize("path", V2, ids=stem)
def test_a_record_of_schema_2_is_read_back_unchanged(path):
    assert store.dumps(store.load(path)) == path.read_text(encoding="utf-8")


def test_values_of_schema_1_stand_where_they_belong():
    """Numbers copied by hand from `v1/synthetic-int8.json`."""
    record = store.load(RECORDS / "v1" / "synthetic-int8.json")
    (block,) = record.blocks
    passes = block.passes
    assert passes.latency.samples[1].arrivals[0] == (0.1224, 1)
    assert passes.memory.weights_bytes == {
        "packed": 90_000_000,
        "scales": 2_000_000,
        "dense": 20_000_000,
    }
    assert passes.memory.cache_bytes == {"held": 1_155_072}
    assert set(passes.memory.phases) == {"load", "compress", "prefill", "decode"}
    assert passes.memory.phases["compress"].peaks["rss"].value == 224_000_000.0
    assert passes.memory.phases["decode"].peaks["rss"].value == 140_000_000.0
    (window,) = passes.energy.generate
    assert (window.reading.kind, window.reading.value, window.tokens) == ("estimated", 120.0, 400)
    assert record.quality.fidelity.kl.mean == 0.0015
    assert METRICS["kv_bytes_per_token"].value(record).value == 24_576
    assert METRICS["peak_bytes"].value(record).value == 168_000_000.0


def test_what_schema_1_did_not_measure_is_absent():
    record = store.load(RECORDS / "v1" / "synthetic-dense.json")
    (block,) = record.blocks
    assert (block.pair, block.turns, block.telemetry) == (None, (), ())
    assert block.passes.memory.moved_bytes is None
    assert block.passes.memory.phases["load"].parts == {}
    assert block.passes.energy.idle is None
    assert block.passes.energy.prefill[0].tick_seconds is None
    assert record.quality.likelihood.window_nll == ()
    assert (record.limits, record.prices) == (None, None)
    assert record.setup.calibration_tokens is None
    assert record.blocks[0].passes.latency.samples[0].tokens_sha256 is None


def test_records_of_schema_2_hold_what_is_new():
    record = store.load(RECORDS / "v2" / "synthetic-int8.json")
    (block,) = record.blocks
    assert block.pair == store.load(RECORDS / "v2" / "synthetic-dense.json").blocks[0].pair
    assert [turn.round for turn in block.turns] == list(range(8))
    assert block.turns[0].yardstick == 0.01
    assert len(block.passes.latency.samples) == len(block.turns)
    window = block.passes.energy.generate[0]
    assert (window.ticks, window.tick_seconds, window.scope) == (100, 0.1, "package")
    assert isinstance(window.domains["dram"], Measured)
    assert block.telemetry[1].gpus[0].temperature_c == 40.0
    assert record.quality.fidelity.window_tokens == (2048, 2048)
    assert record.limits.copy_bytes_per_second.value == 2e10
    other = store.load(RECORDS / "v2" / "synthetic-ngram.json").blocks[0].passes.energy
    assert all(isinstance(one.reading, Unavailable) for one in other.generate)


@pytest.mark.parametrize("path", ON_DISK, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_published_record_still_loads(path):
    assert store.load(path).status in ("ok", "skipped", "failed")


def test_there_are_published_records():
    assert len(ON_DISK) >= 20


def test_upgrading_leaves_the_argument_alone():
    before = document("int8")
    kept = copy.deepcopy(before)
    after = migrate.upgrade(before)
    assert before == kept
    assert after["schema_version"] == SCHEMA


def test_a_present_document_is_returned_as_it_is():
    present = document("int8", "v2")
    assert migrate.upgrade(present) == present


@pytest.mark.parametrize("version", [SCHEMA + 1, 0, -1, True, 1.0, "1", None, [1]])
def test_a_schema_that_nobody_knows_is_refused(version):
    with pytest.raises(RecordError, match="this version reads 1 to"):
        migrate.upgrade({**document("dense"), "schema_version": version})


def test_a_missing_step_is_named():
    with pytest.raises(RecordError, match="no way from schema 1 to 2 is known"):
        migrate.upgrade(document("dense"), steps={})


def _passes(d: dict) -> dict:
    return d["blocks"][0]["passes"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(blocks={"0": {}}), "blocks"),
        (lambda d: d.update(blocks=["block"]), r"blocks\.0"),
        (lambda d: d["blocks"][0].update(passes=[1]), r"blocks\.0\.passes"),
        (lambda d: _passes(d).update(memory="much"), r"passes\.memory"),
        (lambda d: _passes(d)["memory"].update(cache_bytes={"held": 1}), "cache_bytes"),
        (lambda d: _passes(d)["memory"].pop("cache_bytes"), "cache_bytes"),
        (lambda d: _passes(d)["memory"].update(peaks=[1]), "peaks"),
        (lambda d: _passes(d)["energy"].update(prefill=[{}]), r"energy\.prefill"),
        (lambda d: _passes(d)["energy"].pop("generate"), r"energy\.generate"),
        (lambda d: _passes(d).update(energy=3), r"passes\.energy"),
    ],
)
def test_content_of_another_schema_is_refused_with_its_place(change, place):
    """Half migrated by hand, or broken: no KeyError, no TypeError."""
    broken = document("int8")
    change(broken)
    with pytest.raises(RecordError, match=place + " is not as schema 1 has it"):
        migrate.upgrade(broken)


def test_a_half_migrated_file_is_one_clear_error(tmp_path):
    """Content of schema 2 under the number 1, signed as the tool would."""
    mixed = {**document("int8", "v2"), "schema_version": 1}
    mixed["checksum"] = store.checksum(mixed)
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(mixed), encoding="utf-8")
    with pytest.raises(RecordError, match=r"mixed\.json: blocks.*not as schema 1 has it\. Delete"):
        store.load(path)
