"""A format as typed on the command line: `topk:k=64`, `draws:n=12`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from compresskit.distill.teachers.cache.draws import DrawsFormat
from compresskit.distill.teachers.cache.topk import TopKFormat
from compresskit.errors import UnknownName
from compresskit.spec import parse_call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compresskit.distill.teachers.cache.formats import Format

FORMATS: Mapping[str, type[Format]] = MappingProxyType({"draws": DrawsFormat, "topk": TopKFormat})


def parse(text: str, *, option: str = "--cache") -> Format:
    """Read a format.

    Raises:
        UnknownName: there is no such format.
        SpecError: a parameter is unknown or out of range.
    """
    name, params = parse_call(text, option=option)
    if name not in FORMATS:
        raise UnknownName("format of a teacher cache", name, FORMATS)
    return FORMATS[name].decode(params, where=f"{option} {name}")
