"""The corpus of the tiny models: a function from an index to a document, split by index.

document(index, longest)      any index always gives the same text
TRAIN | VALIDATION | TEST     ranges of indices; no document belongs to two
digest(documents)             what was trained or evaluated on, in one line

python benchmarks/tiny/corpus.py                   # sizes, digests and one sample a domain
python benchmarks/tiny/corpus.py --lesson FILE     # 2 MB of the train split, for students
python benchmarks/tiny/corpus.py --write DIR       # heldout.txt (test), calibration.txt (train)
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, only this folder is on the path; the recipe's modules are named from the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tiny import domains
from benchmarks.tiny.dice import Dice
from benchmarks.tiny.domains import Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRAIN = range(0, 8_000_000)
VALIDATION = range(8_000_000, 8_100_000)
TEST = range(9_000_000, 9_100_000)
CALIBRATION = range(7_900_000, 8_000_000)
"""The end of the train split, kept for calibration text; the training stages stay below it."""

MIX = {
    "story": 0.28,
    "list": 0.12,
    "arithmetic": 0.10,
    "recall": 0.34,
    "drill": 0.06,
    "pairs": 0.04,
    "chat": 0.06,
}
SHORTEST, LONGEST = 150, 1250
"""Bounds of a document's length in characters (about 2.2 characters a token)."""

HELDOUT_BYTES, CALIBRATION_BYTES, LESSON_BYTES = 120_000, 60_000, 2_000_000
SEPARATOR = "\n\n"


def document(index: int, longest: int = LONGEST, domain: str | None = None) -> Document:
    """Return the document of `index`, at most about `longest` characters, of `domain` or any."""
    dice = Dice(index)
    drawn = dice.weighted(MIX)
    domain = domain or drawn
    # Log-uniform: as many documents between 150 and 300 characters as between 600 and 1200.
    share = dice.number(0, 1000) / 1000.0
    size = round(SHORTEST * math.exp(share * math.log(longest / SHORTEST)))
    asking = {
        "pairs": domains.pairs,
        "drill": domains.drill,
        "recall": domains.recall,
        "chat": domains.chat,
    }
    if domain in asking:
        return Document(domain, *asking[domain](dice, size))
    write = {"story": domains.story, "list": domains.listing, "arithmetic": domains.arithmetic}
    return Document(domain, write[domain](dice, size))


def documents(
    indices: Iterable[int], longest: int = LONGEST, domain: str | None = None
) -> Iterator[Document]:
    """Return the documents of `indices`, lazily."""
    return (document(index, longest, domain) for index in indices)


def digest(texts: Iterable[Document]) -> str:
    """Return the SHA-256 of the documents' texts, each closed by a zero byte."""
    state = hashlib.sha256()
    for text in texts:
        state.update(text.text.encode() + b"\0")
    return state.hexdigest()


def plain_text(indices: Iterable[int], size: int) -> str:
    """Return at least `size` bytes of documents as one text.

    Chat is left out: its turn markers are special tokens, which plain text should not contain.
    """
    parts: list[str] = []
    total = 0
    for text in documents(indices):
        if total >= size:
            break
        if text.domain != "chat":
            parts.append(text.text)
            total += len(text.text.encode()) + len(SEPARATOR)
    return SEPARATOR.join(parts) + "\n"


def main() -> None:
    """Print what the corpus holds; with `--write`, write the two shipped texts, or text to learn from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="DIR", help="heldout.txt and calibration.txt")
    parser.add_argument("--lesson", type=Path, metavar="FILE", help="text for students of tiny")
    arguments = parser.parse_args()
    folder: Path | None = arguments.write
    for name, split in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        print(f"{name:10} sha256 of the first 1000 documents {digest(documents(split[:1000]))}")
    for domain in MIX:
        print(f"--- {domain}\n{document(TEST[0], 500, domain).text}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, split, size in (
            ("heldout.txt", TEST, HELDOUT_BYTES),
            ("calibration.txt", CALIBRATION, CALIBRATION_BYTES),
        ):
            text = plain_text(split, size).encode()
            (folder / name).write_bytes(text)
            print(f"{name}: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    if (lesson := arguments.lesson) is not None:
        lesson.parent.mkdir(parents=True, exist_ok=True)
        lesson.write_text(plain_text(TRAIN, LESSON_BYTES), encoding="utf-8")
        print(f"{lesson}: {lesson.stat().st_size} bytes")


if __name__ == "__main__":
    main()
