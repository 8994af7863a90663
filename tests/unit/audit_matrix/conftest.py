"""Every speculative method that claims to be lossless passes the audit, however it is run.

    method (found by path) x {greedy, temperature 1, top-p 0.9} x {eager, compiled} x {1 row, 4 rows}
                                                                                       ▲
                                            one test file each: two workers share the matrix, and
                                            neither cells nor compiled graphs are shared across it

A new file under methods/speculative is taken up by itself; what a stack does not allow is skipped
with the reason that it gives. The exact cells and the compiled graphs are shared by all methods:
compiled passes of one batch are filled up to the widest block of any.

Power: a chi-square divergence of 0.2 of the first three tokens would be noticed with 90 %; the
verdict is `inconclusive`, and the test fails, if it would not. Where three tokens hardly meet a
draft, because the drafter begins blank, six are taken together.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from compresskit import artefact as artefacts, catalogue, workload
from compresskit.audit import prompts as pieces
from compresskit.audit.answer import loop
from compresskit.audit.conduct import conduct, laws, plainly
from compresskit.audit.document import Asked
from compresskit.audit.held import auditable
from compresskit.engines.native import Native
from compresskit.errors import Conflict, InputError, MissingExtra
from compresskit.hf.load import dtype_name
from compresskit.method import Context
from compresskit.spec import EngineSpec, MethodSpec, ModelSpec, RunSpec, SamplingSpec
from compresskit.stack import build
from compresskit.system import Request
from compresskit.traits import Trait

SAMPLINGS = {
    "greedy": SamplingSpec(),
    "temperature 1": SamplingSpec(temperature=1.0),
    "top-p 0.9": SamplingSpec(temperature=1.0, top_p=0.9),
}


def lossless(name: str) -> bool:
    return (
        Trait.LOSSLESS not in catalogue.get(name)(**catalogue.get(name).example).effects().removes
    )


NAMES = [
    name for name in catalogue.method_names() if name.startswith("speculative/") and lossless(name)
]
MODES = [
    "eager",
    pytest.param(
        "compiled",
        marks=[
            pytest.mark.slow,
            pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
            pytest.mark.skipif(
                not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
            ),
        ],
    ),
]


def plan_of(name: str, mode: str):
    params = dict(catalogue.get(name).example)
    return artefacts.plan(
        RunSpec(
            model=ModelSpec(name="tiny"),
            device="cpu",
            engine=EngineSpec(mode=mode),
            stack=(catalogue.normalise(MethodSpec(name=name, params=params)),),
        )
    )


def asked_for(sampling: SamplingSpec, batch: int) -> Asked:
    return Asked(
        sampling=sampling,
        batch=batch,
        draws=240 if batch == 1 else 320,
        detect=0.2,
        prompts=8,
        greedy_tokens=20,
    )


class Bench:
    """One target in one mode, and the models that methods load beside it, each prepared once."""

    def __init__(self, mode: str, models: ExitStack) -> None:
        self.engine = Native(mode=mode)
        self.mode, self.models = mode, models
        self.others: dict[str, object] = {}
        self.finished: dict[tuple[int, tuple[int, ...]], object] = {}
        self.built: dict[str, object] = {}
        self.bare = self.open(ModelSpec(name="tiny"))
        widest = [
            1 + getattr(plan_of(name, mode).methods[0].method, "widest", int)() for name in NAMES
        ]
        self.whole = self.engine.finish(replace(self.bare, widths=(1, max(widest))))

    def open(
        self,
        model: ModelSpec,
        methods: tuple[str, ...] = (),
        needed: frozenset[Trait] = frozenset(),
    ):
        key = f"{model.model_dump_json()} {methods}"
        if key not in self.others:
            path = artefacts.find_model(model).path
            device = artefacts.devices.resolve("cpu")
            opened = self.models.enter_context(self.engine.open(path, model, device))
            placed = catalogue.place(tuple(catalogue.parse_method(text) for text in methods))
            self.others[key] = build(placed, opened, self.context) if placed else opened
        return self.others[key]

    @property
    def context(self) -> Context:
        return Context(
            load=self.open,
            calibration=lambda text, count: workload.calibration(self.bare.tokenizer, text, count),
            seed=0,
            dtype=dtype_name(self.bare.model),
            finish=self.finish,
        )

    def finish(self, system):
        key = (id(system.model), system.widths)
        if key not in self.finished:
            # The system keeps the model alive, so that no other one gets its id.
            self.finished[key] = (system, self.engine.finish(system))
        return replace(
            system,
            **{
                part: getattr(self.finished[key][1], part)
                for part in ("step", "new_cache", "fixed_widths")
            },
        )

    def system(self, plan):
        """The stack of `plan` on the shared target; compiled passes go through the shared graphs."""
        if plan.spec.label() not in self.built:
            self.built[plan.spec.label()] = self._built(plan)
        return self.built[plan.spec.label()]

    def _built(self, plan):
        applied = build(plan.methods, self.bare, self.context)
        if applied.step is not self.bare.step or applied.new_cache is not self.bare.new_cache:
            applied = self.finish(applied)  # it brings a step of its own
        else:
            shared = ("step", "new_cache", "widths", "fixed_widths")
            applied = replace(applied, **{part: getattr(self.whole, part) for part in shared})
        for prepare in applied.settle:
            applied = prepare(applied)
        return applied


@pytest.fixture(scope="module")
def benches():
    with ExitStack() as models:
        made: dict[str, Bench] = {}

        def bench(mode: str) -> Bench:
            if mode not in made:
                made[mode] = Bench(mode, models)
            return made[mode]

        yield bench


@pytest.fixture(scope="module")
def shared(benches):
    """Prompts and cells, from the eager target: what is asked for -> (prompts, cells)."""
    known = {}

    def parts(asked: Asked):
        if asked not in known:
            plain = plainly(benches("eager").bare)
            rows = pieces.candidates(plain, asked, asked.prompts)
            rows = pieces.ragged(rows) if asked.batch > 1 else rows
            known[asked] = rows, laws(plain, asked)
        return known[asked]

    return parts


def check_lossless(name, how, mode, batch, benches, shared):
    """One cell of the matrix: skipped where a stack refuses, failed where the audit finds a loss."""
    plan = plan_of(name, mode)
    try:
        auditable(plan.methods, plan.check(), batch)
        bench = benches(mode)
        system = bench.system(plan)
    except (Conflict, MissingExtra) as reason:
        pytest.skip(str(reason))
    try:
        for _ in loop_of(system, SAMPLINGS[how]):
            pass
    except InputError as reason:
        pytest.skip(str(reason))  # a row that refuses to sample
    found = audited(system, asked_for(SAMPLINGS[how], batch), shared, how == "greedy")
    assert found.verdict == "lossless", found.reasons


def loop_of(system, sampling):
    """One token, to hear whether the request is refused."""
    return system.generate(Request(torch.tensor([[5, 6, 7]]), 1, sampling))


def audited(system, asked, shared, identity):
    return conduct(
        loop(system),
        plainly(system),
        asked,
        label="matrix",
        model="tiny",
        law=lambda asked: shared(asked)[1],
        prompts=shared(asked)[0],
        rule=False,
        identity=identity,
    )
