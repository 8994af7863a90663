"""Prompts of long-context tasks: seeded, as long as asked for, needles where they should be."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from compresskit.errors import SpecError
from compresskit.quality.long.dice import Dice
from compresskit.quality.long.draft import Ask, Draft, Piece, place, string_match_all
from compresskit.quality.long.judge import truncated
from compresskit.quality.long.prompts import build
from compresskit.quality.long.tasks import TASKS, drafts
from compresskit.spec import ALL_TASKS

EVERY = [(task, style) for task in ALL_TASKS for style in ("plain", "tiny")]
DEPTHS = (0.0, 0.5, 1.0)


def written(task, style, *, samples=3, seed=0, needles=4):
    return drafts(task, style, samples=samples, depths=DEPTHS, needles=needles, seed=seed)


def test_every_task_of_the_spec_is_written_in_both_languages():
    assert list(TASKS) == list(ALL_TASKS)
    assert {frozenset(styles) for styles in TASKS.values()} == {frozenset({"plain", "tiny"})}


@pytest.mark.parametrize(("task", "style"), EVERY)
def test_one_seed_gives_one_text_and_every_sample_is_another(task, style):
    once = [draft.text(30) for draft in written(task, style)]
    assert once == [draft.text(30) for draft in written(task, style)]
    other = [draft.text(30) for draft in written(task, style, seed=1)]
    assert len({*once, *other}) == 6


def test_texts_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        "import hashlib;from compresskit.quality.long.tasks import drafts, TASKS;"
        "text=[d.text(20)+repr(d.asks) for t in TASKS for s in ('plain','tiny') for d in "
        "drafts(t,s,samples=1,depths=(.5,),needles=3,seed=7)];"
        "print(hashlib.sha256(repr(text).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_dice_draw_from_the_one_sequence_that_python_promises():
    twin = random.Random("a/1")
    dice = Dice("a", 1)
    assert [dice.share() for _ in range(3)] == [twin.random() for _ in range(3)]
    assert dice.number(5, 9) == 5 + int(twin.random() * 5)
    assert sorted(dice.sample("abc", 9)) == ["a", "b", "c"]


@pytest.mark.parametrize(("task", "style"), EVERY)
@pytest.mark.parametrize("tokens", [700, 1500])
def test_a_prompt_is_as_long_as_asked_for_to_within_a_sentence(
    bytes_tokenizer, task, style, tokens
):
    for draft in written(task, style, needles=3):
        prompt = build(bytes_tokenizer(bos=True), draft, tokens, chat=False)
        unit = 180  # characters: no sentence, nor the words that one more round of a list adds, is longer
        assert tokens - unit < prompt.length <= tokens


@pytest.mark.parametrize(("task", "style"), EVERY)
def test_the_parts_of_a_prompt_are_the_whole_one(bytes_tokenizer, task, style):
    draft = written(task, style)[1]
    prompt = build(bytes_tokenizer(bos=True), draft, 900, chat=False)
    first, ask = prompt.questions[0], draft.asks[0]
    text = bytes_tokenizer().decode([*prompt.context, *first.asked, *first.lead])
    assert text.endswith(f"\n{ask.question}{draft.glue}{ask.lead}")
    assert prompt.context[0] == 256
    assert bytes_tokenizer().decode(list(first.asked)) == ask.question
    assert len(prompt.questions) == len(draft.asks)


class Merging:
    """Tokens of whole words with the space in front: where a text ends changes its last token."""

    bos_id, eos_ids, has_chat_template = None, (), True

    def __init__(self):
        self.words = {}

    def encode(self, text, *, special=True):
        parts = text.replace("\n", " \n ").split(" ")
        return [self.words.setdefault(word, len(self.words)) for word in parts if word]

    def chat(self, text):
        return self.encode(f"<user> {text} <end> <assistant>")


def test_the_end_of_a_chat_turn_belongs_to_the_question():
    tokenizer = Merging()
    draft = Draft(
        pieces=lambda units: [Piece("key", needle=True), *[Piece("more")] * units],
        asks=(Ask("what ?", "it is", ("key",)),),
    )
    prompt = build(tokenizer, draft, 20, chat=True)
    ids = {word: number for number, word in enumerate(tokenizer.words)}
    names = {number: word for word, number in ids.items()}
    assert [names[i] for i in prompt.context][:3] == ["<user>", "key", "more"]
    (question,) = prompt.questions
    assert [names[i] for i in question.asked] == ["what", "?", "<end>", "<assistant>"]
    assert [names[i] for i in question.lead] == ["it", "is"]
    assert prompt.length == 20
    assert ids["key"] not in prompt.without


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_a_needle_lies_at_its_depth(depth, before):
    pieces = place("abcd", ["needle"], [depth])
    assert pieces.index(Piece("needle", needle=True)) == before
    assert [piece.text for piece in pieces if not piece.needle] == list("abcd")


def test_needles_of_one_depth_keep_their_order():
    assert [piece.text for piece in place("ab", ["x", "y"], [0.5, 0.5])] == ["a", "x", "y", "b"]


@pytest.mark.parametrize("style", ["plain", "tiny"])
def test_links_of_a_chain_follow_each_other(style):
    for draft in written("variable_tracking", style, samples=6):
        links = [piece.text for piece in draft.pieces(40) if piece.needle]
        names = draft.asks[0].references if style == "plain" else [a.lead for a in draft.asks[::-1]]
        for link, name, source in zip(links[1:], names[1:], names, strict=False):
            assert name in link
            assert source in link


@pytest.mark.parametrize(("task", "style"), EVERY)
def test_the_control_lacks_the_needles_and_nothing_else(task, style):
    draft = written(task, style)[2]
    pieces = draft.pieces(40)
    bare = draft.text(40, needles=False)
    assert not any(piece.text in bare for piece in pieces if piece.needle)
    for piece in pieces:
        assert piece.needle or piece.text in bare
    if style == "plain":
        assert not any(word in bare for ask in draft.asks for word in ask.references)


@pytest.mark.parametrize(("task", "style"), EVERY)
def test_every_answer_is_in_the_text(task, style):
    """The positive side of the control above: with its needles a text holds all references."""
    draft = written(task, style)[2]
    text = draft.text(40)
    assert all(word in text for ask in draft.asks for word in ask.references)


def test_common_words_are_common_and_the_others_alike():
    (draft,) = written("common_words", "plain", samples=1)
    words = draft.text(300).split("\n")[1].split(", ")
    counts = {word: words.count(word) for word in words}
    common = {counts.pop(word) for word in draft.asks[0].references}
    assert min(common) > 4 * max(counts.values())


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the codes: 12, 34", ["12", "34", "56"], 2 / 3),  # RULER: mean over what was asked for
        ("FOX", ["fox"], 1.0),
        ("34 and 12", ["12", "34"], 1.0),
        ("", ["fox"], 0.0),
        ("fo x", ["fox"], 0.0),
    ],
)
def test_the_score_is_the_share_of_references_found(answer, references, score):
    assert string_match_all(answer, references) == pytest.approx(score)


def test_a_length_that_has_no_room_for_needles_and_question_is_refused(bytes_tokenizer):
    with pytest.raises(SpecError, match=r"alone take \d+ tokens, more than the 40"):
        build(bytes_tokenizer(), written("niah_single", "plain")[0], 40, chat=False)


@pytest.mark.parametrize("bos", [True, False])
def test_a_truncated_prompt_has_the_newest_tokens_of_the_budget(bytes_tokenizer, bos):
    tokenizer = bytes_tokenizer(bos=bos)
    prompt = build(tokenizer, written("niah_single", "plain")[0], 600, chat=False)
    asked = len(prompt.questions[0].asked)
    front = prompt.context[:1] if bos else ()
    known = 256 if bos else None
    for when, room in (("aware", 200 - asked), ("agnostic", 200)):
        short = truncated(prompt, 200, when, known)
        assert len(short.context) == room
        assert short.context == (*front, *prompt.context[len(front) - room :])
        assert short.questions == prompt.questions
    assert truncated(prompt, 3, "aware", known).context == front
    assert truncated(prompt, 10**6, "agnostic", known) == prompt
