"""Where the numbers come from: device, versions, and the copy bandwidth measured there and then."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import timing

if TYPE_CHECKING:
    from benchmarks.gpu.stages import Settings

PACKAGES = ("torch", "triton", "gemlite", "torchao", "bitsandbytes", "numpy")


def describe(settings: Settings) -> dict[str, Any]:
    """What every record of this run has in common."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "dry_run": settings.is_dry,
        "device": "cpu",
        "copy_bytes_per_second": None,
    }
    if not settings.is_dry:
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "copy_bytes_per_second": timing.copy_bandwidth(),
        }
    return about


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, where it came along with its history."""
    return _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
