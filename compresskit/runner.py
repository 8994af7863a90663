"""Run one spec and return one record.

    spec ──► model files ──► traits ──► engine.open ──► stack.build ──► turns ──► passes ──► record
                               │                                        │
                        conflict: skipped          one sample of every speed pass at a time, so that
                                                   artefacts in several processes can alternate

`run` holds the only broad `except` of the project: whatever a run dies of becomes a `failed`
record, so a suite goes on. A wrong request (`UsageError`) is not the run's failure and is raised.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from compresskit_kernels import dispatch

from compresskit import catalogue, validity, workload
from compresskit.artefact import opened, plan, silent
from compresskit.errors import CompressKitError, Conflict, UsageError
from compresskit.hf import load, parallel
from compresskit.hf.tokenizer import tokenizer_digest
from compresskit.measure import clock, engagement, environment, passes, step_cost, telemetry
from compresskit.measure.energy.counters import Null
from compresskit.measure.energy.turns import Energy
from compresskit.measure.memory.request import memory_pass
from compresskit.measure.yardstick import Yardstick
from compresskit.quality.evaluate import evaluate
from compresskit.record import Block, DeviceFacts, ModelFacts, Passes, Quality, Record, Turn
from compresskit.traits import Trait

if TYPE_CHECKING:
    from compresskit.artefact import Notify, Opened, Plan
    from compresskit.spec import RunSpec
    from compresskit.system import System


class Go(NamedTuple):
    """Permission to take one turn: which round it is, and the place within the round."""

    round: int
    position: int = 0


Turns = Callable[[int], Iterable[Go]]
"""Given how many samples the protocol wants, when to take them. Asking for the next turn says that
the last one is over; it may block until it is this artefact's turn."""


def alone(samples: int) -> Iterable[Go]:
    """Turns of a run that shares the machine with no other artefact: one after the other."""
    return map(Go, range(samples))


def run(
    spec: RunSpec,
    notify: Notify = silent,
    *,
    turns: Turns = alone,
    pair: str | None = None,
    speed_only: bool = False,
) -> Record:
    """Run `spec` and return its record: ok, skipped or failed.

    `turns` decides when samples are taken; `pair` names the interleaved session they belong to;
    `speed_only` leaves out memory and quality, which an earlier record of this spec has.

    Raises:
        UsageError: the spec cannot be run by anybody (unknown model, text too short, ...).
    """
    started = environment.now()
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
            record = _measured(ready, artefact, base, notify, turns, pair, speed_only)
    except UsageError:
        raise
    except Conflict as error:
        return finish(Record(**base, status="skipped", reason=str(error)))
    except Exception as error:  # noqa: BLE001 - the one place where any failure becomes data
        return finish(Record(**base, status="failed", reason=describe_failure(error)))
    return finish(record)


def _measured(
    plan: Plan,
    artefact: Opened,
    base: dict[str, Any],
    notify: Notify,
    turns: Turns,
    pair: str | None,
    speed_only: bool,
) -> Record:
    spec, system = plan.spec, artefact.system
    wanted = set(spec.protocol.passes) - ({"memory", "quality"} if speed_only else set())
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
        tick=notify,
    )
    compiled = None
    # Before compiling: where a step is replayed from a CUDA graph, its routines are called, and
    # noted, only while the graph is made.
    dispatch.reset()
    if spec.engine.mode == "compiled":
        compiled = _warm_compile(bench) + (artefact.setup.compile_seconds or 0.0)
    before = environment.now()
    # A simulated saving has no speed to show, so none is measured.
    real = not system.simulated
    speed = passes.Speed(
        bench,
        latency="latency" in wanted and real,
        throughput="throughput" in wanted and real,
        batched=Trait.BATCH in artefact.traits,
    )
    energy = _energy(bench, spec) if "energy" in wanted and real else None
    yardstick = Yardstick(plan.device)
    watch = telemetry.Watch(system.device)
    taken: list[Turn] = []
    costs = artefact.setup.step_costs
    with clock.settled():
        speed.warm()
        if costs is None and "latency" in wanted and real and max(system.widths) > 1:
            notify("latency", "passes of several tokens")
            costs = step_cost.probe(system, bench.request(0, bench.workload.batch_sizes[0]))
        for index, go in enumerate(turns(spec.protocol.repeats)):
            watch.look()
            at, pace = time.perf_counter(), yardstick.read()
            taken.append(Turn(round=go.round, position=go.position, started=at, yardstick=pace))
            speed.turn(index)
            if energy is not None:
                notify("energy", f"window {index + 1}")
                energy.turn(index)
    watch.look()
    load_average = environment.load_average()
    done = speed.result()
    if energy is not None:
        done["energy"] = energy.result()
    if "memory" in wanted:
        notify("memory")
        done["memory"] = memory_pass(bench, phases=artefact.phases, parameters=artefact.parameters)
    # What the quality pass multiplies with (whole windows at once) says nothing about decoding.
    ran = {op: "; ".join(routines) for op, routines in dispatch.used().items()}
    profile = engagement.profiled_step(bench) if "memory" in wanted else {}
    block = Block(
        pair=pair,
        turns=tuple(taken),
        started_at=before,
        passes=Passes(**done),
        load_average=load_average,
        telemetry=watch.seen(),
    )
    quality = judge_quality(plan, artefact, notify) if "quality" in wanted else None
    return Record(
        **{**base, "device": _used(base["device"], system, spec)},
        status="ok",
        model=model_facts(plan, artefact),
        prompts=prompts.facts,
        prompts_sha256=prompts.sha256,
        kernels={**system.kernels, **ran},
        simulated=system.simulated,
        facts={
            **system.facts,
            **({"profile": profile} if profile else {}),
            **({"synthetic": system.synthetic} if system.synthetic else {}),
        },
        setup=artefact.setup.model_copy(update={"compile_seconds": compiled, "step_costs": costs}),
        blocks=(block,),
        quality=quality,
    )


def _used(facts: DeviceFacts, system: System, spec: RunSpec) -> DeviceFacts:
    """The device of the record, with the number of GPUs where a placement decided about it."""
    if spec.engine.placement is None or system.device.kind != "cuda":
        return facts
    used = {*system.device.ordinals, *parallel.metered(spec.engine.placement, system.device)}
    return facts.model_copy(update={"gpus": len(used)})


def _energy(bench: passes.Bench, spec: RunSpec) -> Energy:
    """The energy windows; none that end by the clock where processes have to step together."""
    if not parallel.demands(spec.engine.placement):
        return Energy(bench)
    plain = bench.protocol.model_copy(update={"estimate_energy": False})
    why = "windows end by the clock, which the processes of 'tensor_parallel' would not read alike"
    return Energy(replace(bench, protocol=plain), counter=Null(why))


def _warm_compile(bench: passes.Bench) -> float:
    """Decode once so that compilation is paid, and recorded, before anything is measured."""
    began = time.perf_counter()
    bench.timed("span", 0, bench.workload.batch_sizes[0])
    return time.perf_counter() - began


def judge_quality(plan: Plan, artefact: Opened, notify: Notify = silent) -> Quality:
    """Score the artefact, beside a freshly loaded baseline unless it is the baseline itself.

    An artefact whose output is made up has no quality, and the note says so.
    """
    if (made_up := artefact.system.synthetic) is not None:
        return Quality(notes=(f"quality: unavailable, {made_up}",))
    spec = plan.spec
    eager = {**spec.engine.model_dump(mode="json"), "mode": "eager"}
    reference = spec.baseline().replace(engine=eager)
    arguments: dict[str, Any] = {
        "spec": spec.quality,
        "cache_changed": not {Trait.DENSE_CACHE, Trait.FULL_CONTEXT} <= artefact.traits,
        "batch_allowed": Trait.BATCH in artefact.traits,
        "baseline_digest": reference.digest(),
        "tiny": plan.source.kind == "tiny",
        "seed": spec.seed,
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
    return f"{type(error).__name__}: {error} (in {last.name}, {Path(last.filename).name}:{last.lineno})"


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
            started_at=environment.now(),
            status="failed",
            reason=reason,
        )
    )
