"""The comparison as JUnit XML, which CI systems show as tests.

A suite per tier, a case per record and metric; one more suite for the records themselves (missing,
refused). The format has no official schema; this keeps to what Jenkins' `junit-10.xsd` allows and
GitLab and GitHub actions read: `failure` and `skipped` with a message, totals on every suite.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, NamedTuple

from compresskit.compare.outcome import TIERS
from compresskit.report.comparison.words import change, message, names, value
from compresskit.report.labels import clean

if TYPE_CHECKING:
    from compresskit.compare import Comparison


class _Case(NamedTuple):
    record: str
    name: str
    failure: str = ""
    kind: str = ""
    skipped: str = ""
    said: str = ""


def render(comparison: Comparison, *, title: str) -> str:
    """Return `comparison` as an XML document, ending in a newline."""
    suites = {"records": _records(comparison)} | {tier: _tier(comparison, tier) for tier in TIERS}
    cases = [case for suite in suites.values() for case in suite]
    root = ElementTree.Element("testsuites", _totals(clean(title), cases))
    for name, found in suites.items():
        if not found:
            continue
        suite = ElementTree.SubElement(root, "testsuite", _totals(name, found))
        suite.set("skipped", str(sum(1 for case in found if case.skipped)))
        for case in found:
            _add(suite, name, case)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _totals(name: str, cases: list[_Case]) -> dict[str, str]:
    failures = sum(1 for case in cases if case.failure)
    return {"name": name, "tests": str(len(cases)), "failures": str(failures), "errors": "0"}


def _add(suite: ElementTree.Element, tier: str, case: _Case) -> None:
    attributes = {"classname": f"{tier}.{case.record}", "name": case.name}
    element = ElementTree.SubElement(suite, "testcase", attributes)
    if case.failure:
        failure = ElementTree.SubElement(
            element, "failure", {"type": case.kind, "message": case.failure}
        )
        failure.text = case.failure
    if case.skipped:
        ElementTree.SubElement(element, "skipped", {"message": case.skipped})
    if case.said:
        ElementTree.SubElement(element, "system-out").text = case.said


def _records(comparison: Comparison) -> list[_Case]:
    refused = [
        _Case(clean(one.label), one.digest, f"refused: {clean(one.reason)}", "incomparable")
        for one in comparison.refused
    ]
    missing = [
        _Case(clean(one.label), one.digest, "in the baseline, and not measured any more", "missing")
        for one in comparison.only_base
    ]
    new = [
        _Case(clean(one.label), one.digest, skipped="no baseline yet")
        for one in comparison.only_new
    ]
    return [*refused, *missing, *new]


def _tier(comparison: Comparison, tier: str) -> list[_Case]:
    called = names(comparison)
    cases = []
    for row, outcome in comparison.outcomes():
        if outcome.tier != tier:
            continue
        record = called[row.new.digest]
        if outcome.failed:
            cases.append(_Case(record, outcome.metric, message(row, outcome), outcome.word))
        elif outcome.word == "not compared":
            cases.append(_Case(record, outcome.metric, skipped=clean(outcome.reason)))
        else:
            both = f"{value(outcome, outcome.base)} -> {value(outcome, outcome.new)}"
            said = f"{outcome.word}: {both} {change(outcome)} {clean(outcome.reason)}"
            cases.append(_Case(record, outcome.metric, said=said.rstrip()))
    return cases
