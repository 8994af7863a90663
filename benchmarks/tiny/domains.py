"""The writers behind the corpus: stories, lists, arithmetic, recall and chat.

Each domain is there for something that compression can break:

    stories      ordinary text with refrains (speculation, n-gram look-up) and slots that stay the
                 same for a whole story, so that colours and things must be carried along
    lists        counting and copying: a list is read again item by item
    arithmetic   digits that are right or wrong
    recall       "Note the code: Mira 4821." ... other text ...
                 "What is the code of Mira? Mira 4821."
                 a cache that dropped the middle of the context cannot answer
    chat         recall and sums in the turns of the tokenizer's chat template

Everything here is made up from the word lists below; no outside text is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.tiny.dice import Dice

NAMES = (
    *("Mira", "Tom", "Ann", "Leo", "Zoe", "Ben", "Ida", "Max"),
    *("Eva", "Sam", "Kim", "Ned", "Lia", "Otto", "Ruth", "Finn"),
)
PLACES = ("garden", "forest", "river", "market", "old mill", "beach", "hill", "farm", "station")
THINGS = ("kite", "lamp", "ball", "drum", "map", "boat", "basket", "bell", "coat", "flute")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "silver", "brown")
ANIMALS = ("fox", "dog", "cat", "owl", "horse", "mouse", "goose", "frog")
SPOTS = ("tree", "bench", "bridge", "stone", "table", "cart", "wall", "gate")
FOODS = ("apples", "pears", "nuts", "eggs", "plums", "rolls", "beans", "cakes", "figs")
WEATHER = ("sunny", "windy", "rainy", "cold", "foggy", "warm")
MOODS = ("happy", "sad", "tired", "proud", "afraid", "hungry")
SIZES = ("small", "big", "tiny", "tall", "quiet")
VALUES = {"box": COLOURS, "pet": ANIMALS}
"""What can be asked besides the four-digit code, and the words that may answer."""


@dataclass(frozen=True)
class Answer:
    """A value that the text itself has stated before; offsets are characters."""

    stated: int
    """Where the value was last stated before it was asked."""
    start: int
    """First character of the answer."""
    stop: int
    """First character after the answer."""


@dataclass(frozen=True)
class Document:
    """One text and the places in it that can only be known by looking back."""

    domain: str
    text: str
    answers: tuple[Answer, ...] = ()


def story(dice: Dice, size: int) -> str:
    """Write a story of at least `size` characters; its slots are chosen once and kept."""
    hero, friend = dice.pick(NAMES), dice.pick(NAMES)
    while friend == hero:
        friend = dice.pick(NAMES)
    place, thing, colour = dice.pick(PLACES), dice.pick(THINGS), dice.pick(COLOURS)
    animal, mood = dice.pick(ANIMALS), dice.pick(MOODS)
    refrain = dice.pick(
        (
            f'"Step by step, we will find the {colour} {thing}," said {hero}.',
            f'"Look up, look down, look all around," sang the {animal}.',
            f"And the {animal} ran round and round the {place}, round and round the {place}.",
        )
    )
    openings = (
        f"One {dice.pick(WEATHER)} day, {hero} went to the {place} with a {colour} {thing}.",
        f"Once there was a {dice.pick(SIZES)} {animal} who lived near the {place}. "
        f"Its best friend was {hero}, who had a {colour} {thing}.",
        f"{hero} and {friend} liked to play at the {place}. {hero} had a {colour} {thing}.",
    )
    events: tuple[Callable[[], str], ...] = (
        lambda: f'"Where is my {colour} {thing}?" asked {hero}.',
        lambda: f"They looked behind the {dice.pick(SPOTS)}, but the {thing} was not there.",
        lambda: f"{friend} saw a {dice.pick(SIZES)} {animal} under the {dice.pick(SPOTS)}.",
        lambda: (
            f"The {animal} was {mood}, so {hero} gave it {dice.number(2, 9)} {dice.pick(FOODS)}."
        ),
        lambda: f'"Do not be {dice.pick(MOODS)}," said {friend}.',
        lambda: f"Then the wind took the {colour} {thing} over the {dice.pick(SPOTS)}.",
        lambda: f"{hero} ran to the {place} and {friend} ran after {hero}.",
        lambda: (
            f"In the {dice.pick(PLACES)} they met {dice.pick(NAMES)}, who was {dice.pick(MOODS)}."
        ),
        lambda: f'"I can hear the {animal}," said {dice.pick((hero, friend))}.',
    )
    endings = (
        f"At last they found the {colour} {thing} at the {place}. {hero} was very happy.",
        f"In the evening {hero} and {friend} went home with the {colour} {thing}.",
        f"From that day on, the {animal} and {hero} shared the {colour} {thing}.",
    )
    parts = [dice.pick(openings)]
    while sum(map(len, parts)) < size - 90:
        parts.extend(dice.pick(events)() for _ in range(dice.number(1, 3)))
        parts.append(refrain)
    parts.append(dice.pick(endings))
    return " ".join(parts)


def _shopping(dice: Dice, size: int) -> str:
    items = [
        f"{dice.number(2, 9)} {food}"
        for food in dice.sample(FOODS, min(3 + size // 150, len(FOODS)))
    ]
    name = dice.pick(NAMES)
    bullets = "\n".join(f"- {item}" for item in items)
    return (
        f"Shopping list of {name}:\n{bullets}\n{name} reads the list again: {', '.join(items)}. "
        f"The first item is {items[0]}. The last item is {items[-1]}."
    )


def _counting(dice: Dice, size: int) -> str:
    step, start = dice.number(1, 9), dice.number(0, 40)
    numbers = [str(start + step * index) for index in range(6 + min(size // 40, 14))]
    return f"Counting by {step} from {start}: {', '.join(numbers)}."


def _pattern(dice: Dice, size: int) -> str:
    words = dice.sample(COLOURS if dice.chance(0.5) else ANIMALS, dice.number(2, 4))
    return "Pattern: " + ", ".join(words * (2 + min(size // 80, 6))) + "."


def _table(dice: Dice, size: int) -> str:
    rows = [
        f"{name},{dice.pick(COLOURS)},{dice.number(10, 99)}"
        for name in dice.sample(NAMES, 3 + min(size // 100, 5))
    ]
    backwards = "\n".join(reversed(rows))
    return "name,colour,count\n" + "\n".join(rows) + "\nbackwards\n" + backwards


def listing(dice: Dice, size: int) -> str:
    """Write lists, two thirds of `size` in characters: digits make them dear in tokens."""
    size = size * 2 // 3
    parts: list[str] = []
    while not parts or sum(map(len, parts)) < size - 60:
        parts.append(dice.pick((_shopping, _counting, _pattern, _table))(dice, size))
    return "\n".join(parts)


def _sum(dice: Dice) -> str:
    kind = dice.pick("+-x")
    if kind == "x":
        a, b = dice.number(2, 9), dice.number(2, 9)
        return f"{a}x{b}={a * b}"
    a, b = dice.number(0, 99), dice.number(0, 99)
    return f"{a}+{b}={a + b}" if kind == "+" else f"{max(a, b)}-{min(a, b)}={abs(a - b)}"


def _problem(dice: Dice) -> str:
    name, food, a, b = dice.pick(NAMES), dice.pick(FOODS), dice.number(2, 9), dice.number(2, 9)
    return f"{name} has {a} {food} and gets {b} more. Now {name} has {a + b} {food}."


def arithmetic(dice: Dice, size: int) -> str:
    """Write sums, one a line, and the odd problem in words: half of `size`, being digits."""
    parts: list[str] = []
    while not parts or sum(map(len, parts)) < size // 2 - 20:
        parts.append(_problem(dice) if dice.chance(0.15) else _sum(dice))
    return "\n".join(parts)


def _filler(dice: Dice, size: int) -> str:
    """Other text between fact and question: nothing in it states or asks a value."""
    kind = dice.weighted({"story": 0.6, "list": 0.2, "sums": 0.2})
    if kind == "story":
        return story(dice, size)
    if kind == "list":
        return listing(dice, size)
    return "\n".join(_sum(dice) for _ in range(max(2, size // 18)))


class _Notebook:
    """A text in the making: states facts, asks them again and notes where the answers stand."""

    def __init__(self, dice: Dice, facts: int) -> None:
        self.dice, self.text, self.answers = dice, "", list[Answer]()
        self.waiting = dice.sample(NAMES, facts)
        self.known: dict[str, tuple[str, str, int]] = {}
        self.what = dice.weighted({"code": 0.7, "mixed": 0.15, "box": 0.075, "pet": 0.075})

    def add(self, text: str) -> None:
        self.text += text

    def state(self) -> None:
        """State the fact of the next name."""
        what = self.dice.even(("code", "box", "pet")) if self.what == "mixed" else self.what
        value = (
            f"{self.dice.number(1000, 9999)}" if what == "code" else self.dice.even(VALUES[what])
        )
        name = self.waiting.pop()
        self.add(f"Note the {what}: {name} ")
        self.known[name] = (what, value, len(self.text))
        self.add(f"{value}.\n")

    def ask(self, name: str | None = None, between: str = "") -> None:
        """Ask a known name's fact again and answer it after `between`.

        The answer names its key again, as the note did, so that the same two tokens stand before
        both values: one match fewer to learn than with "of Mira is fox", "of Mira? fox".
        """
        name = name or self.dice.even(list(self.known))
        what, value, stated = self.known[name]
        self.add(f"What is the {what} of {name}?{between} {name} ")
        start = len(self.text)
        self.answers.append(Answer(stated, start, start + len(value)))
        # The next question's distance counts from here, where the value can be read again.
        self.known[name] = (what, value, start)
        self.add(value)


def recall(dice: Dice, size: int) -> tuple[str, tuple[Answer, ...]]:
    """Write facts, other text and questions, about `size` characters in all.

    In half of the documents all facts come first and all questions last (long distances, all
    answers need the far end of the context); in the others facts, other text and questions are
    woven together (distances of all lengths, many answers per document).
    """
    book = _Notebook(dice, min(2 + dice.number(0, 1 + size // 250), 7))
    if dice.chance(0.5):
        while book.waiting:
            book.state()
        asked = dice.sample(list(book.known), dice.number(1, min(4, len(book.known))))
        room = size - len(book.text) - 34 * len(asked)
        if room > 60:
            book.add(_filler(dice, room) + "\n")
        for name in asked:
            book.ask(name)
            book.add(".\n")
    else:
        book.state()
        while book.waiting or len(book.text) < size - 40:
            left = size - len(book.text)
            action = dice.weighted({"state": 0.35, "ask": 0.4, "fill": 0.25})
            if action == "state" and book.waiting:
                book.state()
            elif action == "fill" and left > 250:
                book.add(_filler(dice, dice.number(60, left - 120)) + "\n")
            elif left <= 40 and book.waiting:
                book.state()
            else:
                book.ask()
                book.add(".\n")
        book.ask()
        book.add(".")
    return book.text.rstrip("\n"), tuple(book.answers)


def pairs(dice: Dice, size: int) -> tuple[str, tuple[Answer, ...]]:
    """Write names with their values again and again: "Mira fox, Tom owl, Mira fox, ...".

    The first lesson of the curriculum: a question every three tokens. Whose value it is shows in
    one token an answer, a rare signal in longer text. The lesson's own effect was not isolated.
    """
    names = dice.sample(NAMES, dice.number(2, 8))
    what = dice.even(("box", "pet", "code"))
    if what == "code":
        values = {name: f"{dice.number(1000, 9999)}" for name in names}
    else:
        values = {name: dice.even(VALUES[what]) for name in names}
    known: dict[str, int] = {}
    answers: list[Answer] = []
    text = f"Every {what}: "
    while len(text) < size:
        name = dice.even(names)
        text += f"{name} "
        start = len(text)
        text += values[name]
        if name in known:
            answers.append(Answer(known[name], start, len(text)))
        known[name] = start
        text += ", "
    return text.removesuffix(", ") + ".", tuple(answers)


def drill(dice: Dice, size: int) -> tuple[str, tuple[Answer, ...]]:
    """Write facts and at once ask them all, in another order: recall with nothing in between.

    The second lesson of the curriculum: `pairs` in the words of `recall`.
    """
    book = _Notebook(dice, min(2 + dice.number(0, size // 80), 8))
    while book.waiting:
        book.state()
    for name in dice.sample(list(book.known), len(book.known)):
        book.ask(name)
        book.add(".\n")
    return book.text.rstrip("\n"), tuple(book.answers)


def probe(dice: Dice, size: int, what: str, facts: int = 4) -> tuple[str, tuple[Answer, ...]]:
    """Write `facts` values of kind `what`, `size` characters of other text, then one question.

    The last characters of the text are the answer: what comes before them is the prompt.
    """
    book = _Notebook(dice, facts)
    book.what = what
    while book.waiting:
        book.state()
    book.add(_filler(dice, size) + "\n")
    book.ask()
    return book.text, tuple(book.answers)


def chat(dice: Dice, size: int) -> tuple[str, tuple[Answer, ...]]:
    """Write a conversation in the tokenizer's chat template: facts or sums, then questions."""
    book = _Notebook(dice, dice.number(1, 3))
    book.add("<|user|>\n")
    while book.waiting:
        book.state()
    if size > 400 and dice.chance(0.5):
        book.add(_filler(dice, size - 250) + "\n")
    for turn in range(dice.number(1, 2 + size // 300)):
        if turn:
            book.add("<|end|>\n<|user|>\n")
        if dice.chance(0.3):
            question, answer = _sum(dice).split("=")
            book.add(f"{question}=?<|end|>\n<|assistant|>\n{answer}")
        else:
            book.ask(between="<|end|>\n<|assistant|>\nNoted:")
    book.add("<|end|>")
    return book.text, tuple(book.answers)
