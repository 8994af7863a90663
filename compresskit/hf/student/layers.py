"""Drop whole blocks.

teacher   embed ─► 0 ─► 1 ─► 2 ─► 3 ─► norm ─► head
student   embed ─► 0 ─────────────► 3 ─► norm ─► head      blocks renumbered, config cut
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from compresskit.errors import Conflict, SpecError
from compresskit.hf import blocks
from compresskit.hf.student.maker import Draft, Maker
from compresskit.hf.student.rebuild import changed, check_plain, float_tensors, rebuilt
from compresskit.hf.student.sample import batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import JsonValue

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields with one entry for each block."""
NUMBERED = ("mlp_only_layers",)
"""Fields that list numbers of blocks."""
BY_POSITION = (
    ("decoder_sparse_step", 1),
    ("first_k_dense_replace", 0),
    ("num_kv_shared_layers", 0),
)
"""Fields that give a block its kind by its number, and the value at which they do not."""


@final
class Layers(Maker):
    """Keep some of the blocks.

    influence  Block Influence, 1 - cos(input, output) of a block, averaged over tokens; all blocks are
               judged in one pass through the whole model, and those with the least go
    uniform    evenly spread, the first and the last among them
    last       the deepest go, except the very last one, which is used to speak to the head
    random     the control, drawn from the seed

    No block is sacred: under `influence` the first and the last one stay because they change the hidden
    state most, not because a rule says so.

    Papers: Men et al. 2024, ShortGPT, arXiv 2403.03853 (influence); Gromov et al. 2024, The
    Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887 (last).
    Differs: the latter's choice of the deepest blocks only, not its search for the most similar pair.
    """

    name: ClassVar[str] = "layers"

    keep: Count | Share | None = None
    """Number of blocks, or share of them (0.5); half unless `blocks` lists them."""
    choose: Literal["influence", "uniform", "last", "random"] = "influence"
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """The blocks to keep, rising, instead of a choice."""

    @model_validator(mode="after")
    def _one_way(self) -> Layers:
        if self.blocks is not None:
            if self.keep is not None or self.choose != "influence":
                raise ValueError("blocks says which to keep; leave keep and choose out")
            if list(self.blocks) != sorted(set(self.blocks)):
                raise ValueError("list the blocks in rising order, each once")
        return self

    def shape(self, config: Any) -> Any:
        """See `Maker.shape`.

        Which blocks stay is known here for `uniform`, `last` and listed ones. For the others the
        uniform choice stands in, which is as large wherever blocks are as large as each other.
        """
        check_plain(config, where=self.name)
        total = config.num_hidden_layers
        choose = self.choose if self.choose == "last" else "uniform"
        return _cut(config, self.blocks_of(total) or pick(choose, total, self.count(total)))

    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """See `Maker.make`."""
        model = draft.model
        tensors = float_tensors(model)
        total = model.config.num_hidden_layers
        facts: dict[str, JsonValue] = {"choose": "blocks" if self.blocks else self.choose}
        kept = self.blocks_of(total)
        if kept is None and self.choose == "influence":
            scores = influence(model, batches(rows))
            kept = most(scores, self.count(total))
            facts["influence"] = list(scores)
        elif kept is None:
            kept = pick(self.choose, total, self.count(total), seed=seed)
        config = _cut(model.config, kept)
        path = blocks.find(model)[0].name.rpartition(".")[0] + "."
        student = rebuilt(model, config, _renumbered(tensors, path, kept))
        facts |= {
            "kept": list(kept),
            "dropped": [index for index in range(total) if index not in kept],
        }
        return Draft(
            student,
            draft.tokenizer,
            tuple(draft.blocks[index] for index in kept),
            {**draft.facts, self.name: facts},
        )

    def count(self, total: int) -> int:
        """How many of `total` blocks stay.

        Raises:
            SpecError: that would be all of them, or more.
        """
        keep = 0.5 if self.keep is None else self.keep
        count = keep if isinstance(keep, int) else max(1, round(keep * total))
        if count >= total:
            raise SpecError(
                f"layers: keep={keep} keeps {count} of {total} blocks, and a student has fewer than "
                f"its teacher. Keep at most {total - 1}."
            )
        return count

    def blocks_of(self, total: int) -> tuple[int, ...] | None:
        """The listed blocks, if they were listed.

        Raises:
            SpecError: the model has no such blocks, or they are all there are.
        """
        if self.blocks is not None and (self.blocks[-1] >= total or len(self.blocks) == total):
            raise SpecError(
                f"layers: blocks={list(self.blocks)} does not make a model of {total} blocks smaller. "
                f"List some of 0 to {total - 1}."
            )
        return self.blocks


def pick(choose: str, total: int, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """`count` of `total` blocks by a rule that looks at no activations."""
    if choose == "last":
        return (*range(count - 1), total - 1)
    if choose == "random":
        return tuple(sorted(random.Random(seed).sample(range(total), count)))
    if count == 1:
        return (0,)
    return tuple(round(place * (total - 1) / (count - 1)) for place in range(count))


def most(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """Places of the `count` largest scores, rising; of equals the earlier."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return tuple(sorted(order[:count]))


@torch.no_grad()
def influence(model: Any, rows: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Block Influence of each block: 1 - cos(input, output), averaged over the tokens of `rows`.

    0 is a block that changes nothing but the length of the hidden state.

    Raises:
        Conflict: the blocks do not simply follow one another.
    """
    try:
        stream = blocks.Stream(model, [batch.to(model.device) for batch in rows])
    except Conflict:
        raise Conflict(
            f"{type(model).__name__} does more between its blocks than pass hidden states on, so their "
            "influence cannot be measured. Choose uniform or last, or list the blocks."
        ) from None
    scores = []
    for index in range(len(stream.blocks)):
        before = list(stream.hidden)
        stream.advance(index)
        cosines = [
            functional.cosine_similarity(x.double(), y.double(), dim=-1).flatten()
            for x, y in zip(before, stream.hidden, strict=True)
        ]
        scores.append(1.0 - torch.cat(cosines).mean().item())
    return tuple(scores)


def _cut(config: Any, kept: Sequence[int]) -> Any:
    """A copy of `config` with the blocks `kept`.

    Raises:
        SpecError: what kind a block is follows from its number, in a way that cannot be written down
            for the blocks that are left.
    """
    for name, harmless in BY_POSITION:
        if getattr(config, name, None) not in (None, harmless):
            raise SpecError(
                f"layers: {config.model_type} has {name}={getattr(config, name)}, which gives blocks "
                "their kind by their number, so none can be dropped. Use width or scratch."
            )
    total = config.num_hidden_layers
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in config.to_dict().items():
        if name in NUMBERED and value:
            fields[name] = [place for place, index in enumerate(kept) if index in value]
        elif isinstance(value, list) and name in PER_BLOCK:
            fields[name] = [value[index] for index in kept]
        elif isinstance(value, list) and "layer" in name and name not in NUMBERED and value:
            raise SpecError(
                f"layers: {config.model_type} lists {name} for its {total} blocks, and what that means "
                "for fewer is not known here. Use width or scratch."
            )
    return changed(config, where="layers", **fields)


def _renumbered(
    tensors: dict[str, torch.Tensor], path: str, kept: Sequence[int]
) -> dict[str, torch.Tensor]:
    """`tensors` without those of dropped blocks, which lie under `path`."""
    places = {str(index): place for place, index in enumerate(kept)}
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(path):
            found[name] = tensor
            continue
        index, _, rest = name.removeprefix(path).partition(".")
        if index in places:
            found[f"{path}{places[index]}.{rest}"] = tensor
    return found
