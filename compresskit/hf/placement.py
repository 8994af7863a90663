"""Where the weights of a placed model lie, and how much of them may lie where.

    spread            embed ─ block 0 ─ block 1 ─ block 2 ─ block 3 ─ norm ─ head
                      └──── cuda:0 ────┘└──── cuda:1 ────┘└─ host ─┘└── disk ──┘

accelerate draws the map and hooks the modules: a hook moves what a module is given to the GPU that
holds its weights, and brings weights that no GPU holds to the first one for as long as the module
runs. In between these are tensors on torch's "meta" device: a shape and a type, no numbers. So nothing
may replace, pack or copy them, and their bytes are found here, by name.

The GPUs work one after the other: a spread model fits where it did not, it is not faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from pydantic import JsonValue

    from compresskit.device import Device
    from compresskit.spec import PlacementSpec

GB = 1e9
KEPT_FREE = 0.1
"""Share of the free memory that is left for caches and activations where no limit was named."""


def limits(spec: PlacementSpec, device: Device) -> dict[int | str, int]:
    """Most bytes of weights by place, as accelerate wants them: GPUs by number, `cpu` the host."""
    from accelerate.utils import get_max_memory

    found: dict[int | str, int] = {}
    for place, free in get_max_memory().items():
        host = place == "cpu"
        if not host and (device.kind == "cpu" or place not in device.ordinals):
            continue
        asked = spec.host_gb if host else spec.device_gb
        found[place] = int((1 - KEPT_FREE) * free if asked is None else min(free, asked * GB))
    return found


def home(model: Any, name: str) -> str | None:
    """Where the placement keeps the module or tensor `name`: `cuda:0`, `cpu`, `disk`; None if unplaced."""
    places: dict[str, object] = getattr(model, "hf_device_map", None) or {}
    while name not in places:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return _named(places[name])


def _named(place: object) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def gpus(model: Any) -> tuple[int, ...]:
    """Numbers of the GPUs that hold weights of `model`, and of the one that works on offloaded ones."""
    found = {place for place in _places(model) if isinstance(place, int)}
    return tuple(sorted(found))


def _places(model: Any) -> set[object]:
    return set((getattr(model, "hf_device_map", None) or {}).values())


def facts(model: Any, spec: PlacementSpec) -> dict[str, JsonValue]:
    """What lies where, JSON-ready: modules with tensors of their own, and bytes, by place."""
    holds: dict[str, dict[str, int]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        here: dict[str, int] = {}
        for tensor in _tensors(module):
            place = home(model, name) if tensor.device.type == "meta" else str(tensor.device)
            here.setdefault(place or "unknown", 0)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                here[place or "unknown"] += tensor.nbytes
        for place, size in here.items():
            at = holds.setdefault(place, {"modules": 0, "bytes": 0})
            at["modules"] += 1
            at["bytes"] += size
    return {"how": spec.how, "holds": {place: {**holds[place]} for place in sorted(holds)}}


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
