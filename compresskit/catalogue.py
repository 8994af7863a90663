"""Find methods and engines by their path, and turn a suite into specs.

`quant/int8` is `compresskit/methods/quant/int8.py`: listing names imports nothing, asking for one
imports that one file. Packages outside register under the entry-point groups
`compresskit.methods` (name `family/name`) and `compresskit.engines`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from compresskit import engines as engine_package, methods as method_package
from compresskit.engine import AbstractEngine
from compresskit.errors import SpecError, UnknownName
from compresskit.method import AbstractMethod, Placed
from compresskit.spec import EngineSpec, MethodSpec, parse_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import ModuleType

    from pydantic import JsonValue

T = TypeVar("T")


@functools.cache
def method_names() -> tuple[str, ...]:
    """All methods, sorted: our own by path, others by entry point. Imports no method."""
    own = (
        f"{family.name}/{module.name}"
        for family in pkgutil.iter_modules(method_package.__path__)
        for module in pkgutil.iter_modules([f"{method_package.__path__[0]}/{family.name}"])
        if not module.name.startswith("_")
    )
    foreign = (point.name for point in entry_points(group="compresskit.methods"))
    return tuple(sorted({*own, *foreign}))


@functools.cache
def get(name: str) -> type[AbstractMethod]:
    """Import and return the one class of the method `name`; raise `UnknownName`."""
    if name not in method_names():
        raise UnknownName("method", name, method_names())
    for point in entry_points(group="compresskit.methods"):
        if point.name == name:
            return _checked(point.load(), AbstractMethod, name)  # type: ignore[type-abstract]
    family, _, stem = name.partition("/")
    module = importlib.import_module(f"{method_package.__name__}.{family}.{stem}")
    return _only_class(module, AbstractMethod, name)  # type: ignore[type-abstract]


@functools.cache
def engine_names() -> tuple[str, ...]:
    """All engines, sorted."""
    own = (
        m.name for m in pkgutil.iter_modules(engine_package.__path__) if not m.name.startswith("_")
    )
    return tuple(
        sorted({*own, *(point.name for point in entry_points(group="compresskit.engines"))})
    )


def engine(spec: EngineSpec) -> AbstractEngine:
    """Build the engine of a spec; raise `UnknownName`."""
    if spec.name not in engine_names():
        raise UnknownName("engine", spec.name, engine_names())
    for point in entry_points(group="compresskit.engines"):
        if point.name == spec.name:
            cls = _checked(point.load(), AbstractEngine, spec.name)  # type: ignore[type-abstract]
            break
    else:
        module = importlib.import_module(f"{engine_package.__name__}.{spec.name}")
        cls = _only_class(module, AbstractEngine, spec.name)  # type: ignore[type-abstract]
    options = spec.model_dump(mode="json", exclude={"name"})
    return cls.decode(options, where=f"engine {spec.name}")


def _only_class(module: ModuleType, base: type[T], name: str) -> type[T]:
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base) and member is not base and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise SpecError(
            f"{name}: {module.__name__} must define exactly one {base.__name__}, found {len(found)}."
        )
    return found[0]


def _checked(loaded: object, base: type[T], name: str) -> type[T]:
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise SpecError(f"entry point {name!r} does not name a {base.__name__}.")
    return loaded


def decode(name: str, params: Mapping[str, JsonValue]) -> AbstractMethod:
    """Build a method from its name and parameters; raise `UnknownName` or `SpecError`."""
    return get(name).decode(dict(params), where=name)


def normalise(spec: MethodSpec) -> MethodSpec:
    """Fill defaults and unify number types, so that equal stacks have equal digests."""
    method = decode(spec.name, spec.params)
    return MethodSpec(name=spec.name, params=method.model_dump(mode="json"))


def place(stack: Iterable[MethodSpec]) -> tuple[Placed, ...]:
    """Build every method of a stack."""
    return tuple(Placed(spec.name, decode(spec.name, spec.params)) for spec in stack)


def short_label(spec: MethodSpec) -> str:
    """Name with only the parameters that differ from their defaults."""
    cls = get(spec.name)
    plain: dict[str, Any] = {}
    for key, value in spec.params.items():
        field = cls.model_fields.get(key)
        default = (
            json.loads(json.dumps(field.get_default(call_default_factory=True))) if field else None
        )
        if field is None or field.is_required() or default != value:
            plain[key] = value
    return MethodSpec(name=spec.name, params=plain).label()


def label(stack: Iterable[MethodSpec], mode: str = "eager") -> str:
    """Name of a stack; with `mode`, of a run in that decode mode."""
    names = " + ".join(short_label(spec) for spec in stack) or "dense"
    return names if mode == "eager" else f"{names} ({mode})"


def parse_method(text: str) -> MethodSpec:
    """Read `family/name:key=value,key=value` as typed on the command line (`spec.parse_call`)."""
    name, params = parse_call(text, option="--method")
    return normalise(MethodSpec(name=name, params=params))


def describe(name: str) -> dict[str, Any]:
    """What a method is, for listings: summary, stage, traits and parameters with their help."""
    cls = get(name)
    effects = cls().effects()
    schema = cls.model_json_schema()["properties"] if cls.model_fields else {}
    return {
        "name": name,
        "stage": cls.stage.value,
        "summary": inspect.cleandoc(cls.__doc__ or "").partition("\n")[0],
        "requires": sorted(effects.requires),
        "removes": sorted(effects.removes),
        "adds": sorted(effects.adds),
        "parameters": [
            {
                "name": key,
                "default": schema[key].get("default"),
                "help": " ".join(schema[key].get("description", "").split()),
            }
            for key in cls.model_fields
        ],
    }
