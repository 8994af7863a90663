"""The machine, as a folder name and as a description beside its results.

No host name: results are made to be published. Two machines of the same make share a folder name
only if everything in the description is equal.

The machine file also keeps what was measured once, the machine's limits: `update` writes a new
description over an old one and lets them stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from typing import TYPE_CHECKING

import psutil
from pydantic import ValidationError

from compresskit.device import cpu_info
from compresskit.errors import RecordError
from compresskit.record import Limits, Stored
from compresskit.store import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.device import Device


class Machine(Stored):
    """What stays the same between runs on one machine."""

    id: str
    device: str
    cpu: str
    cpu_count: int
    cpu_flags: tuple[str, ...]
    ram_bytes: int
    operating_system: str
    device_memory_bytes: int
    limits: Limits | None = None
    """Null until `compresskit doctor --measure`."""


_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def describe(device: Device) -> Machine:
    """Describe this machine as seen from `device`."""
    info = cpu_info()
    # Memory is rounded to GiB: what the kernel keeps for itself differs from boot to boot.
    ram = round(psutil.virtual_memory().total / 2**30) * 2**30
    facts = {
        "device": device.name,
        "cpu": info.name,
        "cpu_count": os.cpu_count() or 1,
        "cpu_flags": tuple(flag for flag in _FLAGS if flag in info.flags),
        "ram_bytes": ram,
        "operating_system": f"{platform.system()} {platform.machine()}",
        "device_memory_bytes": ram if device.kind == "cpu" else device.memory_bytes,
    }
    code = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:4]
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return Machine.model_validate({"id": f"{slug}-{facts['cpu_count']}c-{code}", **facts})


FILE = "machine.json"


def load(folder: Path) -> Machine | None:
    """Read the machine file in `folder`; None where there is none.

    Raises:
        RecordError: the file is there, but is no machine file.
    """
    path = folder / FILE
    try:
        return Machine.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        complaint = str(error).splitlines()[0]
        raise RecordError(
            f"{path}: not a readable machine file ({complaint}). Delete it; it is written anew."
        ) from None


def limits(folder: Path) -> Limits | None:
    """The limits that the machine file in `folder` holds, or None where nobody measured them.

    Raises:
        RecordError: the file is there, but is no machine file.
    """
    found = load(folder)
    return None if found is None else found.limits


def update(folder: Path, description: Machine) -> Machine:
    """Write `description` as the machine file in `folder` and return what now stands there.

    Limits that were measured on the same machine stay unless `description` brings new ones. A file
    that cannot be read is replaced.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        before = load(folder)
    except RecordError:
        before = None
    kept = before.limits if before is not None and before.id == description.id else None
    if description.limits is None and kept is not None:
        description = description.model_copy(update={"limits": kept})
    write_text(folder / FILE, description.model_dump_json(indent=1) + "\n")
    return description
