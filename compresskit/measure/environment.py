"""What a run depends on besides its spec: versions, source tree, environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import compresskit
from compresskit.record import Environment, Git

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "bitsandbytes",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TORCHINDUCTOR_FREEZING",
    "HF_HUB_OFFLINE",
)


def describe() -> Environment:
    """Collect the environment of this process."""
    return Environment(
        compresskit=compresskit.__version__,
        cpu_count=os.cpu_count(),
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: found for name in _PACKAGES if (found := _version(name))},
        git=_git(),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> Git | None:
    """Commit of the source tree that this package is imported from; None for an installed copy."""
    root = Path(compresskit.__file__).parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    commit = _ask(git, root, "rev-parse", "HEAD")
    if commit is None:
        return None
    # Results written by this very run do not make the code dirty.
    changed = _ask(
        git, root, "status", "--porcelain", "--", "compresskit", "kernels", "pyproject.toml"
    )
    return Git(commit=commit, dirty=bool(changed))


def _ask(git: str, root: Path, *words: str) -> str | None:
    done = subprocess.run(
        [git, "-C", str(root), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def load_average() -> tuple[float, float, float] | None:
    """Runnable threads over 1, 5 and 15 minutes, where the system counts them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def now() -> str:
    """The time as RFC 3339 in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
