"""`compresskit doctor`: what this machine has, which kernels engage, what is missing and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli import options

if TYPE_CHECKING:
    from compresskit.device import Device


def doctor(
    device: options.DeviceName = "auto",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure what the machine can do at best (copying, multiplying, launching) and "
            "keep it in the machine file: later runs are held against it.",
        ),
    ] = False,
    threads: options.Threads = 1,
    out: options.OutFolder = Path("results"),
    as_json: options.AsJson = False,
) -> None:
    """Describe this machine to someone who wants to know why a row looks as it does.

    [bold]Examples[/bold]

      compresskit doctor --json

      compresskit doctor --measure
    """
    if measure:
        measure_limits(device, threads, out)
    report = examine(device, out)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


def measure_limits(wish: str, threads: int, out: Path) -> None:
    """Measure the machine's limits and store them in its file under `out`."""
    import sys

    from compresskit import device as devices
    from compresskit.measure import limits, machine

    found = devices.resolve(wish)
    print("measuring copying, multiplying and launching: a few seconds", file=sys.stderr)
    description = machine.describe(found)
    measured = limits.measure(found, threads=threads)
    machine.update(out / description.id, description.model_copy(update={"limits": measured}))


def examine(wish: str = "auto", out: Path = Path("results")) -> dict[str, Any]:
    """Collect everything the machine says about itself; `out` is where its file may be."""
    import os

    import torch

    from compresskit import device as devices
    from compresskit.hf.sources import known
    from compresskit.measure import environment, machine
    from compresskit.measure.energy import counters
    from compresskit.measure.memory.peaks import PeakMeter

    found = devices.resolve(wish)
    counter = counters.find(found)
    meter = PeakMeter(found)
    meter.start()
    description = machine.describe(found)
    stored = machine.limits(out / description.id)
    return {
        "machine": description.model_dump(mode="json", exclude={"limits"}),
        "limits": _UNMEASURED if stored is None else stored.model_dump(mode="json"),
        "device": found.model_dump(mode="json"),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_average": environment.load_average(),
        },
        "memory": {name: reading.model_dump(mode="json") for name, reading in meter.read().items()},
        "energy": _energy(counter),
        "native_kernels": _native(found),
        "kernels": _kernels(found),
        "modes": _modes(found),
        "extras": _extras(),
        "models": [{"name": model.name, "cached": model.cached} for model in known()],
        "environment": environment.describe().model_dump(mode="json"),
    }


_UNMEASURED = {
    "kind": "unavailable",
    "reason": "not measured yet: compresskit doctor --measure",
}


def _energy(counter: Any) -> dict[str, Any]:
    if not counter.answers():
        return {"kind": "unavailable", "reason": counter.reason()}
    return {"kind": "available", "source": counter.source, "scope": counter.scope}


def _kernels(device: Device) -> list[dict[str, Any]]:
    import torch
    from compresskit_kernels import probe

    from compresskit.traits import Trait

    dtype = torch.bfloat16 if Trait.BF16 in device.traits else torch.float32
    return [
        {
            "op": row.op,
            "implementation": row.implementation,
            "detail": row.detail,
            "rows": row.rows,
            "against_dense": round(row.speedup, 2),
            "against_best_dense": round(row.best_speedup, 2),
            "microseconds": round(row.microseconds, 1),
            "shape": f"{row.rows}x{probe.WIDTH} by {probe.HEIGHT}x{probe.WIDTH}, "
            f"{str(dtype).removeprefix('torch.')}",
        }
        for row in probe.examine(device.kind, dtype)
    ]


def _native(device: Device) -> str:
    """Whether our own CPU products are built here, or why not."""
    from compresskit_kernels.native import build

    if device.kind != "cpu":
        return "not needed on CUDA"
    return "built for this CPU" if build.available() else f"unavailable: {build.reason()}"


def _modes(device: Device) -> dict[str, str]:
    import shutil

    from compresskit.traits import Trait

    cuda = device.kind == "cuda"
    if cuda:
        prepacked = "unavailable: for the CPU only"
    elif Trait.BF16 in device.traits:
        prepacked = "available for bfloat16 models"
    else:
        prepacked = "unavailable: this CPU has no bfloat16 instructions"
    compiler = shutil.which("g++") or shutil.which("clang++")
    compiled = "available" if cuda or compiler else "unavailable: no C++ compiler (g++, clang++)"
    return {"eager": "available", "prepacked": prepacked, "compiled": compiled}


def _extras() -> dict[str, str]:
    from importlib.util import find_spec

    modules = {
        "llamacpp": "xllamacpp",
        "lm-eval": "lm_eval",
        "triton": "triton",
        "torchao": "torchao",
    }
    return {
        extra: "installed"
        if find_spec(module)
        else f"not installed: pip install 'compresskit[{extra}]'"
        for extra, module in modules.items()
    }


def _limits(stored: dict[str, Any]) -> list[str]:
    """The machine's limits in words, one a line."""
    from compresskit.units import Unit, format_quantity

    if "reason" in stored:
        return [stored["reason"]]
    threads = stored["threads"]
    how = "" if threads is None else f", {threads} CPU thread{'' if threads == 1 else 's'}"
    words = []
    for key, name in (
        ("copy_bytes_per_second", "copy"),
        ("matmul_flops_per_second", "matmul"),
        ("dispatch_seconds", "dispatch"),
    ):
        one = stored[key]
        if one["kind"] == "measured":
            number = format_quantity(one["value"], Unit(one["unit"]))
            words.append(f"{name} {number} ({one['source']}{how})")
        else:
            words.append(f"{name} {one.get('reason', 'estimated')}")
    return words


def _products(rows: list[dict[str, Any]]) -> list[str]:
    """One line a product: how it compares with dense at each number of rows."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        ratios = ", ".join(
            f"M={row['rows']} {row['against_dense']}x ({row['against_best_dense']}x)"
            for row in mine
        )
        slow = [str(row["rows"]) for row in mine if row["against_dense"] < 1]
        note = f"; slower than dense at M={', '.join(slow)}" if slow else ""
        lines.append(
            f"{op}: {mine[0]['implementation']}, against dense (best dense): {ratios}{note}"
        )
    return lines


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    from compresskit.units import Unit, format_quantity

    console = Console()

    def line(name: str, value: object) -> None:
        console.print(f"{name:<14}{value}", markup=False, highlight=False, soft_wrap=True)

    device, machine = report["device"], report["machine"]
    line("device", f"{device['name']} ({device['kind']}, {device['capability']})")
    line("memory", format_quantity(device["memory_bytes"], Unit.BYTE))
    line("traits", ", ".join(device["traits"]) or "none")
    line("cores", f"{report['threads']['cores']}, load {report['threads']['load_average']}")
    energy = report["energy"]
    line("energy", energy.get("reason") or f"{energy['source']} ({energy['scope']})")
    for words in _limits(report["limits"]):
        line("limit", words)
    for name, state in report["modes"].items():
        line("mode", f"{name}: {state}")
    line("native", report["native_kernels"])
    for words in _products(report["kernels"]):
        line("kernel", words)
    for name, state in report["extras"].items():
        line("extra", f"{name}: {state}")
    for model in report["models"]:
        line("model", f"{model['name']}: {'ready' if model['cached'] else 'not downloaded yet'}")
    line("machine id", machine["id"])
