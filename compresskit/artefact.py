"""From a spec to an artefact: a model loaded, compressed and ready to decode.

plan(spec)     names become things: model folder, device, engine, methods; no weights
opened(plan)   traits checked, weights loaded, methods applied, decode mode prepared
"""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, get_args

import torch

from compresskit import catalogue, device as devices, stack, workload
from compresskit.errors import Conflict
from compresskit.hf import audit, load, modules, parallel, synthetic
from compresskit.hf.preload import import_architecture
from compresskit.hf.sources import Progress, ResolvedModel, resolve, silent as no_progress
from compresskit.measure import step_cost as step_cost_probe
from compresskit.measure.energy import counters, metering
from compresskit.measure.memory import weights
from compresskit.measure.memory.accounts import Accounts, runtime
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.method import Context, Outline, Replaced
from compresskit.metrics.speedup import costs_of
from compresskit.record import Setup
from compresskit.spec import Dtype, ModelSpec
from compresskit.system import Request
from compresskit.traits import INITIAL, Trait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.device import Device
    from compresskit.engine import AbstractEngine
    from compresskit.method import Placed
    from compresskit.record import Phase, StepCosts, Training
    from compresskit.spec import RunSpec
    from compresskit.stats.speculation import Costs
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
    """The run's model: what quality is measured against."""
    device: Device
    engine: AbstractEngine
    methods: tuple[Placed, ...]
    model: ModelSpec
    """What is loaded: the run's model, or the one that a method puts in its place."""
    loaded: ResolvedModel
    """Where that lies."""

    def start_traits(self) -> frozenset[Trait]:
        """Traits of the model that is loaded, before the stack."""
        return self.engine.traits(self.loaded.path, self.device) | INITIAL

    def replaced(self) -> Replaced | None:
        """What stands in for what; None where the run's own model is loaded."""
        if all(placed.method.stands_in() is None for placed in self.methods):
            return None
        asked = outline(self.spec.model, self.source)
        return Replaced(asked, outline(self.model, self.loaded))

    def check(self) -> frozenset[Trait]:
        """Traits after the stack; raises `Conflict`."""
        traits = stack.check(
            self.methods,
            self.start_traits(),
            last=self.engine.requires(),
            mode=self.spec.engine.mode,
            lost=self.engine.loses(self.device),
        )
        self.engine.vet(self.loaded.path, self.device)
        asked = outline(self.spec.model, self.source)
        loaded = outline(self.model, self.loaded)
        for placed in self.methods:
            target = loaded if placed.method.stands_in() is None else asked
            placed.method.vet(target, lambda model: outline(model, find_model(model)))
        return traits


def plan(spec: RunSpec, progress: Progress = no_progress) -> Plan:
    """Find the model, the device, the engine and the methods of `spec`; loads no weights.

    Raises:
        UsageError: something in the spec does not exist or cannot be used.
    """
    source = find_model(spec.model, progress)
    methods = catalogue.place(spec.stack)
    instead = _instead(spec, methods, source)
    device = devices.resolve(spec.device)
    return Plan(
        spec=spec,
        source=source,
        device=_reach(spec, device),
        engine=catalogue.engine(spec.engine),
        methods=methods,
        model=instead or spec.model,
        loaded=source if instead is None else find_model(instead, progress),
    )


def _reach(spec: RunSpec, device: Device) -> Device:
    """The device with the GPUs that the run may use."""
    if (placed := spec.engine.placement) is None:
        return device
    return device.using(parallel.own(placed, device) or devices.gpus(device))


def _instead(spec: RunSpec, methods: tuple[Placed, ...], source: ResolvedModel) -> ModelSpec | None:
    """The model that a method of the stack puts in the place of the run's.

    It is computed in the type that the run's own model would have had, whatever type it was saved
    in: types are not what the two should differ in.
    """
    found = next((one for placed in methods if (one := placed.method.stands_in())), None)
    if found is None:
        return None
    model = spec.model
    saved = load.checkpoint_dtype(load.read_config(source.path))
    own = saved if saved in get_args(Dtype) else "auto"
    named = {
        "name": found.name,
        "revision": found.revision,
        "dtype": own if model.dtype == "auto" else model.dtype,
        "allow_pickle": model.allow_pickle,
        "trust_remote_code": model.trust_remote_code,
    }
    return ModelSpec.model_validate(named)


def find_model(model: ModelSpec, progress: Progress = no_progress) -> ResolvedModel:
    """Resolve a model spec to a local folder, downloading and converting where needed."""
    return resolve(
        model.name,
        revision=model.revision,
        allow_pickle=model.allow_pickle,
        trust_remote_code=model.trust_remote_code,
        progress=progress,
    )


def outline(model: ModelSpec, source: ResolvedModel) -> Outline:
    """What can be told of a resolved model without its weights."""
    config = load.read_config(source.path)
    return Outline(
        name=model.name,
        path=source.path,
        config=config,
        bytes=synthetic.stored_bytes(source.path, config),
        revision=source.revision,
    )


@dataclass(frozen=True)
class Opened:
    """A system ready to run, with what it took to get there."""

    system: System
    setup: Setup
    phases: dict[str, Phase]
    """Memory of loading and compressing."""
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
    notify("load", plan.loaded.name)
    # The code of the architecture is the process's, not the weights': neither its bytes nor its
    # seconds are charged to the load.
    import_architecture(plan.loaded.path)
    meter = PeakMeter(plan.device)
    meter.start()
    books = Accounts(plan.device, runtime())
    meter_energy = metering.metered(
        counters.find(plan.device, parallel.metered(plan.spec.engine.placement, plan.device)),
        synchronize=devices.synchronizer(plan.device),
    )
    # Models that a method loads (a draft, a student) live as long as the target does.
    with ExitStack() as models, ExitStack() as setting_up:
        drawn = setting_up.enter_context(meter_energy)
        began = time.perf_counter()
        bare = models.enter_context(plan.engine.open(plan.loaded.path, plan.model, plan.device))
        loaded_at = time.perf_counter()
        phases = {"load": books.phase(meter.read(), bare.model)}
        parameters = modules.parameter_count(bare.model)
        tied = modules.is_tied(bare.model)
        meter.start()
        notify("apply", plan.spec.label())
        applied_from = time.perf_counter()
        calibrated: list[int] = []
        probed: list[_Probed] = []
        trained: list[Training] = []
        context = _context(plan, bare, models, calibrated, probed, trained.append, notify)
        system = plan.engine.finish(stack.build(plan.methods, bare, context))
        for prepare in system.settle:
            system = prepare(system)
        system = replace(system, facts=audit.added(system, tied=tied, parameters=parameters))
        gc.collect()
        applied_at = time.perf_counter()
        setting_up.close()
        phases["compress"] = books.phase(
            meter.read(), system.model, system.step, weights.beside(system)
        )
        # A probe of compiled steps builds them, which takes many times as long as timing them.
        compiled = plan.spec.engine.mode == "compiled" and bool(probed)
        building = sum(one.seconds for one in probed) if compiled else 0.0
        setup = Setup(
            load_seconds=loaded_at - began,
            apply_seconds=applied_at - applied_from - building,
            compile_seconds=building if compiled else None,
            calibration_tokens=sum(calibrated),
            energy=drawn.stored().reading,
            step_costs=probed[-1].costs if probed else None,
            training=trained[-1] if trained else None,
        )
        yield Opened(system, setup, phases, parameters, traits)


class _Probed(NamedTuple):
    """Costs of steps, and the seconds that it took to find them."""

    costs: StepCosts
    seconds: float


def _context(
    plan: Plan,
    bare: System,
    models: ExitStack,
    calibrated: list[int],
    probed: list[_Probed],
    trained: Callable[[Training], None],
    notify: Notify,
) -> Context:
    def load_other(
        model: ModelSpec, methods: tuple[str, ...] = (), needs: frozenset[Trait] = frozenset()
    ) -> System:
        path = find_model(model).path
        placed = catalogue.place(tuple(catalogue.parse_method(text) for text in methods))
        for one in placed:
            if (named := one.method.stands_in()) is not None:
                raise Conflict(
                    f"{one.name} takes the place of a run's model; {model.name} is a model beside it. "
                    f"Name {named.name} there itself."
                )
        engine = plan.engine.for_others()
        start = engine.traits(path, plan.device) | INITIAL
        left = stack.check(placed, start, last=engine.requires(), mode=plan.spec.engine.mode)
        for lacking in sorted(needs - left):
            raise Conflict(
                f"{model.name} is to work for {plan.spec.model.name} and needs {lacking.value!r}, which "
                f"{' and '.join(methods) if lacking in start else 'it'} does not leave it. "
                "Take another model or other methods."
            )
        other = models.enter_context(engine.open(path, model, plan.device))
        return stack.build(placed, other, context)

    def calibration(text: str, count: int) -> list[int]:
        calibrated.append(count)
        return workload.calibration(bare.tokenizer, text, count)

    def step_cost(system: System) -> Costs:
        notify("apply", "costs of a step")
        began = time.perf_counter()
        found = step_cost_probe.probe(system, _trial_request(plan, system), trial=True)
        probed.append(_Probed(found, time.perf_counter() - began))
        return costs_of(found)

    context = Context(
        load=load_other,
        calibration=calibration,
        seed=plan.spec.seed,
        dtype=load.dtype_name(bare.model),
        progress=lambda label, done, total: notify("apply", f"{label} {done}/{total}"),
        finish=plan.engine.finish,
        step_cost=step_cost,
        replaced=plan.replaced(),
        trained=trained,
    )
    return context


FEW = 8
"""Questions whose mean length stands for all."""


def _trial_request(plan: Plan, system: System) -> Request:
    """A request of the run's shape, of the text kept for calibration; as long as the context allows."""
    shape = plan.spec.workload
    length = shape.prompt_tokens
    if shape.text.startswith("questions:"):  # they have lengths of their own, often far below
        protocol = plan.spec.protocol
        count = min(FEW, shape.batch_sizes[0] * (protocol.warmups + protocol.repeats))
        asked = workload.prompts(system.tokenizer, shape, count=count, seed=plan.spec.seed).ids
        length = round(sum(map(len, asked)) / len(asked))
    count = min(length, system.context - shape.new_tokens)
    ids = workload.calibration(system.tokenizer, "calibration", max(count, 1))
    tokens = torch.tensor([ids] * shape.batch_sizes[0], device=system.device.torch)
    return Request(
        tokens=tokens,
        max_new_tokens=shape.new_tokens,
        sampling=plan.spec.sampling,
        seed=plan.spec.seed,
    )
