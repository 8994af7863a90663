"""What one decode step really calls: the proof that a fast path engaged, or that it did not.

Every operator that torch dispatches in a step is counted, whoever called it; on a GPU the profiler
names the kernels too. A quantised layer that dequantises its weight ends in a dense product like any
other, so the dense products of a step are held against the layers that still are dense: what is too
many was dequantised on the way. Products of ours are named by `dispatch`, since nothing looks into a
call through ctypes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from compresskit_kernels import dispatch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compresskit.hf import modules

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.measure.passes import Bench

DENSE = frozenset({"aten.linear", "aten.mm", "aten.addmm", "mkldnn._linear_pointwise"})
"""Operators that multiply by a dense weight; batched products are attention's."""
SHOWN = 12
"""Operators and kernels kept in the record, the most frequent ones."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is not typed here
    """Counts operators by name while it is switched on."""

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count, then run."""
        self.counts[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def profiled_step(bench: Bench) -> dict[str, JsonValue]:
    """Look at one decode step of the first request of `bench`; empty where there is none.

    routines: operation -> what ran; operators: [name, calls] of the most frequent ones;
    dense_products and dense_layers: dense products called, and what may call them; kernels (on a
    GPU): [name, calls] of what ran there. A compiled step shows kernels only.
    """
    system = bench.system
    chunks = system.generate(bench.request(0, bench.workload.batch_sizes[0]))
    if next(chunks, None) is None or next(chunks, None) is None:
        return {}
    dispatch.reset()
    seen: dict[str, JsonValue] = {}
    if system.device.kind == "cuda":
        seen["kernels"] = _kernels(lambda: next(chunks, None))
    if not hasattr(system.step, "constants"):
        operators = Operators()
        with operators:
            stepped = next(chunks, None) is not None
        if stepped:
            seen["operators"] = _frequent(operators.counts)
            seen["dense_products"] = sum(operators.counts[name] for name in DENSE)
            seen["dense_layers"] = dense_layers(system.model)
    for _ in chunks:
        pass
    routines: dict[str, JsonValue] = {op: list(ran) for op, ran in dispatch.used().items()}
    return {"routines": routines, **seen}


def _frequent(counts: Counter[str]) -> list[JsonValue]:
    return [[name, count] for name, count in counts.most_common(SHOWN)]


def _kernels(work: Any) -> list[JsonValue]:
    """Names of the GPU kernels that `work` starts."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        work()
        torch.cuda.synchronize()
    counts = Counter(
        event.name for event in seen.events() or () if event.device_type == DeviceType.CUDA
    )
    return _frequent(counts)


def dense_layers(model: nn.Module) -> int:
    """Dense products that a step of `model` may call: linear layers, routers, fused experts.

    A layer of dense experts calls two for each expert that is used; it is counted as if all were.
    """
    count = len(modules.linears(model))
    for module in model.modules():
        if type(module).__name__ == "PrepackedLinear":
            count += 1
        elif not isinstance(module, nn.Embedding | nn.Linear):
            own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            count += sum(2 * p.shape[0] if p.dim() == 3 else 1 for p in own)
    return count
