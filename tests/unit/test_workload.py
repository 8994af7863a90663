"""Prompts are distinct pieces of a text, of exactly the asked length."""

from __future__ import annotations

import itertools

import pytest

from compresskit.errors import InputError
from compresskit.spec import WorkloadSpec
from compresskit.workload import calibration, prompts

TEXT = "".join(f"{number:03d}" for number in range(100))  # 300 bytes, every 3-gram at one place


class Bytes:
    """One token per byte; BOS and the chat marks are tokens of their own."""

    def __init__(self, *, bos=False, chat=False):
        self.eos_ids = (257,)
        self.bos_id = 256
        self.adds_bos = bos
        self.has_chat_template = chat

    def encode(self, text, *, special=True):
        return [256] * (special and self.adds_bos) + list(text.encode())

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def chat(self, text):
        return [258, *text.strip().encode(), 259, 260]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def spec(text, tokens, **options):
    return WorkloadSpec(text=text, prompt_tokens=tokens, **options)


@pytest.mark.parametrize(("length", "count"), [(30, 10), (7, 42), (299, 2), (300, 1), (1, 10)])
def test_prompts_are_distinct_pieces_of_exact_length(text, length, count):
    found = prompts(Bytes(), spec(text, length), count=count, seed=0)
    assert [len(row) for row in found.ids] == [length] * count
    assert len(set(map(tuple, found.ids))) == count
    assert all(bytes(row).decode() in TEXT for row in found.ids)
    assert found.facts.tokens == found.facts.bytes == 300


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_disjoint_as_long_as_there_is_room(text, seed):
    found = prompts(Bytes(), spec(text, 7), count=42, seed=seed)  # 42 * 7 = 294
    places = sorted(TEXT.index(bytes(row).decode()) for row in found.ids)
    assert all(b - a >= 7 for a, b in itertools.pairwise(places))


def test_more_prompts_of_one_seed_only_append(text):
    few = prompts(Bytes(), spec(text, 20), count=3, seed=5)
    many = prompts(Bytes(), spec(text, 20), count=30, seed=5)  # more than the 15 disjoint ones
    assert many.ids[:3] == few.ids
    assert len(set(map(tuple, many.ids))) == 30


def test_the_seed_decides_and_nothing_else(text):
    a, b, c = (prompts(Bytes(), spec(text, 20), count=5, seed=seed) for seed in (1, 1, 2))
    assert a == b
    assert a.sha256 != c.sha256
    assert a.facts == c.facts


def test_a_short_text_says_how_much_there_is(text):
    with pytest.raises(InputError, match="300 tokens, which gives 1 distinct prompts of 300"):
        prompts(Bytes(), spec(text, 300), count=2, seed=0)
    with pytest.raises(InputError, match="gives 0 distinct"):
        prompts(Bytes(), spec(text, 301), count=1, seed=0)


def test_repetitive_text_does_not_give_equal_prompts(tmp_path):
    path = tmp_path / "same.txt"
    path.write_text("ab" * 50)
    assert len(prompts(Bytes(), spec(str(path), 10), count=2, seed=0).ids) == 2
    with pytest.raises(InputError, match="gives 2 distinct"):
        prompts(Bytes(), spec(str(path), 10), count=3, seed=0)


def test_bos_is_part_of_the_prompt_if_the_tokenizer_adds_it(text):
    found = prompts(Bytes(bos=True), spec(text, 20), count=5, seed=0)
    assert all(row[0] == 256 and len(row) == 20 for row in found.ids)
    with pytest.raises(InputError, match="BOS"):
        prompts(Bytes(bos=True), spec(text, 1), count=1, seed=0)


def test_chat_prompts_are_whole_templates_of_exact_length(text):
    found = prompts(Bytes(chat=True), spec(text, 20, chat=True), count=12, seed=0)
    assert all((row[0], *row[-2:], len(row)) == (258, 259, 260, 20) for row in found.ids)
    assert len(set(map(tuple, found.ids))) == 12


def test_chat_prompts_hold_whole_characters_and_survive_trimming(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} größer als  {number - 1}. " for number in range(50)))
    found = prompts(Bytes(chat=True), spec(str(path), 16, chat=True), count=20, seed=0)
    for row in found.ids:
        assert len(row) == 16
        assert bytes(row[1:-2]).decode()


def test_chat_needs_a_template_and_room(text):
    with pytest.raises(InputError, match="no chat template"):
        prompts(Bytes(), spec(text, 20, chat=True), count=1, seed=0)
    with pytest.raises(InputError, match="template alone takes 3"):
        prompts(Bytes(chat=True), spec(text, 3, chat=True), count=1, seed=0)


def test_calibration_is_not_the_evaluation_text():
    ids = calibration(Bytes(), "calibration", 1000)
    assert len(ids) == 1000
    held_out = prompts(Bytes(), WorkloadSpec(prompt_tokens=1000), count=1, seed=0)
    assert bytes(ids) not in bytes(held_out.ids[0])
    with pytest.raises(InputError, match="Calibrate on fewer"):
        calibration(Bytes(), "calibration", 10**9)
