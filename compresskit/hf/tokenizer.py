"""A transformers tokenizer behind the small protocol that compresskit asks for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from compresskit.errors import InputError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class HFTokenizer:
    """Encode, decode and chat through a transformers tokenizer."""

    def __init__(self, inner: Any, eos_ids: tuple[int, ...]) -> None:
        """Wrap `inner`; `eos_ids` come from the generation config, which may name several."""
        self.inner = inner
        self.eos_ids = eos_ids
        self.bos_id: int | None = inner.bos_token_id
        self.has_chat_template = bool(inner.chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, what the tokenizer itself adds.

        `verbose=False` keeps the warning about texts longer than the context away: evaluation
        texts are cut into windows afterwards.
        """
        ids: list[int] = self.inner(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        text: str = self.inner.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, text: str) -> list[int]:
        """Token ids of one user turn with the generation prompt; `InputError` without a template."""
        if not self.has_chat_template:
            raise InputError("this model's tokenizer has no chat template. Leave --chat out.")
        turn = [{"role": "user", "content": text}]
        rendered: str = self.inner.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        return self.encode(rendered, special=False)


def load_tokenizer(path: Path, eos: object, *, trust_remote_code: bool = False) -> HFTokenizer:
    """Load the tokenizer in `path`; raise `ModelError` if there is none."""
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: no usable tokenizer ({error}). Add the model's tokenizer files."
        ) from None
    named = eos if isinstance(eos, list) else [eos]
    ids = [i for i in (*named, inner.eos_token_id) if isinstance(i, int)]
    return HFTokenizer(inner, tuple(dict.fromkeys(ids)))


def tokenizer_digest(tokenizer: HFTokenizer) -> str:
    """SHA-256 over the sorted vocabulary and the special ids: equal digests encode into equal ids."""
    vocabulary = sorted(tokenizer.inner.get_vocab().items(), key=lambda item: item[1])
    text = repr((vocabulary, tokenizer.eos_ids, tokenizer.bos_id))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def vocabulary(path: Path) -> dict[str, int]:
    """Every token of the tokenizer in the folder `path` with its id, added ones included.

    Equal vocabularies mean the same by the same id, whatever else differs (special roles, templates).
    Reads tokenizer.json where there is one, which takes no transformers.

    Raises:
        ModelError: there is no usable tokenizer.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        held: dict[str, int] = load_tokenizer(path, None).inner.get_vocab()
        return held
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        table = document["model"]["vocab"]
        # Unigram models list pieces with their scores; the id is the place.
        pairs = table.items() if isinstance(table, dict) else _numbered(table)
        added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
        return {**dict(pairs), **added}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a tokenizer ({error!r}). Fetch the file again.") from None


def _numbered(table: list[list[Any]]) -> Iterator[tuple[str, int]]:
    return ((piece[0], index) for index, piece in enumerate(table))
