"""Keep fewer tokens: the rows of embedding and head that are left, and a tokenizer that knows no others.

The tokenizer half, which tokens can go at all, is `bpe`; here they are counted, chosen, and the model is
cut to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import Field

from compresskit.errors import Conflict, SpecError
from compresskit.hf import modules
from compresskit.hf.student import bpe
from compresskit.hf.student.maker import Draft, Maker
from compresskit.hf.student.rebuild import changed, check_plain, float_tensors, rebuilt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Fields of a generation config that name tokens, of which those that are left out may be forgotten."""
TREES = ("bad_words_ids", "force_words_ids", "sequence_bias", "forced_decoder_ids")
"""Fields that name sequences of tokens, which have no equal among fewer tokens."""
SAMPLE = 64
"""Rows that are encoded anew to see how much longer text becomes."""


@final
class Vocabulary(Maker):
    """Keep the tokens that the training text uses most, and all that any text needs.

    Tokens that are added to the text by name, all bytes (or characters), and those that the configs
    name stay. A token brings along the tokens that it is merged from. What text encodes into afterwards
    decodes into the same text; it is more tokens, so likelihoods are comparable by bytes of text only.

    Differs from training a new tokenizer: merges keep their order and tokens their embeddings.
    """

    name: ClassVar[str] = "vocabulary"

    size: Annotated[int, Field(ge=2)]
    """Tokens that stay, added ones included."""

    def shape(self, config: Any) -> Any:
        """See `Maker.shape`. Which ids the special tokens get is known once tokens are counted."""
        check_plain(config, where=self.name)
        self._check(config)
        nameless = dict.fromkeys(_id_fields(config))
        return changed(config, where=self.name, vocab_size=self.size, **nameless)

    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """See `Maker.make`."""
        model = draft.model
        self._check(model.config)
        named = _named(model)
        counts = torch.bincount(rows.flatten().cpu(), minlength=len(draft.tokenizer)).tolist()
        trimmed = bpe.trim(draft.tokenizer, self.size, counts, needed=named)
        if trimmed.kept[-1] >= model.config.vocab_size:
            raise Conflict(
                f"the tokenizer has a token {trimmed.kept[-1]}, and the teacher only "
                f"{model.config.vocab_size} embeddings. Resize the teacher's embedding first."
            )
        places = {old: new for new, old in enumerate(trimmed.kept)}
        config = changed(
            model.config, where=self.name, vocab_size=self.size, **_ids(model.config, places)
        )
        student = rebuilt(model, config, _rows(model, torch.tensor(trimmed.kept)))
        for name, value in _ids(model.generation_config, places).items():
            setattr(student.generation_config, name, value)
        covered = sum(counts[old] for old in trimmed.kept) / max(1, sum(counts))
        facts: dict[str, JsonValue] = {
            "from": model.config.vocab_size,
            "to": self.size,
            "needed_by_any_text": trimmed.mandatory,
            "occurrences_kept": covered if rows.numel() else None,
            "tokens_of_same_text": _longer(draft.tokenizer, trimmed.tokenizer, rows),
        }
        return Draft(student, trimmed.tokenizer, draft.blocks, {**draft.facts, self.name: facts})

    def _check(self, config: Any) -> None:
        if self.size >= config.vocab_size:
            raise SpecError(
                f"vocabulary: size={self.size} is no fewer than the {config.vocab_size} tokens of the teacher. "
                "Take fewer."
            )


def _id_fields(config: Any) -> dict[str, Any]:
    """Fields of a config that name a token, or several that mean the same, and are set."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_ids")) and value is not None
    }


def _ids(config: Any, places: Mapping[int, int]) -> dict[str, Any]:
    """The fields of `config` that name tokens, by their new numbers."""
    found: dict[str, Any] = {}
    for name, value in _id_fields(config).items():
        found[name] = [places[i] for i in value] if isinstance(value, list) else places[value]
    for name in LISTS:
        if listed := getattr(config, name, None):
            found[name] = [places[i] for i in listed if i in places] or None
    return found


def _named(model: Any) -> set[int]:
    """Tokens that the configs of `model` name.

    Raises:
        Conflict: they name sequences.
    """
    found: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in TREES:
            if getattr(config, name, None):
                raise Conflict(
                    f"the generation config names sequences of tokens ({name}), which would be others with "
                    "fewer tokens. Take it out of generation_config.json."
                )
        for value in _id_fields(config).values():
            found.update(value if isinstance(value, list) else [value])
    return found


def _rows(model: Any, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of `model` with the rows `kept` of embedding and head."""
    tensors = dict(float_tensors(model))
    top = modules.head(model)
    names = {f"{modules.embedding(model).name}.weight"}
    for name, module in model.named_modules():
        if module is top:
            names |= {f"{name}.weight", f"{name}.bias"}
    for name in names & set(tensors):
        tensors[name] = tensors[name].index_select(0, kept.to(tensors[name].device))
    return tensors


def _longer(before: Any, after: Any, rows: torch.Tensor) -> float | None:
    """Tokens of the same text afterwards, as a multiple of those before; None without text."""
    texts = before.batch_decode(rows[:SAMPLE].tolist(), clean_up_tokenization_spaces=False)
    old, new = (
        sum(len(one(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts)
        for one in (before, after)
    )
    return new / old if old else None
