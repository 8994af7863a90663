"""Texts are known by their hash, and an unusable one says what to do."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest

from compresskit.assets import text_path
from compresskit.errors import InputError
from compresskit.text import Text, bos, ids_sha256, load


@pytest.mark.parametrize(("source", "name"), [("embedded", "heldout"), ("calibration",) * 2])
def test_shipped_texts_are_the_files(source, name):
    text = load(source)
    raw = text_path(name).read_bytes()
    assert text.sha256 == hashlib.sha256(raw).hexdigest()
    assert text.bytes == len(raw)


def test_evaluation_text_is_not_the_calibration_text():
    assert load("embedded").sha256 != load("calibration").sha256


def test_a_missing_shipped_text_is_no_reason_to_score_another(monkeypatch, tmp_path):
    monkeypatch.setattr("compresskit.text.text_path", lambda name: tmp_path / name)
    with pytest.raises(InputError, match="Reinstall"):
        load("embedded")


def test_pydoc_names_the_python_it_belongs_to():
    text = load("pydoc")
    assert text.bytes > 400_000
    assert text.source == f"pydoc:{'.'.join(map(str, sys.version_info[:3]))}"


def test_pydoc_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="no pydoc_data"):
        load("pydoc")


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\r\n".encode())
    text = load(str(path))
    assert text.content == "Größe\r\n"
    assert text.facts(3).model_dump() == {
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tokens": 3,
        "bytes": 9,
    }


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("abcö".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 \(byte 3"):
        load(str(path))


@pytest.mark.parametrize("content", ["", " \n\t"])
def test_an_empty_text_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(InputError, match="empty"):
        load(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_what_cannot_be_read_lists_the_choices(tmp_path, name):
    with pytest.raises(InputError, match="datasets:NAME"):
        load(str(tmp_path / name))


def rows(path, column, values):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return f"datasets:{path}"


@pytest.fixture
def dataset_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("dataset_cache")
class TestDatasets:
    @pytest.mark.parametrize("column", ["text", "page", "content"])
    def test_rows_are_joined_by_a_blank_line(self, tmp_path, column):
        source = rows(tmp_path / "rows.jsonl", column, ["one", "", "two"])
        assert load(source).content == "one\n\n\n\ntwo"

    def test_a_folder_has_splits(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        for split in ("train", "test"):
            rows(folder / f"{split}.jsonl", "text", [split])
        assert load(f"datasets:{folder}").content == "test"
        assert load(f"datasets:{folder}::train").content == "train"

    def test_an_unknown_split_is_named(self, tmp_path):
        source = rows(tmp_path / "rows.jsonl", "text", ["one"])
        with pytest.raises(InputError, match="nowhere"):
            load(f"{source}::nowhere")

    def test_a_table_without_text_lists_its_columns(self, tmp_path):
        source = rows(tmp_path / "rows.jsonl", "label", ["one"])
        with pytest.raises(InputError, match=r"no column .* there are label"):
            load(source)

    def test_offline_says_what_to_do(self, monkeypatch):
        import datasets
        import huggingface_hub

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="local folder"):
            load("datasets:nobody/nothing-of-this-name")

    def test_a_name_is_needed(self):
        with pytest.raises(InputError, match="name a data set"):
            load("datasets:")


def tokenizer(bos_id, added):
    return SimpleNamespace(
        bos_id=bos_id, encode=lambda text, special: [*(added if special else ()), 97]
    )


@pytest.mark.parametrize(
    ("bos_id", "added", "found"), [(1, (1,), 1), (1, (), None), (None, (), None), (1, (5,), None)]
)
def test_bos_is_what_the_tokenizer_itself_adds(bos_id, added, found):
    assert bos(tokenizer(bos_id, added)) == found


def test_ids_are_hashed_as_int32_little_endian():
    assert ids_sha256([[1], [258]]) == hashlib.sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).hexdigest()


def test_equal_contents_have_equal_hashes_whatever_their_source():
    assert Text("a", "x").sha256 == Text("b", "x").sha256
