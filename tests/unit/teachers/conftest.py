"""A small teacher, rows that it reads, and caches of what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compresskit.distill.batch import Batch
from compresskit.distill.teachers.cache import shard, source
from compresskit.distill.teachers.cache.parse import parse
from compresskit.distill.teachers.cache.write import Written, write
from compresskit.distill.teachers.online import Online
from compresskit.hf.tiny import random_model

VOCABULARY = 512
ROWS, LENGTH = 11, 9


@pytest.fixture(scope="module")
def teacher() -> Online:
    return Online(random_model("llama"))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def _belongs(over: torch.Tensor, /, **changes: Any) -> source.Source:
    of = source.Source.of(over, teacher="org/teacher", revision="r1", tokenizer="t" * 64)
    return of.model_copy(update=changes)


@pytest.fixture(scope="session")
def belongs() -> Any:
    return _belongs


def _written(
    folder: Path, teacher: Online, rows: torch.Tensor, form: str, **options: Any
) -> Written:
    # Three rows a shard: four files, the last one shorter.
    row_bytes = (LENGTH - 1) * parse(form).bytes_per_place(teacher.vocabulary)
    options = {"shard_bytes": 3 * row_bytes, "batch": 2, **options}
    return write(folder, teacher, rows, form=parse(form), belongs=_belongs(rows), **options)


@pytest.fixture(scope="session")
def written() -> Any:
    return _written


def _batch(rows: torch.Tensor, *numbers: int) -> Batch:
    tokens = rows[list(numbers)]
    return Batch(tokens, torch.ones(tokens.shape), torch.tensor(numbers))


@pytest.fixture(scope="session")
def batch() -> Any:
    return _batch


def _dense_logprobs(rows: torch.Tensor) -> torch.Tensor:
    """float64 `[N, V]`, by the whole model in float64: not the path that the cache is written by."""
    model = random_model("llama", dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=rows).logits[:, :-1].flatten(0, 1).log_softmax(-1)


@pytest.fixture(scope="session")
def dense_logprobs() -> Any:
    return _dense_logprobs


def _contents(folder: Path) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    # Copies: what safetensors returns is mapped, and would change with a file that is harmed.
    return [
        {name: tensor.clone() for name, tensor in load_file(path).items()}
        for path in shard.listed(folder)
    ]


@pytest.fixture(scope="session")
def contents() -> Any:
    return _contents


def _same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
        for one, two in zip(a, b, strict=True)
    )


@pytest.fixture(scope="session")
def same() -> Any:
    return _same
