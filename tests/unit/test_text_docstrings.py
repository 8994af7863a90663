"""The text `docstrings`: long, always there, in a fixed order, and apart from the other texts."""

from __future__ import annotations

import ast
import sys

import pytest

from compresskit import text as texts
from compresskit.errors import InputError
from compresskit.text import load


def paragraphs(source):
    return {part.strip() for part in load(source).content.split("\n\n") if len(part) > 100}


def test_there_is_a_megabyte_of_it_and_it_names_its_python():
    text = load("docstrings")
    assert 1_000_000 < text.bytes < 1_200_000
    assert text.source == f"docstrings:{'.'.join(map(str, sys.version_info[:3]))}"
    assert ast.get_docstring(ast.parse(ast.__loader__.get_source("ast"))) in text.content


@pytest.mark.parametrize("other", ["embedded", "calibration", "pydoc"])
def test_it_shares_no_paragraph_with_the_other_texts(other):
    own = paragraphs("docstrings")
    assert len(own) > 2000
    assert not own & paragraphs(other)


def test_files_come_in_order_and_each_docstring_once(monkeypatch, tmp_path):
    long = "A sentence that is long enough to count as prose and not as a label."
    (tmp_path / "b.py").write_text(f'"""{long} b"""\ndef f():\n    """{long} c"""\n')
    (tmp_path / "a.py").write_text(f'"""{long} a"""\nclass C:\n    """Too short."""\n')
    (tmp_path / "c.py").write_text(f'"""{long} a"""\n"a bad escape: \\d"\n')
    (tmp_path / "d.py").write_text('"""not Python at all')
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(f'"""{long} {folder}"""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert texts._docstrings.__wrapped__() == "\n\n".join(f"{long} {end}" for end in "abc")


def test_an_installation_without_sources_says_what_to_use(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "zipped"))
    with pytest.raises(InputError, match="no sources of the standard library"):
        texts._docstrings.__wrapped__()
