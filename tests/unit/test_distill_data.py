"""Rows to learn from: packed, split, dealt out by the step alone; bad text is refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from compresskit.distill import data
from compresskit.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


class Bytes:
    """A token for each byte; `leading` is put before every text, as some tokenizers do."""

    def __init__(self, leading: int | None = None) -> None:
        self.bos_id = leading

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        begin = [self.bos_id] if special and self.bos_id is not None else []
        return [*begin, *text.encode()]


def load(path: Path | str, tokenizer: Any = None, **options: Any) -> data.Data:
    held_out = options.pop("held_out", None)
    how = {"length": 8, "held_out_rows": 4, **options}
    return data.load(str(path), held_out, tokenizer or Bytes(), **how)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (8 * 33 + 5,), generator=generator).tolist()
    path.write_bytes(bytes(letters))
    return path


def test_rows_follow_the_text_and_every_sixteenth_is_held_out(text: Path) -> None:
    found = load(text)
    stream = torch.tensor(list(text.read_bytes()))[: 8 * 33].view(33, 8)
    held = [15, 31]
    assert torch.equal(found.held_out.tokens, stream[held])
    assert torch.equal(found.train.tokens, stream[[i for i in range(33) if i not in held]])
    assert found.train.weights.shape == found.train.tokens.shape
    assert bool((found.train.weights == 1).all())


def test_each_row_begins_as_the_tokenizer_begins_a_text(text: Path) -> None:
    found = load(text, Bytes(leading=300))
    assert bool((found.train.tokens[:, 0] == 300).all())
    assert found.train.tokens[0, 1:].tolist() == list(text.read_bytes()[:7])


def test_the_order_is_a_permutation_of_each_epoch_and_follows_from_the_step() -> None:
    dealt = [data.numbers_of(step, rows=10, batch=4, seed=3).tolist() for step in range(5)]
    flat = [number for step in dealt for number in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert data.numbers_of(3, rows=10, batch=4, seed=3).tolist() == dealt[3]
    assert data.numbers_of(3, rows=10, batch=4, seed=4).tolist() != dealt[3]


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="the text is empty"):
        load(tmp_path / "empty.txt")


def test_a_text_that_is_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("seven..")
    with pytest.raises(InputError, match=r"7 tokens do not fill one row of 8"):
        load(path)
    path.write_text("x" * 80)
    with pytest.raises(InputError, match=r"10 rows of 8 tokens, and 16 are needed.*--held-out"):
        load(path)
    rows = data.Rows(torch.zeros(3, 8, dtype=torch.int64), torch.ones(3, 8), "mine")
    with pytest.raises(
        InputError, match=r"mine: 3 rows of 8 tokens, and 4 are needed for one step"
    ):
        data.check_enough(rows, 4)
    data.check_enough(rows, 3)


def test_held_out_text_that_is_learned_from_is_refused(text: Path, tmp_path: Path) -> None:
    part, other = tmp_path / "part.txt", tmp_path / "other.txt"
    part.write_bytes(text.read_bytes()[64:128])
    other.write_bytes(bytes(reversed(text.read_bytes())))
    with pytest.raises(InputError, match=r"100% of it is in the training text"):
        load(text, held_out=str(part))
    # Control: the same letters in another order are another text.
    assert load(text, held_out=str(other)).overlap == 0


def test_held_out_rows_come_evenly_from_the_whole(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(reversed(text.read_bytes())))
    found = load(text, held_out=str(other), held_out_rows=3)
    whole = torch.tensor(list(other.read_bytes()))[: 8 * 33].view(33, 8)
    assert torch.equal(found.held_out.tokens, whole[[0, 16, 32]])
    assert len(found.train) == 33


def packed(folder: Path, **tensors: torch.Tensor) -> str:
    path = folder / "rows.safetensors"
    save_file(tensors, path)
    return f"rows:{path}"


def test_rows_that_somebody_packed_keep_their_weights(tmp_path: Path) -> None:
    tokens = torch.arange(16 * 8).view(16, 8)
    weights = (tokens % 3).float()
    found = load(packed(tmp_path, tokens=tokens, weights=weights))
    assert torch.equal(found.train.tokens, tokens[:15])
    assert torch.equal(found.held_out.weights, weights[15:])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"other": torch.zeros(16, 8)}, "called `tokens`"),
        ({"tokens": torch.zeros(16, 8)}, "integers"),
        ({"tokens": torch.zeros(0, 8, dtype=torch.int64)}, "no rows"),
        ({"tokens": torch.zeros(16, 9, dtype=torch.int64)}, "Say --length 9"),
        ({"tokens": torch.zeros(16, 8, dtype=torch.int64), "weights": -torch.ones(16, 8)}, "not below 0"),
        ({"tokens": torch.zeros(16, 8, dtype=torch.int64), "weights": torch.zeros(16, 8)}, "row 0 weighs nothing"),
    ],
)  # fmt: skip
def test_packed_rows_that_are_none(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        load(packed(tmp_path, **tensors))


def test_a_file_that_is_no_safetensors(text: Path) -> None:
    with pytest.raises(InputError, match="not readable"):
        load(f"rows:{text}")


def test_tokens_that_the_model_does_not_know() -> None:
    rows = data.Rows(torch.tensor([[1, 300]]), torch.ones(1, 2), "mine")
    with pytest.raises(InputError, match=r"token 300 .* from 0 to 299"):
        data.check_ids(rows, 300)
    data.check_ids(rows, 301)


def test_the_digest_tells_rows_apart() -> None:
    tokens, weights = torch.arange(8).view(2, 4), torch.ones(2, 4)
    digest = data.Rows(tokens, weights, "a").sha256
    assert data.Rows(tokens.clone(), weights, "b").sha256 == digest
    for other in (
        data.Rows(tokens.view(1, 8), weights.view(1, 8), "a"),
        data.Rows(tokens + 1, weights, "a"),
        data.Rows(tokens, weights * 2, "a"),
    ):
        assert other.sha256 != digest


def test_a_tokenizer_is_not_asked_twice(text: Path) -> None:
    """Control for the fixture: what `load` needs of a tokenizer is the protocol, nothing more."""
    narrow = SimpleNamespace(encode=Bytes().encode, bos_id=None)
    assert len(load(text, narrow).train) == 31
