"""Leave tokens out of a byte-pair tokenizer so that every text can still be encoded.

    token  "the"   made by merging  t + h ─► th,  th + e ─► the
    kept   only with all tokens that merging it passes through, and with the merges between them

Encoding merges the pair whose merge comes first, again and again. Merges of tokens that are gone fall
out, the others keep their order: a token that stays is still reached the way it was, and what is no
longer one token falls apart into those that it was merged from.

Every text stays encodable because the smallest pieces stay: the 256 characters that stand for bytes
(byte-level tokenizers), the 256 byte tokens (byte fallback), or else all single characters.
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from compresskit.errors import Conflict, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
"""Byte tokens of tokenizers that fall back to bytes."""


class Trimmed(NamedTuple):
    """A tokenizer with fewer tokens."""

    tokenizer: Any
    kept: tuple[int, ...]
    """For each token its number before, rising."""
    mandatory: int
    """How many of them any text needs."""


def trim(tokenizer: Any, size: int, counts: Sequence[int], *, needed: Iterable[int]) -> Trimmed:
    """Return `tokenizer` with the `size` tokens that `counts` (by number) speaks for.

    Tokens that are equally frequent stay in the order of their merges, which is that of their frequency
    in the text that the tokenizer was trained on. needed: numbers of tokens that stay in any case.

    Raises:
        Conflict: this kind of tokenizer cannot be trimmed; names the kind.
        SpecError: `size` does not suffice for what any text needs.
    """
    document = _document(tokenizer)
    table = _Table(document)
    unknown = sorted(set(needed) - set(table.names))
    if unknown:
        raise Conflict(
            f"the model's configs name token {unknown[0]}, which its tokenizer does not have. Correct "
            "config.json or generation_config.json."
        )
    kept = _mandatory(document, table) | set(needed)
    mandatory = len(kept)
    if size < mandatory or size > len(table.names):
        raise SpecError(
            f"vocabulary: size={size} does not fit this tokenizer: {mandatory} tokens are needed so that any "
            f"text can be encoded, and {len(table.names)} are there. Take a number in between."
        )
    for token in sorted(table.names, key=lambda token: (-_count(counts, token), table.rank(token))):
        brought = table.closure(token) - kept
        if brought and len(kept) + len(brought) <= size:
            kept |= brought
        if len(kept) == size:
            break
    if len(kept) < size:
        raise SpecError(
            f"vocabulary: only {len(kept)} tokens of this tokenizer can be reached by merging. "
            f"Take at most {len(kept)}."
        )
    order = tuple(sorted(kept))
    places = {old: new for new, old in enumerate(order)}
    return Trimmed(
        _reloaded(tokenizer, _renumbered(document, table, places), places), order, mandatory
    )


def _count(counts: Sequence[int], token: int) -> int:
    return counts[token] if token < len(counts) else 0


def _document(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as tokenizer.json describes it.

    Raises:
        Conflict: it is not byte-pair encoding as it is known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Conflict(
            f"{type(tokenizer).__name__} has no tokenizer.json, and only that can be trimmed. Convert it "
            "to a fast tokenizer first."
        )
    document: dict[str, Any] = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise Conflict(
            f"the tokenizer is {model['type']}, and only BPE has merges that say which tokens can go. "
            "Leave vocabulary out."
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise Conflict(
                f"the tokenizer marks pieces of words ({name}={model[name]!r}), and merges of such pieces "
                "are not followed here. Leave vocabulary out."
            )
    return document


class _Table:
    """Tokens, merges, and how merging reaches a token."""

    def __init__(self, document: dict[str, Any]) -> None:
        model = document["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.added = {token["content"]: token["id"] for token in document["added_tokens"]}
        self.names = {number: name for name, number in (self.vocabulary | self.added).items()}
        # Older files write a merge as one text; no token of theirs holds a space.
        self.merges = [
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
            for merge in model["merges"]
        ]
        self.ranks: dict[tuple[str, ...], int] = {}
        self.first: dict[str, int] = {}
        for rank, merge in enumerate(self.merges):
            self.ranks.setdefault(merge, rank)
            self.first.setdefault("".join(merge), rank)
        self.falls_back = bool(model.get("byte_fallback"))
        self.whole_words = bool(model.get("ignore_merges"))

    def rank(self, token: int) -> int:
        """Where the first merge that makes the token stands; single characters come before."""
        return self.first.get(self.names[token], -1)

    def closure(self, token: int) -> set[int]:
        """The token with all that merging its text passes through; empty if that does not reach it."""
        name = self.names[token]
        if name in self.added:
            return {token}
        parts = list(name)
        passed = set(parts)
        while len(parts) > 1:
            pairs = [
                (self.ranks[pair], place)
                for place, pair in enumerate(pairwise(parts))
                if pair in self.ranks
            ]
            if not pairs:
                break
            _, place = min(pairs)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            passed.add(parts[place])
        if parts != [name] or not passed <= self.vocabulary.keys():
            # Whole words may be looked up before any merging; byte tokens are no text at all.
            alone = self.whole_words or name in BYTES
            return {token} if alone else set()
        return {self.vocabulary[part] for part in passed}


def _mandatory(document: dict[str, Any], table: _Table) -> set[int]:
    """Numbers of the tokens without which some text could not be encoded, or would change its meaning."""
    pieces: Iterable[str]
    if any(part["type"] == "ByteLevel" for part in _parts(document["pre_tokenizer"])) or any(
        part["type"] == "ByteLevel" for part in _parts(document["decoder"])
    ):
        pieces = ByteLevel.alphabet()
    elif table.falls_back and table.vocabulary.keys() >= set(BYTES):
        # A space is written as this character, and back only where that is a token.
        pieces = (*BYTES, "\u2581")
    else:
        pieces = [name for name in table.vocabulary if len(name) == 1]
    found = {table.vocabulary[piece] for piece in pieces if piece in table.vocabulary}
    unknown = document["model"].get("unk_token")
    return found | set(table.added.values()) | {table.vocabulary[t] for t in [unknown] if t}


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer, post-processor or decoder, one inside the other."""
    if step is None:
        return
    yield step
    for name in ("pretokenizers", "processors", "decoders"):
        for inner in step.get(name, ()):
            yield from _parts(inner)


def _renumbered(document: dict[str, Any], table: _Table, places: dict[int, int]) -> dict[str, Any]:
    """The document with the tokens of `places`, by their new numbers.

    Raises:
        Conflict: a step names tokens in a way that is not known here.
    """
    model = document["model"]
    model["vocab"] = {
        name: places[number] for name, number in table.vocabulary.items() if number in places
    }
    model["merges"] = [
        list(merge) for merge in table.merges if {*merge, "".join(merge)} <= model["vocab"].keys()
    ]
    for token in document["added_tokens"]:
        token["id"] = places[token["id"]]
    if document["padding"]:
        document["padding"]["pad_id"] = places[document["padding"]["pad_id"]]
    for step in _parts(document["post_processor"]):
        if step["type"] == "TemplateProcessing":
            for token in step["special_tokens"].values():
                token["ids"] = [places[number] for number in token["ids"]]
        elif step["type"] in ("RobertaProcessing", "BertProcessing"):
            for name in ("sep", "cls"):
                step[name] = [step[name][0], places[step[name][1]]]
        elif step["type"] not in ("ByteLevel", "Sequence"):
            raise Conflict(
                f"the tokenizer's {step['type']} may name tokens in a way that is not known here. Leave "
                "vocabulary out."
            )
    return document


def _reloaded(tokenizer: Any, document: dict[str, Any], places: dict[int, int]) -> Any:
    """A tokenizer of the same habits (templates, sides, roles) over another tokenizer.json.

    Raises:
        Conflict: this class of tokenizers makes something else of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer_config.json")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if numbered := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {
                str(places[int(number)]): token for number, token in numbered.items()
            }
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        # Whatever else holds the old numbers would win over tokenizer.json for some classes.
        for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
            Path(folder, name).unlink(missing_ok=True)
        text = json.dumps(document, ensure_ascii=False)
        Path(folder, "tokenizer.json").write_text(text, encoding="utf-8")
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made.name_or_path = tokenizer.name_or_path
    wanted = document["model"]["vocab"] | {t["content"]: t["id"] for t in document["added_tokens"]}
    if made.get_vocab() != wanted:
        raise Conflict(
            f"{type(tokenizer).__name__} does not take its tokens from tokenizer.json, so they cannot be "
            "numbered anew. Leave vocabulary out."
        )
    return made
