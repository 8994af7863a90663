"""The machine, as a folder name and as a description beside its results.

No host name: results are made to be published. Two machines of the same make share a folder name
only if everything in the description is equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from typing import TYPE_CHECKING

import psutil

from compresskit.device import cpu_info
from compresskit.record import Stored

if TYPE_CHECKING:
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
