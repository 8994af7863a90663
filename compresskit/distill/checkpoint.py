"""The state of a training on disk: all or nothing, and only for the training that it belongs to.

    partial file ──fsync──► rename over the old one ──fsync──► the folder

A crash leaves the old checkpoint or the new one, never half of one. Read back with `weights_only`: a
checkpoint is data and runs no code.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import torch

from compresskit.errors import ModelError, RunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compresskit.distill.recipe import Recipe

FILE = "checkpoint.pt"
VERSION = 1
_NOTHING_LEFT = 64 * 1024
"""Bytes free on a disk that a writer has just filled."""


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint in `folder` by `state`.

    Raises:
        RunError: it could not be written; the old one is still there.
    """
    path, partial = folder / FILE, folder / f"{FILE}.partial"
    try:
        with partial.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into a RuntimeError of its own.
        # Asked before the half that was written makes room again.
        full = _is_full(error, folder)
        partial.unlink(missing_ok=True)
        why = "the disk is full" if full else str(error).splitlines()[0]
        kept = "The one before it is kept" if path.exists() else "There is none before it"
        raise RunError(
            f"{path}: the checkpoint could not be written ({why}). {kept}: make room, then give the "
            "same command with --resume."
        ) from error


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`, on the CPU; None where there is none.

    Raises:
        ModelError: there is one that cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path}: not a checkpoint of a training ({_first_line(error)}). Delete the folder and start "
            "again."
        ) from None
    if version != VERSION:
        raise ModelError(
            f"{path}: written in version {version} of the format; this is version {VERSION}. Finish "
            "the training with the version of compresskit that began it."
        )
    return state


def agree_on_recipe(state: Mapping[str, Any], recipe: Recipe) -> None:
    """See that a checkpoint was made with this recipe; asked before anything is loaded.

    Raises:
        UsageError: something differs; names the first thing.
    """
    different = recipe.difference(state["recipe"])
    if different is not None:
        now = recipe.model_dump(mode="json").get(different)
        raise UsageError(
            f"--resume: the checkpoint was made with another recipe: {different} was "
            f"{state['recipe'].get(different)!r} and is {now!r}. Give the old value, or another --out."
        )


def agree(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """See that a checkpoint belongs to what the recipe has turned out to be here.

    `identity` names what the recipe does not say: revision of the teacher, digest of the rows,
    number of processes.

    Raises:
        UsageError: something differs; names the first thing.
    """
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise UsageError(
                f"--resume: the {name} of the checkpoint is {state['identity'].get(name)!r}, and here "
                f"it is {value!r}. A training goes on only with what it began with; name another --out "
                "to begin a new one."
            )


def _is_full(error: OSError | RuntimeError, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return shutil.disk_usage(folder).free < _NOTHING_LEFT


def _sync_folder(folder: Path) -> None:
    """Make the renaming last: it is the folder that holds names."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
