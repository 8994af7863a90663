"""A training that is killed goes on as if nothing had happened, and nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from compresskit.distill import checkpoint, curve as curves, state as states
from compresskit.distill.curve import Curve
from compresskit.distill.progress import Silent, Stride
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train
from compresskit.distill.trainer import Interrupted
from compresskit.errors import ModelError, RunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 12
RECIPE: dict[str, Any] = {
    "student": "layers:blocks=[0]",
    "data": "calibration",
    "held_out_rows": 2,
    "length": 16,
    "batch": 2,
    "accumulate": 2,
    "rate": 0.003,
    "budget": f"{STEPS} steps",
    "check_every": 0.25,
    "save_every": "2 steps",
    "precision": "float32",
}


class Killed(BaseException):
    """As sudden as a signal: nothing of ours catches it."""


class Killer(Silent):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, stride: Stride) -> None:
        if stride.step == self.last:
            raise Killed


def recipe(**changes: Any) -> Recipe:
    return Recipe.decode({**RECIPE, **changes}, where="test")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The curve without its clock."""
    found = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(recipe(), folder)
    return folder


def same(folder: Path, whole: Path) -> bool:
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, whole))
    return (
        lines(folder) == lines(whole)
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


@pytest.mark.parametrize("every", [1, 3])
def test_killed_again_and_again_the_curve_and_the_weights_are_the_same(
    whole: Path, tmp_path: Path, every: int
) -> None:
    for step in range(every, STEPS, every * 3 if every == 1 else every):
        with pytest.raises(Killed):
            train(recipe(), tmp_path, resume=True, watcher=Killer(step))
    train(recipe(), tmp_path, resume=True)
    assert len(lines(whole)) == STEPS
    assert same(tmp_path, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"finish": "quant/int4", "finish_share": 0.5},
        {"on_policy": 0.5},
        {"patience": 3, "check_every": 0.2},
        {"loss": "forward_kl + hidden:at=every", "precision": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_else_the_recipe_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Killed in the last part, where a finish rounds already."""
    other = recipe(budget="6 steps", **changes)
    card = train(other, tmp_path / "whole").card
    with pytest.raises(Killed):
        train(other, tmp_path / "cut", watcher=Killer(5))
    again = train(other, tmp_path / "cut", resume=True).card
    assert again.checks == card.checks
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_random_numbers_of_a_gpu_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of torch's own module for the device, played by one that remembers; a CPU has no second ones."""
    device, kept = torch.device("cuda", 1), {}

    def hold(held: torch.Tensor, on: torch.device) -> None:
        kept[on] = held

    player = SimpleNamespace(get_rng_state=lambda on: kept[on], set_rng_state=hold)
    monkeypatch.setattr(torch, "get_device_module", lambda on: player)
    kept[device] = torch.tensor([1, 2], dtype=torch.uint8)
    held = states.device_rng(device)
    kept[device] = torch.tensor([3, 4], dtype=torch.uint8)  # somebody has drawn
    states.set_device_rng(device, held)
    assert kept[device].tolist() == [1, 2]
    cpu = torch.device("cpu")
    assert states.device_rng(cpu) is None
    states.set_device_rng(cpu, None)
    assert list(kept) == [device]


def test_the_comparison_can_fail(whole: Path, tmp_path: Path) -> None:
    """Control: with other rows the curve is another one."""
    train(recipe(seed=1), tmp_path)
    assert not same(tmp_path, whole)


def test_a_real_kill(whole: Path, tmp_path: Path) -> None:
    """The process is killed by the system while it trains; what is on disk goes on."""
    words = [
        sys.executable, "-m", "compresskit", "distill", "--out", str(tmp_path / "out"), "--resume",
        *(f"--{key.replace('_', '-')}={value}" for key, value in RECIPE.items()),
    ]  # fmt: skip
    curve = tmp_path / "out" / "curve.jsonl"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and (not curve.exists() or curve.read_text().count("\n") < 4):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out" / "distillation.json").exists()
    assert (tmp_path / "out" / checkpoint.FILE).exists()
    train(recipe(), tmp_path / "out", resume=True)
    assert same(tmp_path / "out", whole)


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C as in a terminal, even where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    class Insists(Silent):
        def step(self, stride: Stride) -> None:
            if stride.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path, watcher=Insists())
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["step"] == 4  # the last one before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heard")
def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    class Asks(Silent):
        def step(self, stride: Stride) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    card = train(recipe(budget="2 steps"), tmp_path, watcher=Asks()).card
    assert card.training.steps == 2


@pytest.mark.usefixtures("heard")
def test_ctrl_c_saves_and_says_so(whole: Path, tmp_path: Path) -> None:
    class Asks(Silent):
        def step(self, stride: Stride) -> None:
            if stride.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"step 5, 42% .* --resume goes on"):
        train(recipe(save_every="1000 steps"), tmp_path, watcher=Asks())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(recipe(save_every="1000 steps"), tmp_path, resume=True)
    assert same(tmp_path, whole)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    with pytest.raises(Killed):
        train(recipe(), tmp_path, watcher=Killer(5))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate": 0.004}, "rate was 0.003 and is 0.004"),
        ({"student": "layers:blocks=[1]"}, "student was"),
        ({"budget": "13 steps"}, "budget was"),
    ],
)
def test_another_recipe_is_refused_by_name(cut: Path, changes: dict[str, Any], named: str) -> None:
    before = (cut / checkpoint.FILE).read_bytes()
    with pytest.raises(UsageError, match=named):
        train(recipe(**changes), cut, resume=True)
    assert (cut / checkpoint.FILE).read_bytes() == before


def test_other_rows_are_refused(cut: Path) -> None:
    state = checkpoint.load(cut)
    assert state is not None
    state["identity"]["digest of the training rows"] = "another"
    checkpoint.save(cut, {key: value for key, value in state.items() if key != "version"})
    with pytest.raises(UsageError, match="digest of the training rows"):
        train(recipe(), cut, resume=True)


def test_without_resume_nothing_is_overwritten(cut: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match="interrupted at step 4"):
        train(recipe(), cut)
    with pytest.raises(UsageError, match="finished student"):
        train(recipe(), whole, resume=True)


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    """A model of somebody's, or the teacher itself: --resume is no leave to write over it."""
    (tmp_path / "config.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"other files \(config\.json\)"):
            train(recipe(), tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_training_that_has_saved_nothing_begins_again(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe(save_every="1000 steps"), tmp_path, watcher=Killer(3))
    with pytest.raises(UsageError, match="has saved nothing yet"):
        train(recipe(), tmp_path)
    train(recipe(), tmp_path, resume=True)
    assert same(tmp_path, whole)


def test_a_folder_that_cannot_be_made_or_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="it is no folder"):
        train(recipe(), tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot be made \(Not a directory\)"):
        train(recipe(), tmp_path / "file" / "below")


def test_a_full_disk_in_the_curve_keeps_the_checkpoint(
    cut: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (cut / checkpoint.FILE).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(curves.os, "fsync", full)
        with pytest.raises(RunError, match=r"loss of a step .*disk is full.*--resume"):
            train(recipe(), cut, resume=True)
    assert (cut / checkpoint.FILE).read_bytes() == before
    train(recipe(), cut, resume=True)
    assert same(cut, whole)


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="not a checkpoint"):
        train(recipe(), tmp_path, resume=True)


def test_a_full_disk_keeps_the_checkpoint_before(
    cut: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (cut / checkpoint.FILE).read_bytes()

    def full(state: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match=r"disk is full.*is kept.*--resume"):
            train(recipe(), cut, resume=True)
    assert (cut / checkpoint.FILE).read_bytes() == before
    assert not list(cut.glob("*.partial"))
    train(recipe(), cut, resume=True)
    assert same(cut, whole)


def test_a_curve_that_lost_lines_is_not_patched_up(cut: Path) -> None:
    text = (cut / "curve.jsonl").read_text().splitlines(keepends=True)
    (cut / "curve.jsonl").write_text("".join(text[1:]))
    with pytest.raises(RunError, match="does not hold the 4 steps"):
        train(recipe(), cut, resume=True)


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with Curve(tmp_path, 2):
        pass
    assert (tmp_path / "curve.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_called_so_whatever_torch_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer meets a full disk as an error of positions in a zip file."""

    def torn(state: object, file: Any) -> None:
        raise RuntimeError("unexpected pos 4181824 vs 4181712")

    free = SimpleNamespace(free=0)
    monkeypatch.setattr(torch, "save", torn)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: free)
    with pytest.raises(RunError, match="the disk is full"):
        checkpoint.save(tmp_path, {})
    free.free = 10**9
    with pytest.raises(RunError, match=r"written \(unexpected pos"):
        checkpoint.save(tmp_path, {})
