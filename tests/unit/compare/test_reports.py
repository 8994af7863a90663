"""A comparison on a terminal, as Markdown, as JUnit XML and as JSON."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from compresskit.compare import compare
from compresskit.report.comparison import document, junit, markdown, terminal, words


@pytest.fixture(scope="module")
def found(bench):
    """One record slower and heavier, one refused, one missing, one new."""
    dense, int8, ngram = (bench.golden(name) for name in ("dense", "int8", "ngram"))
    heavier = bench.memory(bench.later(bench.slower(int8, 2.0)), weights_bytes={"dense": 10**9})
    other = bench.golden("dense-prepacked")
    unlike = other.model_copy(update={"model": other.model.model_copy(update={"revision": "x"})})
    return compare([int8, other, dense], [heavier, unlike, ngram])


def printed(comparison, **options) -> str:
    out = io.StringIO()
    terminal.render(comparison, Console(file=out, width=200), **options)
    return out.getvalue()


def test_the_terminal_shows_what_is_not_the_same(found):
    text = printed(found, gate=True)
    assert "tpot_s" in text
    assert "ttft_s" in text
    assert "parameters" not in text
    assert "1000000000 B" in text
    assert "(--all shows what is the same)" in text
    assert "missing: dense" in text
    assert "refused: dense" in text
    assert "no baseline yet" in text
    assert "parameters" in printed(found, every=True)


def test_a_failure_names_tier_metric_values_and_where_to_look(found):
    row, outcome = next(one for one in found.failures() if one[1].metric == "tpot_s")
    text = words.message(row, outcome)
    assert text.startswith("clocks: tpot_s of quant/int8 is worse: base 2")
    assert "change 2.00x" in text
    assert "allowed factor 1.25" in text
    assert "p = 0.00016 of 8 and 8" in text
    assert text.endswith("Look at the decode step.")


def test_reasons_for_no_comparison_are_said_once(bench):
    base = bench.golden("int8")
    new = bench.later(bench.slower(base, 3.0, waited=0.6))
    sentences = list(words.unjudged(compare([base], [new])))
    assert len(sentences) == len({sentence.split(": ")[-1] for sentence in sentences})
    assert any(s.startswith("not compared: ttft_s, tpot_s, decode_tokens_per_s") for s in sentences)


def test_long_tables_are_cut_after_their_failures(found, monkeypatch):
    monkeypatch.setattr(terminal, "MOST_LINES", 1)
    text = printed(found)
    assert "more lines: --all shows them" in text
    assert "more lines" not in printed(found, every=True)
    lines = words.lines(found, every=True)
    cut = words.shorten(lines, 2)
    assert {line.verdict for line in cut} <= {"worse", "changed"}
    assert len(cut) == 2


# What Jenkins' junit-10.xsd allows: attributes, required attributes and children per element.
SCHEMA = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, set(), {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id"},
        {"name", "tests", "failures", "errors"},
        {"testcase", "properties", "system-out"},
    ),
    "testcase": (
        {"name", "classname", "time"},
        {"name"},
        {"failure", "skipped", "system-out"},
    ),
    "failure": ({"type", "message"}, set(), set()),
    "skipped": ({"type", "message"}, set(), set()),
    "system-out": (set(), set(), set()),
}


def test_junit_keeps_to_the_common_schema(found):
    root = ElementTree.fromstring(junit.render(found, title="check"))
    assert root.tag == "testsuites"
    for element in root.iter():
        allowed, required, children = SCHEMA[element.tag]
        assert required <= set(element.keys()) <= allowed
        assert {child.tag for child in element} <= children


def test_junit_has_a_case_per_record_and_metric(found):
    root = ElementTree.fromstring(junit.render(found, title="check"))
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["records", "exact", "quality", "clocks"]
    for suite in suites.values():
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    names = [case.get("name") for case in suites["clocks"].findall("testcase")]
    assert len(set(names)) == len(names)
    failed = {
        case.get("name") for case in root.iter("testcase") if case.find("failure") is not None
    }
    assert {"weights_bytes", "tpot_s"} <= failed
    messages = [failure.get("message") for failure in suites["clocks"].iter("failure")]
    assert any(message.startswith("clocks: tpot_s of quant/int8 is worse") for message in messages)
    kinds = {failure.get("type") for failure in suites["records"].iter("failure")}
    assert kinds == {"incomparable", "missing"}


def test_a_report_of_identical_records_has_no_failure(bench):
    record = bench.golden("int8")
    same = compare([record], [record])
    assert "<failure" not in junit.render(same, title="check")
    assert "passed" in markdown.render(same, title="check", passed=True)
    assert document.render(same, passed=True)["failures"] == []


def test_control_characters_from_a_file_reach_neither_xml_nor_terminal(bench):
    record = bench.golden("int8")
    evil = record.model_copy(update={"kernels": {"op\x1b[2J": "x\x00"}, "label": "a\x07<b>"})
    found = compare([record], [evil])
    text = junit.render(found, title="\x00")
    ElementTree.fromstring(text)
    assert not {"\x00", "\x07", "\x1b"} & set(text + printed(found))


def test_markdown_is_a_table_and_sentences(found):
    text = markdown.render(found, title="check ci", passed=False)
    assert text.startswith("### check ci: **failed**\n")
    assert "| record | metric | base | new | change | verdict | reason |" in text
    assert "- clocks: tpot\\_s of quant/int8 is worse" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}


def test_json_holds_every_outcome_in_full(found):
    rendered = json.loads(json.dumps(document.render(found, passed=False), allow_nan=False))
    assert rendered["format"] == "compresskit.comparison/1"
    outcomes = {one["metric"]: one for one in rendered["rows"][0]["outcomes"]}
    assert outcomes["parameters"]["verdict"] == "same"
    assert outcomes["tpot_s"]["ratio"]["value"] == pytest.approx(2.0)
    assert outcomes["tpot_s"]["n_new"] == 8
    assert [len(rendered[key]) for key in ("refused", "only_base", "only_new")] == [1, 1, 1]


def test_equal_labels_are_told_apart(bench):
    first = bench.golden("int8")
    spec = first.spec.replace(seed=1)
    second = first.model_copy(update={"spec": spec, "digest": spec.digest()})
    names = words.names(compare([first, second], [first, second]))
    assert names[first.digest] == f"quant/int8 #{first.digest[:6]}"
    assert len(set(names.values())) == 2
