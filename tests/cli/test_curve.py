"""`compresskit curve` as a user meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from compresskit.cli.app import app


def call(*words: str):
    return CliRunner().invoke(app, ["curve", *words])


def test_a_curve_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("matplotlib")
    rows = ("--method", "kv/int8", "--method", "quant/int8+kv/kivi:bits=2", "--rounds", "2")
    first = call(*rows, "--lengths", "32,64", "--out", str(tmp_path), "--json")
    assert first.exit_code == 0, first.output
    one = json.loads(first.stdout)
    assert list(one["lengths"]) == ["32", "64"]
    again = call(
        *rows, "--lengths", "32,64,96", "--memory", "1MB", "--out", str(tmp_path), "--json"
    )
    two = json.loads(again.stdout)
    assert {tokens: two["lengths"][tokens] for tokens in ("32", "64")} == one["lengths"]
    assert list(two["lengths"]) == ["32", "64", "96"]
    assert two["rows"] == ["dense", "kv/int8", "quant/int8 + kv/kivi:bits=2"]
    # Another seed is another curve: nothing of this one is kept.
    other = json.loads(
        call(*rows, "--lengths", "32", "--seed", "1", "--out", str(tmp_path), "--json").stdout
    )
    assert list(other["lengths"]) == ["32"]
    assert (tmp_path / "curve.svg").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lengths", "0"), "list numbers of tokens"),
        (("--lengths", "4000"), "context"),
        (("--memory", "lots"), "--memory"),
        (("--method", "kv/none"), "Leave the"),
        (("--method", "kv/int8+kv/int8"), "needs"),
    ],
)
def test_bad_input_is_one_error(words, said):
    done = call("--rounds", "2", *words)
    assert done.exit_code != 0
    assert said in f"{done.output}{done.exception}"
