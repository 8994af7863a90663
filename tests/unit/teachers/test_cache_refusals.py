"""Caches of something else, and requests that a cache cannot answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compresskit.distill.batch import Batch
from compresskit.distill.teachers.cache import read, source
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.write import write
from compresskit.distill.teachers.online import Online
from compresskit.errors import ModelError, RunError, SpecError, UnknownName
from compresskit.hf.tiny import random_model

VOCABULARY = 512
ROWS, LENGTH = 11, 9


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"revision": "r2"}, "another teacher: it holds org/teacher at r1"),
        ({"tokenizer": "u" * 64}, "another tokenizer"),
        ({"data": "0" * 64}, "another training text"),
        ({"length": 16}, "another row length: it holds rows of 9 tokens"),
        ({"rows": 12}, "another number of rows"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    changes: dict[str, Any],
    culprit: str,
    written: Any,
    belongs: Any,
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    with pytest.raises(SpecError, match=culprit):
        read.open(tmp_path, wanted=belongs(rows, **changes))
    # The same revision by another name is the same teacher.
    read.open(tmp_path, wanted=belongs(rows, teacher="/another/path"))


@pytest.mark.parametrize(
    ("form", "options", "culprit"),
    [
        ("topk:k=6", {}, "another format: topk:k=5,store=bfloat16, not topk:k=6"),
        ("draws:n=4", {"seed": 1}, "another seed: 0, not 1"),
    ],
)
def test_a_writer_does_not_mix_caches(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    form: str,
    options: dict[str, Any],
    culprit: str,
    written: Any,
) -> None:
    written(tmp_path, teacher, rows, form if options else "topk:k=5")
    with pytest.raises(SpecError, match=culprit):
        written(tmp_path, teacher, rows, form, **options)


def test_a_writer_does_not_go_on_with_another_teacher_or_text(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    changed = rows.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCABULARY
    with pytest.raises(SpecError, match="another training text"):
        written(tmp_path, teacher, changed, "topk:k=5")
    narrow = Online(random_model("llama", dtype=torch.bfloat16))
    with pytest.raises(SpecError, match="another computation type of the teacher"):
        written(tmp_path, narrow, rows, "topk:k=5")


def test_a_cache_refuses_what_it_cannot_answer(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    with pytest.raises(SpecError, match="no hidden states"):
        read.open(tmp_path, wanted=belongs(rows), states=(1,))
    cache = read.open(tmp_path, wanted=belongs(rows))
    own = Batch(rows[:1], torch.ones(1, LENGTH), torch.tensor([-1]))
    with pytest.raises(SpecError, match="on-policy"):
        cache.targets(own)
    with pytest.raises(SpecError, match="there is no row 11"):
        cache.targets(Batch(rows[:1], torch.ones(1, LENGTH), torch.tensor([ROWS])))
    with pytest.raises(SpecError, match="rows of 9 tokens, the batch has 8"):
        cache.targets(Batch(rows[:1, :-1], torch.ones(1, LENGTH - 1), torch.tensor([0])))


def test_a_folder_without_a_cache_is_refused(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any
) -> None:
    with pytest.raises(ModelError, match="no teacher cache"):
        read.open(tmp_path, wanted=belongs(rows))
    written(tmp_path / "whole", teacher, rows, "topk:k=5")
    described = tmp_path / "whole" / source.FILE
    document = json.loads(described.read_text())
    for text, culprit in (
        ("{", "not the description"),
        ("[]", "no JSON object"),
        (json.dumps({**document, "version": 99}), "newer compresskit"),
        (json.dumps({**document, "format": "top:k=1"}), "not the description"),
    ):
        described.write_text(text)
        with pytest.raises(ModelError, match=culprit):
            read.open(tmp_path / "whole", wanted=belongs(rows))
    described.unlink()
    with pytest.raises(ModelError, match=r"shards but no teacher-cache\.json"):
        written(tmp_path / "whole", teacher, rows, "topk:k=5")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Name another folder"):
        written(tmp_path / "file", teacher, rows, "topk:k=5")


def test_an_edited_description_is_refused(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any
) -> None:
    """A revision that was edited by hand does not turn one teacher's words into another's."""
    written(tmp_path, teacher, rows, "topk:k=5")
    described = tmp_path / source.FILE
    described.write_text(described.read_text().replace('"r1"', '"r2"'))
    with pytest.raises(ModelError, match="a shard of another cache"):
        read.open(tmp_path, wanted=belongs(rows, revision="r2"))


def test_two_writers_do_not_meet(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any
) -> None:
    from filelock import FileLock

    tmp_path.joinpath("cache").mkdir()
    with (
        FileLock(tmp_path / "cache" / ".lock"),
        pytest.raises(RunError, match="another process is writing"),
    ):
        written(tmp_path / "cache", teacher, rows, "topk:k=5")


def test_rows_and_formats_that_cannot_be_kept(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any
) -> None:
    with pytest.raises(SpecError, match="at least two tokens"):
        write(tmp_path, teacher, rows[:, :1], form=parse("topk"), belongs=belongs(rows[:, :1]))
    with pytest.raises(SpecError, match="other rows than those"):
        write(tmp_path, teacher, rows, form=parse("topk"), belongs=belongs(rows, data="0" * 64))
    with pytest.raises(SpecError, match=r"has 512 tokens\. Set k=512 or less"):
        written(tmp_path, teacher, rows, "topk:k=513")
    with pytest.raises(UnknownName, match="topk"):
        parse("topc:k=3")
    with pytest.raises(SpecError, match="less than or equal to 255"):
        parse("draws:n=256")
    broken = Online(random_model("llama", seed=5))
    next(iter(broken.model.parameters())).data.fill_(torch.nan)
    with pytest.raises(RunError, match="not numbers"):
        written(tmp_path / "nan", broken, rows, "topk:k=5")
