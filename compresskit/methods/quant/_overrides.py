"""Bits that follow the name of a layer: "*.down_proj=8", "model.layers.0.*=dense".

The first pattern that matches a name wins, so particular ones stand before general ones. A pattern
that decides nothing is an error: it is a typing mistake, or stands behind one that takes it all.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator

from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.methods.quant._group import Bits, scheme
from compresskit.methods.quant._rowwise import Rounding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compresskit.methods.quant._base import AbstractQuant

DENSE = "dense"
WIDTHS = ("2", "3", "4", "5", "6", "7", "8", DENSE)


class Rule(NamedTuple):
    """What one override says."""

    pattern: str
    bits: int | None
    """None: left dense."""


def parse(text: str) -> Rule:
    """Read "pattern=bits" or "pattern=dense".

    >>> parse("*.down_proj=8")
    Rule(pattern='*.down_proj', bits=8)

    Raises:
        ValueError: it is written otherwise, or the bits are not 2 to 8.
    """
    pattern, _, bits = text.rpartition("=")
    if not pattern or bits not in WIDTHS:
        raise ValueError(
            f"{text!r} is no override: write PATTERN=BITS with 2 to 8 bits, or PATTERN=dense, "
            'such as "*.down_proj=8"'
        )
    return Rule(pattern, None if bits == DENSE else int(bits))


def _checked(layers: tuple[str, ...]) -> tuple[str, ...]:
    for text in layers:
        parse(text)
    return layers


Layers = Annotated[tuple[str, ...], AfterValidator(_checked)]
"""A field of overrides, checked when the method is built."""


def resolve(names: list[str], layers: tuple[str, ...]) -> dict[str, int | None]:
    """Name -> bits (None: dense) for the names that an override decides.

    Raises:
        SpecError: an override decides nothing.
    """
    rules = [parse(text) for text in layers]
    decided: dict[str, int | None] = {}
    useful: set[Rule] = set()
    for name in names:
        if (rule := _first(name, rules)) is not None:
            decided[name] = rule.bits
            useful.add(rule)
    for text, rule in zip(layers, rules, strict=True):
        if rule in useful:
            continue
        if any(fnmatchcase(name, rule.pattern) for name in names):
            raise SpecError(
                f"layers: {text!r} decides nothing, since overrides before it take every layer "
                "that it matches. The first match wins: put the particular ones first."
            )
        raise SpecError(
            f"layers: {rule.pattern!r} matches no layer that would be quantised. "
            f"Names look like {', '.join(map(repr, names[:3])) or 'none'}."
        )
    return decided


def _first(name: str, rules: Iterable[Rule]) -> Rule | None:
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def _bits(name: str, rules: Iterable[Rule]) -> int | None:
    rule = _first(name, rules)
    return None if rule is None else rule.bits


def owners(
    model: Any, *, with_head: bool, skip: tuple[str, ...], with_embeddings: bool
) -> dict[str, str]:
    """Name of each weight that would be quantised -> the module it is in.

    They differ for fused experts, whose two parameters count as weights of their own. An embedding
    that shares the head's weight goes by the head's name.
    """
    top = modules.head(model)
    linears = [s.name for s in modules.linears(model) if with_head or s.module is not top]
    found = {name: name for name in linears}
    for site in modules.experts(model):
        for part in ("gate_up_proj" if site.module.has_gate else "up_proj", "down_proj"):
            found[f"{site.name}.{part}"] = site.name
    kept = {
        name: owner
        for name, owner in found.items()
        if not any(fnmatchcase(owner, pattern) for pattern in skip)
    }
    if with_embeddings and not modules.is_tied(model):
        embedding = modules.embedding(model).name
        kept[embedding] = embedding
    return kept


def left_out(decided: dict[str, int | None], owner: dict[str, str]) -> tuple[str, ...]:
    """Modules that overrides leave dense.

    Raises:
        SpecError: only a part of one is to be left dense.
    """
    dense = dict.fromkeys(owner[name] for name, bits in decided.items() if bits is None)
    for name, module in owner.items():
        if module in dense and decided.get(name, 0) is not None:
            raise SpecError(
                f"layers: {module!r} is packed as a whole, so {name!r} cannot stay in it beside a "
                "dense weight. Leave all of it dense, or none."
            )
    return tuple(dense)


def suggest(widths: dict[str, int], patterns: dict[str, int]) -> tuple[int, tuple[str, ...]]:
    """The commonest width, and overrides that give every weight of `widths` its own.

    `patterns` are tried first; where they do not single the weights out, names take their place.
    """
    found = list(widths.values())
    common = max(sorted(set(found)), key=found.count)
    for rules in (patterns, widths):
        layers = tuple(f"{pattern}={bits}" for pattern, bits in rules.items() if bits != common)
        read = [parse(text) for text in layers]
        if all((_bits(name, read) or common) == bits for name, bits in widths.items()):
            break
    return common, layers


def round_to_nearest(
    method: AbstractQuant,
    model: Any,
    *,
    bits: Bits,
    layers: tuple[str, ...] = (),
    **options: Any,
) -> Rounding:
    """Every layer of `model` to `bits`, or to what `layers` says of it.

    `options` are those of `_group.scheme`.

    Raises:
        SpecError: an override decides nothing.
    """
    owner = owners(
        model,
        with_head=method.head,
        skip=method.skip,
        with_embeddings=method.embeddings,
    )
    decided = resolve(list(owner), layers) if layers else {}
    dense = left_out(decided, owner)
    if method.embeddings and modules.embedding(model).name in dense:
        raise SpecError("layers: to leave the embedding dense, set embeddings to false.")
    widths = {bits, *(found for found in decided.values() if found is not None)}
    schemes = {wide: scheme(bits=wide, **options) for wide in sorted(widths)}
    return Rounding(
        lambda site: schemes[decided.get(site.name) or bits],
        (*method.skip, *dense),
    )
