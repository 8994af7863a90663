"""Let a teacher read all rows once and keep what it says.

    rows ──► base model, some rows at a time ──► head, some places at a time ──► format ──► shard

What a row's targets are does not depend on the rows it is read with, but for the rounding of the
teacher's own arithmetic: draws are seeded by the number of the row. Full shards that a stopped run
left are checked and kept.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from compresskit.distill.batch import Batch
from compresskit.distill.teachers import seeds
from compresskit.distill.teachers.cache import shard, source
from compresskit.errors import ModelError, RunError, SpecError
from compresskit.method import quiet
from compresskit.units import Unit, format_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from compresskit.distill.teachers.cache.formats import Format, Stored
    from compresskit.distill.teachers.online import Online
    from compresskit.method import Progress

SHARD_BYTES = 32 << 20
"""Most that is lost when a writer is stopped: on two CPU cores minutes of a small teacher's work."""
CHUNK_NUMBERS = 1 << 22
"""Log-probabilities held at once, 16 MiB of them: a vocabulary of 49,152 goes in 85 places."""


@dataclass(frozen=True)
class Written:
    """What `write` did."""

    manifest: source.Manifest
    tokens_read: int
    """Tokens that the teacher read now: 0 where all shards were there."""
    kept: int
    """Shards that were there."""
    seconds: float
    """Of this call."""


def write(
    folder: Path,
    teacher: Online,
    rows: torch.Tensor,
    *,
    form: Format,
    belongs: source.Source,
    seed: int = 0,
    batch: int = 4,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = quiet,
) -> Written:
    """Write the targets of `rows`, int64 `[R, L]`, into `folder`, or what is missing there.

    batch: rows that the teacher reads at once. seed: of what is drawn.

    Raises:
        SpecError: the format does not suit the teacher, the rows are no data, or the folder holds
            the cache of something else.
        ModelError: the folder holds other files.
        RunError: the disk is full, another process writes there, or the teacher gives no numbers.
    """
    began = time.perf_counter()
    if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise SpecError(
            f"a teacher cache needs rows of at least two tokens, not {list(rows.shape)}: give more text."
        )
    if belongs.data != source.data_digest(rows):
        raise SpecError(
            "the source names other rows than those to be read: build it from these rows."
        )
    places = belongs.length - 1
    row_bytes = places * form.bytes_per_place(teacher.vocabulary)
    manifest = source.Manifest(
        source=belongs,
        format=form.label(),
        dtype=_dtype(teacher),
        vocabulary=teacher.vocabulary,
        seed=seed if form.uniforms() else None,
        rows_per_shard=max(1, shard_bytes // row_bytes),
    )
    with _alone(folder):
        manifest = _agreed(folder, manifest)
        tokens_before = teacher.tokens_read
        missing = [i for i in range(manifest.shards()) if not _is_good(folder, i, manifest)]
        to_write = sum(len(manifest.span(index)) for index in missing)
        _require_space(folder, to_write * row_bytes)
        progress("teacher cache", belongs.rows - to_write, belongs.rows)
        for index in missing:
            _write_shard(folder, teacher, rows, manifest, index, batch=batch, progress=progress)
        manifest = _completed(folder, manifest)
        source.save(manifest, folder)
    read = teacher.tokens_read - tokens_before
    kept = manifest.shards() - len(missing)
    return Written(manifest, read, kept, time.perf_counter() - began)


def _dtype(teacher: Online) -> str:
    name = str(teacher.model.dtype).removeprefix("torch.")
    if teacher.autocast is None:
        return name
    return f"{name}, products in {str(teacher.autocast).removeprefix('torch.')}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other writers out; the operating system drops the lock of a dead process."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{folder}: another process is writing this teacher cache. Wait for it, or name another "
            "folder."
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Name another folder for the cache."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _require_space(folder: Path, needed: int) -> None:
    """Refuse before the teacher has read anything where the disk is too small as it stands."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the teacher cache needs {format_quantity(needed, Unit.BYTE)}, and "
            f"{format_quantity(free, Unit.BYTE)} are free. Keep less of each place (a smaller k, or "
            "draws), free some space, or name a folder on a larger disk."
        )


def _agreed(folder: Path, wanted: source.Manifest) -> source.Manifest:
    """The manifest to go by: the one that is there, if it is of the same cache."""
    held = source.load(folder)
    if held is None:
        if shard.listed(folder):
            raise ModelError(
                f"{folder} holds shards but no {source.FILE}, so nobody knows what they are of. "
                "Delete them, or name another folder for the cache."
            )
        source.save(wanted, folder)
        return wanted
    held.source.require(wanted.source, where=folder)
    for name, is_, asked in (
        ("format", held.format, wanted.format),
        ("computation type of the teacher", held.dtype, wanted.dtype),
        ("vocabulary", held.vocabulary, wanted.vocabulary),
        ("seed", held.seed, wanted.seed),
    ):
        if is_ != asked:
            raise SpecError(
                f"{folder} holds a cache with another {name}: {is_}, not {asked}. Name another folder "
                "for the cache."
            )
    return held  # with the size of shards that it was begun with


def _is_good(folder: Path, index: int, manifest: source.Manifest) -> bool:
    """Whether a shard can be kept; one that cannot is written again."""
    path = shard.path_of(folder, index)
    if not path.is_file():
        return False
    try:
        file, told = shard.open_mapped(
            path, cache=manifest.digest(), first=manifest.span(index).start
        )
        shard.verify(path, file, told)
    except ModelError:
        return False
    return True


def _write_shard(
    folder: Path,
    teacher: Online,
    rows: torch.Tensor,
    manifest: source.Manifest,
    index: int,
    *,
    batch: int,
    progress: Progress,
) -> None:
    began = time.perf_counter()
    form = manifest.parsed()
    span = manifest.span(index)
    pieces: list[Stored] = []
    sums: dict[str, float] = {}
    for start in range(0, len(span), batch):
        numbers = torch.tensor(span[start : start + batch])
        for stored, errors in _targets(teacher, rows[numbers], numbers, form, manifest.seed):
            pieces.append(stored)
            for name, values in errors.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
        progress("teacher cache", int(numbers[-1]) + 1, manifest.source.rows)
    if not all(map(math.isfinite, sums.values())):
        raise RunError(
            f"the teacher's errors of rows {span[0]} to {span[-1]} are not finite ({sums}): the cache "
            "would give a token no probability that the teacher gives some. Store float32."
        )
    shape = (len(span), manifest.source.length - 1)
    tensors = {
        name: torch.cat([piece[name] for piece in pieces]).reshape(*shape, -1) for name in pieces[0]
    }
    told = shard.Told(
        cache=manifest.digest(),
        first=span.start,
        sha256=shard.content_sha256(tensors),
        errors=sums,
        seconds=time.perf_counter() - began,
    )
    shard.write(shard.path_of(folder, index), tensors, told)


def _targets(
    teacher: Online, tokens: torch.Tensor, numbers: torch.Tensor, form: Format, seed: int | None
) -> Iterator[tuple[Stored, dict[str, torch.Tensor]]]:
    """What is stored of some rows, and its errors, chunk after chunk in the order of places."""
    device = next(teacher.model.parameters()).device
    batch = Batch(tokens.to(device), torch.ones(tokens.shape), numbers)
    hidden = teacher.targets(batch).hidden
    hidden = hidden.reshape(len(tokens), -1, hidden.shape[-1])
    places = hidden.shape[1]
    chunk = max(1, CHUNK_NUMBERS // teacher.vocabulary)
    for row, states in zip(numbers.tolist(), hidden, strict=True):
        drawing = seeds.generator("draws", seed or 0, row)
        uniforms = torch.rand(places, form.uniforms(), generator=drawing, dtype=torch.float64)
        for start in range(0, places, chunk):
            logprobs = teacher.logprobs(states[start : start + chunk])
            if logprobs.isnan().any():
                raise RunError(
                    f"the teacher's logits of row {row} are not numbers, so there is nothing to keep. "
                    "Compute the teacher in float32 or bfloat16."
                )
            stored = form.pack(logprobs, uniforms[start : start + chunk].to(device))
            errors = form.errors(logprobs, stored)
            yield {name: tensor.cpu() for name, tensor in stored.items()}, errors


def _completed(folder: Path, manifest: source.Manifest) -> source.Manifest:
    """The manifest with what all shards together say."""
    sums: dict[str, float] = {}
    seconds, size = 0.0, 0
    for index in range(manifest.shards()):
        path = shard.path_of(folder, index)
        _, told = shard.open_mapped(path, cache=manifest.digest(), first=manifest.span(index).start)
        size += path.stat().st_size
        seconds += told.seconds
        for name, value in told.errors.items():
            sums[name] = sums.get(name, 0.0) + value
    places = manifest.source.rows * (manifest.source.length - 1)
    means = {name: value / places for name, value in sums.items()}
    return manifest.model_copy(
        update={
            "complete": True,
            "bytes_per_token": size / places,
            "shard_bytes": size,
            "reconstruction": manifest.parsed().summary(means),
            "teacher_tokens": places,
            "seconds": seconds,
        }
    )
