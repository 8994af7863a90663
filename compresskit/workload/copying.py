"""Work whose answer is mostly in the prompt already: where drafting from the prompt pays most.

    copy   PASSAGE  The same text once more:  PASSAGE begun ...
    edit   CODE     The same code, `total` renamed to `result`:  CODE begun ...

The answer is begun, so that small models without instructions go on with it too. Passages are pieces
of a text; code is generated here, so that it is nobody's and no model has seen it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import text as texts
from compresskit.errors import InputError
from compresskit.workload import pieces

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from compresskit.spec import WorkloadSpec
    from compresskit.system import Tokenizer

KINDS = ("copy", "edit")
LEAD = 8
"""Tokens of the answer that the prompt begins."""
LINES = 4000
"""Lines of code in the text that edits are cut from."""

_NOUNS = (
    "price", "weight", "height", "signal", "volume", "pressure", "distance", "score", "balance",
    "current", "angle", "duration", "density", "altitude", "income", "rainfall",
)  # fmt: skip
_VERBS = ("collect", "measure", "combine", "update", "convert", "select", "reduce", "compare")
_RENAMED = ("total", "result", "amount", "answer", "outcome", "summary")


def make(
    tokenizer: Tokenizer, kind: str, source: str, workload: WorkloadSpec, rng: random.Random
) -> tuple[texts.Text, Iterator[list[int]]]:
    """The text that prompts are cut from, and the prompts.

    Raises:
        InputError: the text is unusable, or prompts of that length hold less than the answer.
    """
    if kind == "copy":
        text = texts.load(source or "pydoc")
        text = texts.Text(f"copy of {text.source}", text.content)
        return text, _prompts(tokenizer, text, workload, rng, "The same text once more:", None)
    if source:
        raise InputError(f"edit:{source}: edits are made of generated code; write only 'edit'.")
    old, new = rng.sample(_RENAMED, 2)
    text = texts.Text("edit", code(rng, old))
    request = f"The same code, `{old}` renamed to `{new}`:"
    return text, _prompts(tokenizer, text, workload, rng, request, (old, new))


def code(rng: random.Random, name: str) -> str:
    """Lines of Python functions that use a variable called `name`."""
    lines: list[str] = []
    while len(lines) < LINES:
        noun, other = rng.sample(_NOUNS, 2)
        low, high = rng.randint(1, 9), rng.randint(10, 99)
        lines += [
            f"def {rng.choice(_VERBS)}_{noun}_{low}(values, {other}):",
            f"    {name} = {low}",
            f"    for {noun} in values:",
            f"        if {noun} > {high}:",
            f"            {name} += {noun} * {other}",
            "        else:",
            f"            {name} -= {rng.randint(2, 9)}",
            f"    return {name} / len(values)",
            "",
        ]
    return "\n".join(lines)


def _prompts(
    tokenizer: Tokenizer,
    text: texts.Text,
    workload: WorkloadSpec,
    rng: random.Random,
    request: str,
    rename: tuple[str, str] | None,
) -> Iterator[list[int]]:
    ids = tokenizer.encode(text.content, special=False)
    length = workload.prompt_tokens

    def wrap(passage: str) -> list[int]:
        begun = passage.replace(*rename) if rename else passage
        lead = tokenizer.encode(begun, special=False)[:LEAD]
        if workload.chat:
            return tokenizer.chat(f"{request}\n\n{passage}") + lead
        return tokenizer.encode(f"{passage}\n\n{request}\n\n") + lead

    body = length - len(wrap(""))  # the text around it; the lead comes on top
    if body - LEAD < workload.new_tokens:
        raise InputError(
            f"prompts of {length} tokens hold a passage of {max(body - LEAD, 0)}, less than the "
            f"{workload.new_tokens} that are to be copied. Ask for prompts of at least "
            f"{length - body + LEAD + workload.new_tokens} tokens."
        )
    for start in pieces.starts(len(ids), body, rng):
        # From the beginning of a line: a passage that begins inside a word is begun wrongly.
        cut = tokenizer.decode(ids[start : start + 2 * body])
        head, newline, rest = cut.partition("\n")
        piece = tokenizer.encode(rest if newline else head, special=False)[: body + pieces.SLACK]
        row = pieces.fit(tokenizer, piece, length, body - LEAD, wrap)
        if row is not None:
            yield row
