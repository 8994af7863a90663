"""Make a trace: let a model answer prompts greedily, and note what it said."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit import workload
from compresskit.drafts.trace import Entry, parse, words
from compresskit.errors import InputError
from compresskit.hf.tokenizer import tokenizer_digest
from compresskit.spec import SamplingSpec, WorkloadSpec
from compresskit.system import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from compresskit.system import System, Tokenizer


class Asked(NamedTuple):
    """A prompt, and what kind of request it is."""

    prompt: str
    category: str = ""


def read(path: Path) -> list[Asked]:
    """Read prompts, one object a line: {"prompt": text, "category": text}, the category optional.

    Raises:
        InputError: the file cannot be read, holds no prompt, or a line is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    asked: list[Asked] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found = parse(line, ("prompt", "category"))
            one = Asked(words(found, "prompt"), words(found, "category"))
            if not one.prompt:
                raise ValueError("'prompt' is missing or empty")
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: {error}. Correct or remove the line."
            ) from None
        asked.append(one)
    if not asked:
        raise InputError(f"{path}: holds no prompt. Give one object a line.")
    return asked


def encode(
    tokenizer: Tokenizer, asked: Sequence[Asked], *, chat: bool
) -> list[tuple[list[int], str]]:
    """Token ids and category of each prompt; with `chat`, as a turn of the template."""
    if chat and not tokenizer.has_chat_template:
        raise InputError("this model's tokenizer has no chat template. Leave --chat out.")
    return [
        (tokenizer.chat(one.prompt) if chat else tokenizer.encode(one.prompt), one.category)
        for one in asked
    ]


def cut(
    tokenizer: Tokenizer, text: str, *, requests: int, prompt_tokens: int, chat: bool, seed: int
) -> list[tuple[list[int], str]]:
    """Prompts of a kind of text, as those of the speed passes; their category is its name."""
    spec = WorkloadSpec(text=text, prompt_tokens=prompt_tokens, chat=chat)
    return [(ids, text) for ids in workload.prompts(tokenizer, spec, requests, seed).ids]


def record(
    system: System,
    prompts: Sequence[tuple[list[int], str]],
    *,
    max_new_tokens: int,
    model: str,
    ignore_stop: bool = False,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Entry]:
    """Answer the prompts greedily, one at a time."""
    digest = tokenizer_digest(system.tokenizer)  # type: ignore[arg-type]
    for index, (ids, category) in enumerate(prompts):
        request = Request(
            tokens=torch.tensor([ids], device=system.device.torch),
            max_new_tokens=max_new_tokens,
            sampling=SamplingSpec(),
            stop=() if ignore_stop else system.tokenizer.eos_ids,
        )
        answer: list[int] = []
        for chunk in system.generate(request):
            answer += chunk.tokens[0, : int(chunk.lengths[0])].tolist()
        tick(index + 1, len(prompts))
        yield Entry(tuple(ids), tuple(answer), max_new_tokens, category, model, digest)
