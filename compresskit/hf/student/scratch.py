"""Begin from nothing: the teacher's kind of model in other sizes, with random weights."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import ConfigDict, Field, JsonValue

from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.hf.student.maker import Draft, Maker
from compresskit.hf.student.rebuild import built, changed, check_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

FIXED = (
    "model_type",
    "architectures",
    "vocab_size",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Fields that come with the teacher: its kind, its tokenizer, its type."""


@final
class Scratch(Maker):
    """Draw a fresh model; any field of the teacher's config may be set, by transformers' names.

    Fields that are not named stay as they are in the teacher, `head_dim` too: of a teacher with heads of
    64, a student of half the width keeps heads of 64 unless `head_dim=32` is said. A list with one
    entry for each block (`layer_types`) is cut after the first blocks, which keeps its pattern.

    Embeddings that start far apart (`embedding_spread=8`) keep names distinct that play the same part in
    every text; the shipped tiny models were trained that way.
    """

    model_config = ConfigDict(extra="allow")

    name: ClassVar[str] = "scratch"

    embedding_spread: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the input embedding (and on the head that shares it), as transformers draws it."""

    def fields(self) -> Mapping[str, JsonValue]:
        """The fields of the config that were asked for."""
        return self.__pydantic_extra__ or {}

    def shape(self, config: Any) -> Any:
        """See `Maker.shape`."""
        check_plain(config, where=self.name)
        fields = {self._known(config, name): value for name, value in self.fields().items()}
        fields |= _lists(config, fields)
        _check_sizes(config, fields)
        return changed(config, where=self.name, **fields)

    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """See `Maker.make`."""
        config = self.shape(draft.model.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = built(draft.model, config)
        with torch.no_grad():
            modules.embedding(student).module.weight.mul_(self.embedding_spread)  # type: ignore[operator]
        # The block at the end of the same share of the depth: the last stands for the last.
        count, total = config.num_hidden_layers, len(draft.blocks)
        alike = tuple(
            draft.blocks[max(0, round((place + 1) * total / count) - 1)] for place in range(count)
        )
        facts: dict[str, JsonValue] = {"seed": seed, **self.fields()}
        return Draft(student, draft.tokenizer, alike, {**draft.facts, self.name: facts})

    def _known(self, config: Any, name: str) -> str:
        """The name that was asked for, by transformers' common name.

        Raises:
            SpecError: the config has no such field, or it must stay as it is.
        """
        common = {own: shared for shared, own in type(config).attribute_map.items()}
        known = {*config.to_dict(), *type(config).attribute_map}
        if name in FIXED or name.endswith(("_token_id", "_token_ids")):
            raise SpecError(
                f"scratch: {name} comes with the teacher. "
                + ("Add vocabulary:size=N." if name == "vocab_size" else "Leave it out.")
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SpecError(f"scratch: the config of {config.model_type} has no {name!r}.{hint}")
        found: str = common.get(name, name)
        return found


def _lists(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each block, cut to the number of blocks that was asked for.

    Raises:
        SpecError: there are more blocks than the list has entries.
    """
    total = config.num_hidden_layers
    count = fields.get("num_hidden_layers", total)
    found = {}
    for name, value in config.to_dict().items():
        if isinstance(value, list) and "layer" in name and len(value) == total != count:
            if name in fields:
                continue
            if not isinstance(count, int) or count > total:
                raise SpecError(
                    f"scratch: {config.model_type} lists {name} for {total} blocks, not for {count}. "
                    f"Say {name}=[...] too."
                )
            found[name] = value[:count]
    return found


def _check_sizes(config: Any, fields: Mapping[str, Any]) -> None:
    """Refuse sizes that cannot be divided, before transformers does in its own words.

    Raises:
        SpecError: says which sizes, and what would do.
    """
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    sizes = {name: fields.get(name, getattr(config, name, None)) for name in names}
    for name, size in sizes.items():
        if size is not None and not isinstance(size, int):
            return  # `changed` has a word for it
        if size is not None and size < 1:
            raise SpecError(f"scratch: {name} must be at least 1, not {size}.")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    groups, each = sizes["num_key_value_heads"] or heads, sizes["head_dim"]
    if heads % groups:
        raise SpecError(
            f"scratch: {heads} query heads cannot share {groups} key/value heads evenly. Say both: "
            "num_attention_heads as a multiple of num_key_value_heads."
        )
    if each is None and width % heads:
        raise SpecError(
            f"scratch: hidden_size={width} cannot be divided into {heads} heads. Take a multiple of "
            f"{heads}, such as {max(1, round(width / heads)) * heads}."
        )
    # Rotary embeddings turn pairs of numbers.
    if (each or width // heads) % 2:
        raise SpecError(f"scratch: heads are {each or width // heads} wide, and that must be even.")
