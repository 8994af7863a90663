"""Questions of a data set, of one kind, as they come.

    questions:spec-bench.jsonl                  all of them
    questions:spec-bench.jsonl#summarization    one category
    questions:spec-bench.jsonl#mt_bench         a group of categories
    questions:datasets:NAME[:CONFIG[:SPLIT]]#KIND

Rows have `turns` (the first one is asked), `question` or `prompt`, and may have a `category`, which is
the form of MT-Bench and Spec-Bench (Xia et al. 2024, arXiv 2401.07851). Prompts have the lengths that
the questions have; those longer than `prompt_tokens` are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import text as texts
from compresskit.errors import InputError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from compresskit.spec import WorkloadSpec
    from compresskit.system import Tokenizer

GROUPS = {
    "mt_bench": (
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
    ),
}  # fmt: skip
"""Spec-Bench counts the eight categories of MT-Bench as one of its six."""
_FIELDS = ("turns", "question", "prompt")


def make(
    tokenizer: Tokenizer, source: str, workload: WorkloadSpec, rng: random.Random
) -> tuple[texts.Text, Iterator[list[int]]]:
    """The questions of the kind as one text, and the prompts in shuffled order.

    Raises:
        InputError: the file is missing, has a bad line, or has no question of that kind.
    """
    where, _, kind = source.partition("#")
    if not where:
        raise InputError(
            "questions: name a file of questions, as in questions:question.jsonl#summarization."
        )
    rows = list(_rows(where))
    wanted = GROUPS.get(kind, (kind,))
    chosen = [asked for category, asked in rows if not kind or category in wanted]
    if not chosen:
        known = sorted({category for category, _ in rows if category})
        raise InputError(
            f"questions:{where}: no question of the kind {kind!r}. "
            + (f"There are {', '.join(known)}." if known else "Its rows have no category.")
        )
    # The hash is of what was asked, in the order of the file.
    content = "\n\n".join(chosen)
    name = Path(where).name if Path(where).exists() else where
    text = texts.Text(f"questions:{name}{'#' + kind if kind else ''}", content)
    return text, _prompts(tokenizer, chosen, workload, rng)


def _prompts(
    tokenizer: Tokenizer, asked: list[str], workload: WorkloadSpec, rng: random.Random
) -> Iterator[list[int]]:
    for question in rng.sample(asked, len(asked)):
        ids = tokenizer.chat(question) if workload.chat else tokenizer.encode(question)
        if 0 < len(ids) <= workload.prompt_tokens:
            yield ids


def _rows(where: str) -> Iterator[tuple[str, str]]:
    """Category and first question of every row."""
    if where.startswith("datasets:"):
        for number, row in enumerate(texts.dataset_rows(where), 1):
            yield _row(row, f"{where}, row {number}")
        return
    try:
        lines = Path(where).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"questions:{where}: cannot be read ({error}). Give a .jsonl file with a question a "
            "line, or datasets:NAME."
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where}, line {number}: not JSON ({error}). Each line is an object such as "
                '{"category": "qa", "turns": ["..."]}.'
            ) from None
        yield _row(document, f"{where}, line {number}")


def _row(document: Any, place: str) -> tuple[str, str]:
    asked = None
    if isinstance(document, dict):
        field = next((name for name in _FIELDS if document.get(name)), None)
        asked = document[field] if field else None
        asked = asked[0] if isinstance(asked, list) else asked
    if not isinstance(asked, str):
        raise InputError(
            f"{place}: no question; a row has {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}."
        )
    return str(document.get("category") or ""), asked
