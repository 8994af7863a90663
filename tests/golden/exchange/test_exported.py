"""Exports and the tables of imported results stay the same, byte for byte.

`pytest tests/golden --regolden` rewrites `exported/`; look at the diff before committing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.exchange import formats, table

HERE = Path(__file__).parent
RECORDS = HERE.parent / "records" / "v2"
NAMES = ("dense", "int8", "ngram")


def check(path: Path, text: str, *, regolden: bool) -> None:
    if regolden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(formats.EXPORTERS))
def test_an_export_stays_the_same(name, regolden):
    records = [store.load(RECORDS / f"synthetic-{one}.json") for one in NAMES]
    exporter = formats.exporter(name)
    text = exporter.render(records[:1] if exporter.one_run else records)
    check(HERE / "exported" / f"{name}{exporter.suffix}", text, regolden=regolden)


def test_the_tables_of_imported_results_stay_the_same(regolden):
    files = {
        "llama-bench.json": "llama-bench",
        "vllm.json": "vllm",
        "lm-eval.json": "lm-eval",
        "mlperf-interactive.txt": "mlperf",
        "mlperf-server.txt": "mlperf",
        "mlperf-offline.txt": "mlperf",
    }
    found = [
        one for name, tool in files.items() for one in formats.read(HERE / "foreign" / name, tool)
    ]
    check(HERE / "exported" / "imported.md", table.markdown(found), regolden=regolden)
    check(HERE / "exported" / "imported.csv", table.csv(found), regolden=regolden)
