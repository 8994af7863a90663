"""Natural text for prompts and evaluation, always with its hash.

    embedded                          the held-out text that ships with compresskit (default)
    calibration                       the shipped calibration text, disjoint from the held-out one
    pydoc                             the help topics of Python's standard library: half a megabyte
                                      of English that is always there, but differs by Python version
    docstrings                        docstrings of the standard library's modules: a megabyte, apart
                                      from `pydoc`; long enough to calibrate a real model on
    datasets:NAME[:CONFIG[:SPLIT]]    a data set, from the Hub or from a local folder or file
    anything else                     a UTF-8 file

Numbers taken on different texts are never compared, so a text is known by the SHA-256 of its
bytes, not by its name.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.assets import text_path
from compresskit.errors import InputError
from compresskit.record import TextFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compresskit.assets import TextName
    from compresskit.system import Tokenizer

_FIELDS = ("text", "page", "content")
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("test", "validation", "train")

_ENOUGH = 1_000_000
"""Characters of docstrings to collect."""
_SHORTEST = 60
"""Characters of a docstring below which it is a label rather than prose."""
_NOT_THE_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data",
    "turtledemo", "_bundled", "__pycache__",
}  # fmt: skip
"""Folders of an installation that hold tests, other people's code, or the text `pydoc`."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    source: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.content.encode())

    def facts(self, tokens: int) -> TextFacts:
        """What a record says about this text, which has `tokens` tokens."""
        return TextFacts(source=self.source, sha256=self.sha256, tokens=tokens, bytes=self.bytes)


def load(source: str) -> Text:
    """Read the text called `source`.

    Raises:
        InputError: it is missing, unreachable, empty or not UTF-8.
    """
    if source == "embedded":
        text = Text(source, _shipped("heldout"))
    elif source == "calibration":
        text = Text(source, _shipped("calibration"))
    elif source == "pydoc":
        text = Text(f"pydoc:{platform.python_version()}", _pydoc())
    elif source == "docstrings":
        text = Text(f"docstrings:{platform.python_version()}", _docstrings())
    elif source.startswith("datasets:"):
        text = Text(source, _dataset(source))
    else:
        text = Text(source, _file(Path(source)))
    if not text.content.strip():
        raise InputError(f"{source}: the text is empty.")
    return text


def bos(tokenizer: Tokenizer) -> int | None:
    """The token that this tokenizer itself puts in front of every text, or None.

    Having a BOS token is not enough: some tokenizers define one and never add it.
    """
    with_special, plain = tokenizer.encode("a", special=True), tokenizer.encode("a", special=False)
    added = with_special[:1] == [tokenizer.bos_id] and plain[:1] != [tokenizer.bos_id]
    return tokenizer.bos_id if added else None


def ids_sha256(rows: Sequence[Sequence[int]]) -> str:
    """Hash of token ids, as int32 little-endian, row after row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(b"".join(token.to_bytes(4, "little") for token in row))
    return digest.hexdigest()


def _shipped(name: TextName) -> str:
    path = text_path(name)
    if not path.is_file():
        raise InputError(
            f"{path} should have been installed with compresskit. Reinstall it, or name another "
            "text (pydoc, a file, datasets:NAME)."
        )
    return path.read_text(encoding="utf-8")


def _pydoc() -> str:
    # Stripped-down installations leave the help topics out.
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python has no pydoc_data, so there is no text 'pydoc'. Use 'embedded' or a file."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def _docstrings() -> str:
    """Distinct docstrings of some length, in the order of files and then of lines."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    size = 0
    for path in _sources(library):
        for text in _docstrings_of(path):
            size += 0 if text in found else len(text)
            found[text] = None
        if size >= _ENOUGH:
            break
    if not found:
        raise InputError(
            f"{library} holds no sources of the standard library, so there is no text 'docstrings'. "
            "Use 'calibration', 'pydoc' or a file."
        )
    return "\n\n".join(found)


def _sources(folder: Path) -> Iterator[Path]:
    """Python files of the standard library under `folder`, sorted folder by folder."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.name in _NOT_THE_LIBRARY:
            continue
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Sources may hold escapes that Python itself warns about.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text is not None and len(text) >= _SHORTEST and text.isascii():
            yield text


def _file(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start}: {error.reason}). Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}. A text is embedded, calibration, pydoc, docstrings, a "
            "file, or datasets:NAME[:CONFIG[:SPLIT]]."
        ) from None


def _dataset(source: str) -> str:
    """Rows of one text column joined by a blank line."""
    rows = dataset_rows(source)
    column = next((field for field in _FIELDS if field in rows.column_names), None)
    if column is None:
        raise InputError(
            f"{source}: no column {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}; "
            f"there are {', '.join(rows.column_names)}."
        )
    return "\n\n".join(str(row) for row in rows[column] if row is not None)


def dataset_rows(source: str) -> Any:
    """The split of a data set that `source` names, by default test, validation or train.

    Raises:
        InputError: it cannot be reached, or there is no such thing.
    """
    name, config, split = (*source.split(":")[1:], "", "", "")[:3]
    if not name:
        raise InputError(f"{source!r}: name a data set, as in datasets:NAME[:CONFIG[:SPLIT]].")
    # Imported here: it costs about a second and only this source needs it.
    import datasets

    local = _BUILDERS.get(Path(name).suffix) if Path(name).is_file() else None
    where = {"path": local, "data_files": name} if local else {"path": name, "name": config or None}
    try:
        found = datasets.load_dataset(**where, split=split or None)
    except ConnectionError as error:
        raise InputError(
            f"{source}: the data set cannot be reached ({_first_line(error)}). Offline, give a "
            "local folder or .jsonl file (datasets:PATH), or use the text 'embedded'."
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source}: {_first_line(error)}. Check name and config, or whether the network or "
            "the local path is there; 'embedded' needs neither."
        ) from None
    return found if split else found[next((s for s in _SPLITS if s in found), min(found))]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
