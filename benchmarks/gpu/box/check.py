"""Is everything right before anything is timed: the tests that need a GPU, and the machine's limits.

    pytest -m gpu tests/gpu     junit.xml, and a summary.json of it: passed, failed, skipped and why
    compresskit doctor --measure        copying, multiplying, launching: the machine file of the records

On a GPU a test that is skipped has checked nothing, and none passed at all is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from compresskit.cli import doctor

if TYPE_CHECKING:
    from benchmarks.gpu.box.job import Job

ROOT = Path(__file__).resolve().parents[3]
TESTS = "tests/gpu"


@dataclass(frozen=True)
class Summary:
    """What a run of the tests came to."""

    passed: int
    failed: tuple[str, ...]
    """Names of those that failed or broke down."""
    skipped: dict[str, int]
    """Reason -> how many tests gave it."""

    def fault(self, *, is_dry: bool) -> str | None:
        """Why the machine must not be trusted yet, if so."""
        if self.failed:
            return f"{len(self.failed)} tests failed: {', '.join(self.failed)}"
        if not self.passed and not is_dry:
            reasons = "; ".join(self.skipped) or "none was collected"
            return f"no test ran on the GPU ({reasons})"
        return None


def read(report: Path) -> Summary:
    """Read pytest's JUnit report."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        elif (why := case.find("skipped")) is not None:
            skipped[why.get("message") or "no reason was given"] += 1
        else:
            passed += 1
    return Summary(passed, tuple(failed), dict(skipped))


def run(job: Job) -> int:
    """Test, measure the limits, print the summary."""
    folder = job.out / "check"
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    try:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", TESTS, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            timeout=job.deadline.left(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {job.minutes:g} minutes", file=sys.stderr)
        return 1
    if not report.is_file():
        print("pytest wrote no report: see its message above", file=sys.stderr)
        return 1
    summary = read(report)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    if not job.is_dry:
        doctor.measure_limits("cuda", 1, job.out)
    print(f"passed {summary.passed}, failed {len(summary.failed)}")
    for reason, count in summary.skipped.items():
        print(f"skipped {count}: {reason}")
    if (fault := summary.fault(is_dry=job.is_dry)) is not None:
        print(f"check: {fault}", file=sys.stderr)
        return 1
    return 0
