"""Caches whose writer was stopped, and caches that were harmed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compresskit.distill.teachers.cache import read, shard
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.online import Online
from compresskit.errors import ModelError, RunError
from compresskit.hf.tiny import random_model

VOCABULARY = 512
ROWS, LENGTH = 11, 9
PLACES = ROWS * (LENGTH - 1)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("form", ["topk:k=5", "draws:n=4"])
def test_a_killed_writer_goes_on_where_it_was(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    form: str,
    written: Any,
    belongs: Any,
    contents: Any,
    same: Any,
) -> None:
    def killed(label: str, done: int, total: int) -> None:
        if done >= 8:  # in the middle of the third shard
            raise _Killed

    told: list[int] = []
    with pytest.raises(_Killed):
        written(tmp_path / "cut", teacher, rows, form, progress=killed)
    kept = {path: path.stat().st_mtime_ns for path in shard.listed(tmp_path / "cut")}
    assert len(kept) == 2
    with pytest.raises(ModelError, match="unfinished, 2 of 4 shards"):
        read.open(tmp_path / "cut", wanted=belongs(rows))
    again = written(
        tmp_path / "cut", teacher, rows, form, progress=lambda _, done, total: told.append(done)
    )
    assert told == [6, 8, 9, 11]
    assert again.kept == 2 and again.tokens_read == 5 * (LENGTH - 1)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole = written(tmp_path / "whole", teacher, rows, form)
    assert whole.kept == 0
    assert same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))
    assert again.manifest.reconstruction == whole.manifest.reconstruction
    # All there: nothing is read again.
    third = written(tmp_path / "cut", teacher, rows, form)
    assert (third.kept, third.tokens_read) == (4, 0)


def test_a_writer_killed_while_it_writes_leaves_no_half_shard(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, contents: Any, same: Any
) -> None:
    """A process of its own, ended by SIGKILL between the bytes of the second shard and its name."""
    script = """
import json, os, pathlib, signal, sys
from safetensors import safe_open
from compresskit.distill.teachers.cache import shard
source, place = map(pathlib.Path, sys.argv[1:])
with safe_open(source, "pt") as file:
    told = shard.Told(**json.loads(file.metadata()["compresskit"]))
    tensors = {name: file.get_tensor(name) for name in file.keys()}
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
shard.write(place, tensors, told)
"""
    written(tmp_path / "whole", teacher, rows, "topk:k=5")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for index in (1, 2, 3):
        shard.path_of(cut, index).unlink()
    ended = subprocess.run(
        [sys.executable, "-c", script, shard.path_of(tmp_path / "whole", 1), shard.path_of(cut, 1)],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [path.name for path in shard.listed(cut)] == ["rows-00000.safetensors"]
    assert len(list(cut.glob(".*.partial"))) == 1
    assert written(cut, teacher, rows, "topk:k=5").kept == 1
    assert not list(cut.glob(".*.partial"))
    assert same(contents(cut), contents(tmp_path / "whole"))


def test_a_full_disk_leaves_the_shards_before_it(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    written: Any,
    belongs: Any,
    batch: Any,
) -> None:
    flushes = []
    real = os.fsync

    def full(descriptor: int) -> None:
        flushes.append(descriptor)
        if len(flushes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(shard.os, "fsync", full)
    # The description of the cache is flushed first, by another module's name for the same function.
    with pytest.raises(RunError, match=r"No space left.*kept.*run the same command again"):
        written(tmp_path, teacher, rows, "topk:k=5")
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock"))
    assert left == ["rows-00000.safetensors", "teacher-cache.json"]
    monkeypatch.undo()
    assert written(tmp_path, teacher, rows, "topk:k=5").kept == 1
    read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, *range(ROWS)))


def test_a_disk_that_is_too_small_is_told_before_the_teacher_reads(
    tmp_path: Path, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, written: Any
) -> None:
    needed = PLACES * parse("topk:k=5").bytes_per_place(VOCABULARY)
    usage = shutil.disk_usage(tmp_path)
    teacher = Online(random_model("llama"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match="are free"):
        written(tmp_path, teacher, rows, "topk:k=5")
    assert teacher.tokens_read == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    written(tmp_path, teacher, rows, "topk:k=5")


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "swap", "text"])
def test_damage_is_refused_and_repaired(
    tmp_path: Path,
    teacher: Online,
    rows: torch.Tensor,
    harm: str,
    written: Any,
    belongs: Any,
    batch: Any,
    contents: Any,
    same: Any,
) -> None:
    written(tmp_path, teacher, rows, "topk:k=5")
    sound = contents(tmp_path)
    path, other = shard.path_of(tmp_path, 1), shard.path_of(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif harm == "gone":
        path.unlink()
    elif harm == "swap":
        path.write_bytes(other.read_bytes())
    else:
        path.write_text("not a shard")
    with pytest.raises(ModelError, match=r"rows-00001\.safetensors.*Delete this file"):
        read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, 3))
    assert written(tmp_path, teacher, rows, "topk:k=5").kept == 3
    assert same(contents(tmp_path), sound)
    read.open(tmp_path, wanted=belongs(rows)).targets(batch(rows, 3))


def test_rows_of_sound_shards_can_be_read_past_a_flipped_byte(
    tmp_path: Path, teacher: Online, rows: torch.Tensor, written: Any, belongs: Any, batch: Any
) -> None:
    """Content is compared when a shard is first used, and only then."""
    written(tmp_path, teacher, rows, "topk:k=5")
    content = bytearray(shard.path_of(tmp_path, 1).read_bytes())
    content[-1] ^= 1
    shard.path_of(tmp_path, 1).write_bytes(content)
    cache = read.open(tmp_path, wanted=belongs(rows))
    cache.targets(batch(rows, 0, 2, 6))
    with pytest.raises(ModelError, match="not what was written"):
        cache.targets(batch(rows, 0, 3))
