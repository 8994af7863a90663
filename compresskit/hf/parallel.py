"""Tensor parallel: several processes, each with a share of every matrix, that take every step together.

    torchrun --nproc-per-node 2 -m compresskit run --placement tensor_parallel ...

    process 0    q, k, v, gate, up: the first half of the rows    o, down: of the columns    ──┐
    process 1    the second half                                  the second half            ──┴─ all-reduce

transformers cuts the matrices as the model's plan says and adds up what the processes found (gloo
on CPUs, NCCL on GPUs: one a process). Every process runs the whole program on the same requests with
the same seeds; were one to decide otherwise, the others would wait for it for ever. So nothing may
go by what was measured, and only the first process writes and prints.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from compresskit.errors import ModelError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from pydantic import JsonValue

    from compresskit.device import Device
    from compresskit.spec import PlacementSpec


class Processes(NamedTuple):
    """Which process of how many this is, as torchrun says in the environment."""

    rank: int
    total: int
    local: int
    """Number among the processes of this machine: that of its GPU."""
    here: int
    """Processes of this machine."""

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """Read the variables; one process where they are not set."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return cls(*(int(environment.get(name, alone)) for name, alone in names.items()))


def demands(placement: PlacementSpec | None) -> TypeGuard[PlacementSpec]:
    """Whether the processes of `placement` have to take every step together."""
    return placement is not None and placement.how == "tensor_parallel"


def first(placement: PlacementSpec | None) -> bool:
    """Whether this process is the one that writes and prints."""
    return not demands(placement) or Processes.found().rank == 0


def own(placement: PlacementSpec | None, device: Device) -> tuple[int, ...]:
    """Number of the GPU of this process; none on a CPU, or where no share is asked for."""
    return (Processes.found().local,) if demands(placement) and device.kind == "cuda" else ()


def metered(placement: PlacementSpec | None, device: Device) -> tuple[int, ...]:
    """Numbers of the GPUs that energy is counted on: those of all processes here, not of one."""
    return tuple(range(Processes.found().here)) if demands(placement) else device.ordinals


def vet(device: Device, gpus: int) -> None:
    """Refuse to begin where no other process will join.

    Raises:
        SpecError: this process was not started by torchrun, or there are more of them than GPUs.
    """
    processes = Processes.found()
    if processes.total < 2:
        raise SpecError(
            "placement 'tensor_parallel' shares a model between processes, and this is the only one. "
            "Start them together: torchrun --nproc-per-node 2 -m compresskit ..."
        )
    if device.kind == "cuda" and processes.here > gpus:
        raise SpecError(
            f"placement 'tensor_parallel' wants a GPU for each process: {processes.here} processes, "
            f"{gpus} GPUs. Start fewer: torchrun --nproc-per-node {gpus} -m compresskit ..."
        )


def options() -> dict[str, Any]:
    """What `from_pretrained` is told: every process gets a share, by the model's own plan."""
    from transformers.distributed import DistributedConfig

    total = Processes.found().total
    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=total)}
    return {"tp_plan": "auto"}  # releases whose config does not know of shares


def share(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process holds; all of it where it is not shared."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def facts(model: Any, placement: PlacementSpec) -> dict[str, JsonValue]:
    """What every process holds, JSON-ready: modules with tensors of their own, and bytes; and a warning.

    Raises:
        ModelError: nothing was cut: the model has no plan, so every process would do all the work.
    """
    from torch import distributed

    tensors = [(module, own) for module in model.modules() for own in _tensors(module)]
    if not any(hasattr(tensor, "to_local") for _, tensor in tensors):
        raise ModelError(
            f"{type(model).__name__} has no plan by which transformers could share it between processes. "
            "Use --placement spread."
        )
    once = {id(tensor): share(tensor).nbytes for _, tensor in tensors}
    mine = {
        "device": str(next(iter(model.parameters())).device),
        "modules": len({id(module) for module, _ in tensors}),
        "bytes": sum(once.values()),
    }
    found: list[Any] = [None] * Processes.found().total
    distributed.all_gather_object(found, mine)
    holds = {f"process {rank}": one for rank, one in enumerate(found)}
    return {
        "placement": {"how": placement.how, "processes": len(found), "holds": holds},
        "warnings": [
            f"placement: peaks of memory are those of the first of {len(found)} processes"
        ],
    }


def summed(told: Mapping[str, JsonValue], own: Mapping[str, int]) -> dict[str, int]:
    """Bytes by kind of all processes together: `own` where `told` (a system's facts) names no others."""
    placed = told.get("placement")
    if not isinstance(placed, dict) or "processes" not in placed:
        return dict(own)
    from torch import distributed

    found: list[Any] = [None] * Processes.found().total
    distributed.all_gather_object(found, dict(own))
    return {kind: sum(one.get(kind, 0) for one in found) for kind in own}


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
