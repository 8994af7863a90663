"""Every error that compresskit raises on purpose, and the exit code each one means.

An error message names the culprit, the rule it broke and the way out. Anything that is not a
`CompressKitError` is a bug of ours (or of a library) and is shown with its traceback.

    CompressKitError
    ├── UsageError            exit 2   the request is wrong
    │   ├── SpecError         a suite, a flag or a method parameter
    │   ├── UnknownName       a name that is not in the catalogue (suggests the nearest one)
    │   ├── ModelError        model files missing, corrupt, refused or of an unknown kind
    │   ├── InputError        a prompt or a text that cannot be used
    │   ├── RecordError       a stored record that cannot be read
    │   └── MissingExtra      an optional dependency that is not installed
    ├── Incomparable    exit 3   two results that must not be compared
    ├── Conflict    exit 2    a stack whose traits clash; in a suite, a `skipped` record
    └── RunError              exit 1   the run itself failed (memory, disk, a kernel that cannot run)
"""

from __future__ import annotations

import difflib
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class Exit(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INVALID = 3


class CompressKitError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[Exit] = Exit.FAILED


class UsageError(CompressKitError):
    """The request cannot be honoured as written; nothing was run."""

    exit_code = Exit.USAGE


class SpecError(UsageError):
    """A suite, a flag or a method parameter is wrong."""


class ModelError(UsageError):
    """A model cannot be found, verified or loaded."""


class InputError(UsageError):
    """A prompt or an evaluation text cannot be used."""


class RecordError(UsageError):
    """A stored record cannot be read or was edited by hand."""


class MissingExtra(UsageError):
    """An optional dependency is not installed; the message holds the install line."""

    def __init__(self, package: str, *, extra: str) -> None:
        """Name the missing `package` and the extra that brings it."""
        super().__init__(
            f"{package} is not installed. Install it with: pip install 'compresskit[{extra}]'"
        )


class UnknownName(UsageError, LookupError):
    """A name that nothing in the catalogue bears."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Suggest the nearest of `known` for `name`, which should name a `kind`."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


class Conflict(CompressKitError):
    """Methods of a stack, the engine and the device do not fit together."""

    exit_code = Exit.USAGE


class Incomparable(CompressKitError):
    """Two results differ in something that forbids a comparison, or are not valid themselves."""

    exit_code = Exit.INVALID


class RunError(CompressKitError):
    """A run could not be finished: memory, disk, a kernel that cannot do what was asked."""
