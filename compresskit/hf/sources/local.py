"""A folder on disk, used where it lies.

The revision is a digest of the weights. The baseline counts as full precision unless the folder
carries our manifest, as a copied cache entry does, and that says otherwise, or was made from random
weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from compresskit.hf.sources import digest, folder, manifest, random
from compresskit.hf.sources.model import Baseline, ResolvedModel

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.hf.sources.model import Progress


def resolve(
    name: str,
    path: Path,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    cache: Path,
    progress: Progress,
) -> ResolvedModel:
    """Check the folder `path` and pin it by its weights.

    Raises:
        ModelError: the folder is incomplete, corrupt, or would run code nobody allowed.
    """
    checked = folder.check(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return ResolvedModel(
        name=name,
        path=path.resolve(),
        kind="local",
        revision=digest.weights_revision(checked.weights, cache, progress),
        baseline=_baseline(path),
        notice=" ".join(checked.remarks) or None,
    )


def _baseline(path: Path) -> Baseline:
    if random.is_marked(path):
        return "random"
    note = manifest.read(path)
    said = None if note is None else note["facts"].get("baseline")
    for kind in get_args(Baseline):
        if said == kind:
            return kind  # type: ignore[no-any-return]
    return "full_precision"
