"""The shipped tiny models: trained here, a few megabytes, always there without a network.

    tiny          the target: what tests and the demo measure
    tiny:draft    a smaller model of the same vocabulary, for speculative decoding
    tiny:moe      a mixture of experts, for methods on expert weights

Where the files lie is known to `compresskit.assets`; they are checked like any other folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.errors import ModelError
from compresskit.hf.sources import digest, folder
from compresskit.hf.sources.model import KnownModel, ResolvedModel

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.assets import TinyRole

ROLES: dict[str, TinyRole] = {"tiny": "target", "tiny:draft": "draft", "tiny:moe": "moe"}
_DESCRIPTIONS: dict[TinyRole, str] = {
    "target": "tiny trained model for tests, demo and quick start",
    "draft": "smaller draft with the vocabulary of `tiny`",
    "moe": "tiny trained mixture of experts",
}


def resolve(name: str) -> ResolvedModel:
    """Find the shipped model called `name`, a key of `ROLES`.

    Raises:
        ModelError: this installation lacks the model's files, or they are damaged.
    """
    path = _path(ROLES[name])
    if not path.is_dir():
        raise ModelError(
            f"{name} should be in {path}, but this installation does not have it. "
            "Reinstall compresskit."
        )
    checked = folder.check(path, allow_pickle=False, trust_remote_code=False)
    return ResolvedModel(
        name=name,
        path=path,
        kind="tiny",
        revision=digest.revision(digest.sha256(checked.weights[0])),
        baseline="tiny_trained",
        notice=None,
    )


def known() -> tuple[KnownModel, ...]:
    """List the shipped models."""
    return tuple(
        KnownModel(
            name=name,
            description=_DESCRIPTIONS[role],
            source="shipped with compresskit",
            licence="Apache-2.0",
            download_bytes=0,
            cached=(_path(role) / folder.WEIGHTS).is_file(),
        )
        for name, role in ROLES.items()
    )


def _path(role: TinyRole) -> Path:
    from compresskit.assets import tiny_path

    return tiny_path(role)
