"""`compresskit schema`: the JSON Schema of what is stored and of what is asked for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class What(StrEnum):
    """A document with a schema."""

    RECORD = "record"
    SPEC = "spec"


def schema(
    what: Annotated[
        What, typer.Argument(help="record: a stored result; spec: a run.")
    ] = What.RECORD,
) -> None:
    """Print the JSON Schema of a record or of a run spec.

    [bold]Example[/bold]

      compresskit schema record > record.schema.json
    """
    import json

    from compresskit.record import Record
    from compresskit.spec import RunSpec

    model = Record if what is What.RECORD else RunSpec
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(mode="validation"),
    }
    print(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False))
