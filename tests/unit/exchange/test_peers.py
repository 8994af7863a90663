"""Peers on disk and in tables: marked, checked, apart from our rows."""

from __future__ import annotations

import csv
import io
import json

import jsonschema
import pytest
from rich.console import Console

from compresskit.errors import RecordError, UsageError
from compresskit.exchange import formats, peers, table
from compresskit.exchange.peers import Peer
from compresskit.record import Measured
from compresskit.units import Unit

from .conftest import FOREIGN, RECORDS

FILES = {
    "llama-bench.json": "llama-bench",
    "vllm.json": "vllm",
    "lm-eval.json": "lm-eval",
    "mlperf-server.txt": "mlperf",
}


@pytest.fixture
def every() -> list[Peer]:
    return [one for name, tool in FILES.items() for one in formats.read(FOREIGN / name, tool)]


def test_peers_survive_storing(every, tmp_path):
    paths = peers.save(every, tmp_path / "imported")
    assert all(path.name.endswith(".peer.json") for path in paths)
    assert len(set(paths)) == len(every)
    assert [peers.load(path) for path in paths] == every
    # Importing the same file again adds nothing.
    assert peers.save(every, tmp_path / "imported") == paths
    found, warnings = peers.find([tmp_path])
    assert warnings == []
    assert {one.model_dump_json() for one in found} == {one.model_dump_json() for one in every}


def test_numbers_stored_under_a_former_name_are_found(every, tmp_path):
    rate = Measured(value=0.25, unit=Unit.RATIO, source="imported: vllm")
    former = every[0].model_copy(update={"metrics": {"acceptance_rate": rate}})
    (path,) = peers.save([former], tmp_path)
    assert peers.load(path).metrics == {"draft_acceptance_rate": rate}


def test_an_edited_peer_is_refused(every, tmp_path):
    (path, *_) = peers.save(every[:1], tmp_path)
    document = json.loads(path.read_text())
    document["metrics"]["prefill_tokens_per_s"]["value"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="checksum does not match"):
        peers.load(path)
    found, warnings = peers.find([tmp_path])
    assert found == []
    assert "left out" in warnings[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "NaN", '{"format": "compresskit.peer/2"}', '{"a": 1e999}']
)
def test_what_is_no_peer_is_refused(tmp_path, text):
    path = tmp_path / "x.peer.json"
    path.write_text(text)
    with pytest.raises(RecordError):
        peers.load(path)


def test_a_record_is_no_peer():
    with pytest.raises(RecordError, match="not an imported result"):
        peers.load(RECORDS / "synthetic-dense.json")


def test_a_missing_path_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        peers.find([tmp_path / "none"])


def test_what_a_person_adds_is_marked(every):
    (one,) = peers.describe(every[-1:], label=None, model="llama2-70b", device="8xMI325X")
    assert (one.model, one.device, one.label) == ("llama2-70b", "8xMI325X", "PySUT Server")
    assert one.given == ("device", "model")
    assert every[-1].given == ()


def test_stored_peers_obey_the_schema(every):
    schema = Peer.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for one in every:
        jsonschema.Draft202012Validator(schema).validate(json.loads(peers.dumps(one)))


def test_every_metric_has_a_unit_and_a_meaning(every):
    for one in every:
        for name, reading in one.metrics.items():
            assert reading.unit == peers.unit_of(name)
    named = {name for one in every for name in one.metrics}
    assert set(table.definitions(every)) == named


def printed(found, width: int) -> str:
    out = io.StringIO()
    table.rich(found, Console(file=out, width=width, color_system=None, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_is_cut_on_a_narrow_terminal(every, width):
    text = printed(every, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("29523", "8.40 ms", "119", "0.100 ± 0.10", "130"):
        assert number in text


def test_tools_stand_apart_and_are_not_ranked(every):
    sections = list(table.sections(every))
    assert [section.heading.split()[2] for section in sections] == [
        "llama-bench", "vllm", "lm-eval", "mlperf",
    ]  # fmt: skip
    assert all("not compared" in section.heading for section in sections)
    assert not any("ratio" in column for section in sections for column in section.columns)
    # The order is that of the files, whatever the numbers say.
    slow_first = [every[1], every[0]]
    assert next(table.sections(slow_first)).rows[0][0] == "tg128"


def test_an_invalid_result_shows_no_number(every):
    invalid = every[-1].model_copy(update={"verdict": "INVALID"})
    text = table.markdown([invalid])
    assert "INVALID" in text
    assert "29523" not in text
    assert "29523" in table.markdown(every[-1:])


def test_names_are_never_markup():
    (one,) = formats.read(FOREIGN / "vllm.json", "vllm")
    one = one.model_copy(update={"label": "[red]x[/red]|*y*"})
    assert "[red]x[/red]|*y*" in printed([one], 120)
    assert r"\|\*y\*" in table.markdown([one])


def test_csv_has_a_line_per_number(every):
    rows = list(csv.DictReader(io.StringIO(table.csv(every))))
    assert len(rows) == sum(len(one.metrics) + len(one.stated) for one in every)
    (acc,) = [row for row in rows if row["name"] == "acc,none"]
    assert (acc["value"], acc["stderr"], acc["tool"]) == ("0.1", "0.1", "lm-eval")


def test_nothing_to_show_is_nothing():
    assert table.markdown([]) == ""
    assert table.document([]) == []
