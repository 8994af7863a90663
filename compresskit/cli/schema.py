"""`compresskit schema`: the JSON Schema of what is stored and of what is asked for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class What(StrEnum):
    """A document with a schema."""

    RECORD = "record"
    SPEC = "spec"
    PEER = "peer"
    AUDIT = "audit"


def schema(
    what: Annotated[
        What,
        typer.Argument(
            help="record: a stored result; spec: a run; peer: an imported result; audit: a verdict "
            "on a decode loop."
        ),
    ] = What.RECORD,
) -> None:
    """Print the JSON Schema of a record, a run spec, an imported result or an audit.

    [bold]Example[/bold]

      compresskit schema record > record.schema.json
    """
    import json

    from pydantic import BaseModel

    from compresskit.audit.document import Audit
    from compresskit.exchange.peers import Peer
    from compresskit.record import Record
    from compresskit.spec import RunSpec

    models: dict[What, type[BaseModel]] = {
        What.RECORD: Record, What.SPEC: RunSpec, What.PEER: Peer, What.AUDIT: Audit,
    }  # fmt: skip
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **models[what].model_json_schema(mode="validation"),
    }
    print(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False))
