"""Run one spec and return one record.

    spec ──► model files ──► traits ──► engine.open ──► stack.build ──► passes ──► record
                               │
                        conflict: skipped

`run` holds the only broad `except` of the project: whatever a run dies of becomes a `failed`
record, so a suite goes on. A wrong request (`UsageError`) is not the run's failure and is raised.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compresskit import catalogue, device as devices, stack, validity, workload
from compresskit.errors import CompressKitError, Conflict, RunError, UsageError
from compresskit.hf import load
from compresskit.hf.sources import Progress, ResolvedModel, resolve, silent as no_progress
from compresskit.hf.tokenizer import tokenizer_digest
from compresskit.measure import environment, passes
from compresskit.measure.memory import PeakMeter
from compresskit.method import Context
from compresskit.quality.evaluate import evaluate
from compresskit.record import Block, DeviceFacts, ModelFacts, Passes, Quality, Record, Setup
from compresskit.traits import INITIAL, Trait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.device import Device
    from compresskit.engine import AbstractEngine
    from compresskit.method import Placed
    from compresskit.record import Reading
    from compresskit.spec import ModelSpec, RunSpec
    from compresskit.system import System


class Notify(Protocol):
    """Told what is going on; the command line turns it into progress."""

    def __call__(self, phase: str, detail: str = "") -> None:
        """`phase` is one of load, apply, the passes; `detail` is for people."""


def silent(phase: str, detail: str = "") -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Plan:
    """A spec with everything that is decided before weights are loaded."""

    spec: RunSpec
    source: ResolvedModel
    device: Device
    engine: AbstractEngine
    methods: tuple[Placed, ...]

    def start_traits(self) -> frozenset[Trait]:
        """Traits of the empty stack."""
        return self.engine.traits(self.source.path, self.device) | INITIAL

    def check(self) -> frozenset[Trait]:
        """Traits after the stack; raises `Conflict`."""
        return stack.check(
            self.methods,
            self.start_traits(),
            last=self.engine.requires(),
            mode=self.spec.engine.mode,
        )


def plan(spec: RunSpec, progress: Progress = no_progress) -> Plan:
    """Find the model, the device, the engine and the methods of `spec`; loads no weights.

    Raises:
        UsageError: something in the spec does not exist or cannot be used.
    """
    return Plan(
        spec=spec,
        source=find_model(spec.model, progress),
        device=devices.resolve(spec.device),
        engine=catalogue.engine(spec.engine),
        methods=catalogue.place(spec.stack),
    )


def find_model(model: ModelSpec, progress: Progress = no_progress) -> ResolvedModel:
    """Resolve a model spec to a local folder, downloading and converting where needed."""
    return resolve(
        model.name,
        revision=model.revision,
        allow_pickle=model.allow_pickle,
        trust_remote_code=model.trust_remote_code,
        progress=progress,
    )


@dataclass(frozen=True)
class Opened:
    """A system ready to run, with what it took to get there."""

    system: System
    setup: Setup
    peaks: dict[str, Reading]
    parameters: int
    traits: frozenset[Trait]


@contextmanager
def opened(plan: Plan, notify: Notify = silent) -> Iterator[Opened]:
    """Load the model, apply the stack, prepare the mode.

    Raises:
        Conflict: the stack does not fit; raised before any weight is loaded.
    """
    traits = plan.check()
    torch.set_num_threads(plan.spec.protocol.threads)
    torch.manual_seed(plan.spec.seed)
    meter = PeakMeter(plan.device)
    meter.start()
    notify("load", plan.source.name)
    began = time.perf_counter()
    with plan.engine.open(plan.source.path, plan.spec.model, plan.device) as bare:
        loaded_at = time.perf_counter()
        peaks = {f"{name}/load": value for name, value in meter.read().items()}
        parameters = sum(p.numel() for p in bare.model.parameters())
        meter.start()
        notify("apply", plan.spec.label())
        system = plan.engine.finish(stack.build(plan.methods, bare, _context(plan, bare)))
        gc.collect()
        peaks.update({f"{name}/apply": value for name, value in meter.read().items()})
        setup = Setup(load_seconds=loaded_at - began, apply_seconds=time.perf_counter() - loaded_at)
        yield Opened(system, setup, peaks, parameters, traits)


def _context(plan: Plan, bare: System) -> Context:
    def load_other(model: ModelSpec) -> System:
        other = find_model(model)
        # The engine's context manager only frees on exit; a draft lives as long as its target.
        return plan.engine.open(other.path, model, plan.device).__enter__()

    def calibration(count: int) -> list[int]:
        return workload.calibration(bare.tokenizer, count)

    return Context(
        load=load_other,
        calibration=calibration,
        seed=plan.spec.seed,
        dtype=load.dtype_name(bare.model),
    )


def run(spec: RunSpec, notify: Notify = silent) -> Record:
    """Run `spec` and return its record: ok, skipped or failed.

    Raises:
        UsageError: the spec cannot be run by anybody (unknown model, text too short, ...).
    """
    started = now()
    base = {
        "digest": spec.digest(),
        "label": catalogue.label(spec.stack),
        "spec": spec,
        "started_at": started,
        "environment": environment.describe(),
    }
    try:
        ready = plan(spec)
        base["device"] = DeviceFacts(
            **ready.device.model_dump(exclude={"traits"}), threads=spec.protocol.threads
        )
        with opened(ready, notify) as artefact:
            record = _measured(ready, artefact, base, notify)
    except UsageError:
        raise
    except Conflict as error:
        return finish(Record(**base, status="skipped", reason=str(error)))
    except Exception as error:  # noqa: BLE001 - the one place where any failure becomes data
        return finish(Record(**base, status="failed", reason=describe_failure(error)))
    return finish(record)


def _measured(plan: Plan, artefact: Opened, base: dict[str, Any], notify: Notify) -> Record:
    spec, system = plan.spec, artefact.system
    wanted = set(spec.protocol.passes)
    most = max(spec.workload.batch_sizes)
    prompts = workload.prompts(
        system.tokenizer,
        spec.workload,
        count=most * (spec.protocol.warmups + spec.protocol.repeats),
        seed=spec.seed,
    )
    bench = passes.Bench(
        system=system,
        prompts=prompts.ids,
        workload=spec.workload,
        protocol=spec.protocol,
        sampling=spec.sampling,
        seed=spec.seed,
    )
    compiled = _warm_compile(bench) if spec.engine.mode == "compiled" else None
    done: dict[str, Any] = {}
    before = now()
    # A simulated saving has no speed to show, so none is measured.
    if "latency" in wanted and not system.simulated:
        notify("latency")
        done["latency"] = passes.latency(bench)
    if "throughput" in wanted and not system.simulated:
        notify("throughput")
        done["throughput"] = passes.throughput(bench, batched=Trait.BATCH in artefact.traits)
    if "memory" in wanted:
        notify("memory")
        done["memory"] = passes.memory(bench, peaks=artefact.peaks, parameters=artefact.parameters)
    if "energy" in wanted and not system.simulated:
        notify("energy")
        done["energy"] = passes.energy_pass(bench)
    block = Block(started_at=before, passes=Passes(**done), load_average=_load())
    quality = judge_quality(plan, artefact, notify) if "quality" in wanted else None
    return Record(
        **base,
        status="ok",
        model=model_facts(plan, artefact),
        prompts=prompts.facts,
        prompts_sha256=prompts.sha256,
        kernels=dict(system.kernels),
        simulated=system.simulated,
        facts=dict(system.facts),
        setup=artefact.setup.model_copy(update={"compile_seconds": compiled}),
        blocks=(block,),
        quality=quality,
    )


def _warm_compile(bench: passes.Bench) -> float:
    """Decode once so that compilation is paid, and recorded, before anything is measured."""
    began = time.perf_counter()
    bench.timed("span", 0, bench.workload.batch_sizes[0])
    return time.perf_counter() - began


def judge_quality(plan: Plan, artefact: Opened, notify: Notify = silent) -> Quality:
    """Score the artefact, beside a freshly loaded baseline unless it is the baseline itself."""
    spec = plan.spec
    reference = spec.baseline().replace(engine={"name": spec.engine.name, "mode": "eager"})
    arguments: dict[str, Any] = {
        "spec": spec.quality,
        "cache_changed": not {Trait.DENSE_CACHE, Trait.FULL_CONTEXT} <= artefact.traits,
        "batch_allowed": Trait.BATCH in artefact.traits,
        "baseline_digest": reference.digest(),
        "progress": lambda label, done, total: notify("quality", f"{label} {done}/{total}"),
    }
    notify("quality")
    began = time.perf_counter()
    if reference.digest() == spec.digest():
        quality = evaluate(artefact.system, None, **arguments)
    else:
        dense = catalogue.engine(reference.engine)
        with dense.open(plan.source.path, spec.model, plan.device) as baseline:
            quality = evaluate(artefact.system, baseline, **arguments)
    return quality.model_copy(update={"seconds": time.perf_counter() - began})


def model_facts(plan: Plan, artefact: Opened) -> ModelFacts:
    """What was really loaded."""
    model = artefact.system.model
    # A checkpoint that comes quantised is no full-precision baseline, whatever its source.
    quantised = "quantization_config" in load.read_config(plan.source.path)
    return ModelFacts(
        kind=plan.source.kind,
        revision=plan.source.revision,
        baseline="quantized" if quantised else plan.source.baseline,
        architecture=type(model).__name__,
        parameters=artefact.parameters,
        dtype=load.dtype_name(model),
        tokenizer_sha256=tokenizer_digest(artefact.system.tokenizer),  # type: ignore[arg-type]
    )


def describe_failure(error: BaseException) -> str:
    """One line for people; the last frame tells where to look."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return f"out of memory: {error}. Use a smaller batch, a shorter prompt or a smaller dtype."
    if isinstance(error, CompressKitError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (in {last.name}, {os.path.basename(last.filename)}:{last.lineno})"  # noqa: PTH119


def finish(record: Record) -> Record:
    """Attach the verdict."""
    return record.model_copy(update={"validity": validity.judge(record)})


def failed(spec: RunSpec, reason: str) -> Record:
    """The record of a run whose process died."""
    return finish(
        Record(
            digest=spec.digest(),
            label=catalogue.label(spec.stack),
            spec=spec,
            started_at=now(),
            status="failed",
            reason=reason,
        )
    )


def now() -> str:
    """RFC 3339, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _load() -> tuple[float, float, float] | None:
    return os.getloadavg() if hasattr(os, "getloadavg") else None


__all__ = [
    "Notify",
    "Opened",
    "Plan",
    "RunError",
    "failed",
    "find_model",
    "judge_quality",
    "opened",
    "plan",
    "run",
]
