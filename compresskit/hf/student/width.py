"""Make blocks narrower: fewer neurons in the feed-forward layers, fewer heads in attention.

    gate, up  [F, E] ──► rows of the neurons that stay        down [E, F] ──► their columns
    q [H*D, E], k, v [K*D, E] ──► rows of the groups          o [E, H*D]  ──► their columns

The hidden state keeps its width, so embedding, norms and a shared head stay as they are. A group of
heads is one key/value head with the query heads that read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator

from compresskit.errors import SpecError
from compresskit.hf.load import has_experts
from compresskit.hf.student.importance import Importance, importance
from compresskit.hf.student.maker import Draft, Maker
from compresskit.hf.student.parts import Attention, FeedForward, attentions, feed_forwards
from compresskit.hf.student.rebuild import changed, check_plain, float_tensors, rebuilt, skeleton
from compresskit.hf.student.sample import batches

if TYPE_CHECKING:
    from pydantic import JsonValue

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@final
class Width(Maker):
    """Keep the neurons and the groups of heads that add most to the hidden state.

    Each block chooses for itself; all blocks end up equally wide.

    Paper: Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation
    (Minitron), arXiv 2407.14679.
    Differs: there a neuron counts by its activation and a head by the norm of its output; here both
    count by what arrives at the hidden state, the output matrix included (`importance`). Heads go in
    whole key/value groups; hidden width is not pruned; no importance is re-estimated in between.
    """

    name: ClassVar[str] = "width"

    ffn: Count | Share | None = None
    """Neurons of a feed-forward layer, or share of them (0.5), rounded to what kernels like."""
    heads: Count | Share | None = None
    """Query heads, or share of them; whole key/value groups, as near to the share as the model takes."""
    choose: Literal["activation", "random"] = "activation"
    """random is the control, drawn from the seed."""

    @model_validator(mode="after")
    def _something(self) -> Width:
        if self.ffn is None and self.heads is None:
            raise ValueError("say ffn=, heads= or both, as shares (0.5) or numbers")
        return self

    def shape(self, config: Any) -> Any:
        """See `Maker.shape`."""
        check_plain(config, where=self.name)
        if has_experts(config.to_dict()):
            raise SpecError(
                f"width: {config.model_type} has routed experts, and pruning those is not done here. "
                "Use layers or scratch."
            )
        hollow = skeleton(config)
        fields: dict[str, Any] = {}
        if self.ffn is not None:
            size = feed_forwards(hollow)[0].size
            fields[_ffn_field(config)] = neurons(self.ffn, size)
        if self.heads is None:
            return changed(config, where=self.name, **fields)
        one = attentions(hollow)[0]
        refused: list[SpecError] = []
        for groups in groups_left(self.heads, one):
            # The width is said too: it would be divided anew among the heads otherwise.
            sizes = {
                "head_dim": one.width,
                "num_attention_heads": groups * one.queries,
                "num_key_value_heads": groups,
            }
            try:
                return changed(config, where=self.name, **fields, **sizes)
            except SpecError as error:  # some configs want a hidden size that heads divide
                refused.append(error)
        raise refused[0]

    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """See `Maker.make`."""
        model = draft.model
        config = self.shape(model.config)
        tensors = dict(float_tensors(model))
        ffns = feed_forwards(model) if self.ffn is not None else []
        heads = attentions(model) if self.heads is not None else []
        found = None
        if self.choose == "activation":
            found = importance(model, batches(rows), ffns, heads)
        generator = torch.Generator().manual_seed(seed)
        facts: dict[str, JsonValue] = {"choose": self.choose}
        for place, ffn in enumerate(ffns):
            size = getattr(config, _ffn_field(config))
            _keep_neurons(tensors, ffn, _choice(found, "neurons", place, ffn.size, size, generator))
            facts["ffn"] = {"from": ffn.size, "to": size}
        kept_groups: list[JsonValue] = []
        for place, one in enumerate(heads):
            kept = _choice(
                found, "groups", place, one.groups, config.num_key_value_heads, generator
            )
            _keep_groups(tensors, one, kept)
            kept_groups.append(kept.tolist())
        if heads:
            facts["heads"] = {
                "from": heads[0].groups * heads[0].queries,
                "to": config.num_attention_heads,
                "width": heads[0].width,
                "groups_kept": kept_groups,
            }
        if found is not None:
            facts["kept_importance"] = found.kept
        student = rebuilt(model, config, tensors)
        return Draft(student, draft.tokenizer, draft.blocks, {**draft.facts, self.name: facts})


def groups_left(wanted: float, one: Attention) -> list[int]:
    """Numbers of key/value groups that may stay: of a number that one, of a share the nearest first.

    Raises:
        SpecError: that is all of them, or the query heads do not divide into groups.
    """
    total = one.groups * one.queries
    if isinstance(wanted, int):
        if wanted % one.queries or wanted >= total:
            raise SpecError(
                f"width: heads={wanted} of {total}: heads go in groups of {one.queries} that share a "
                f"key/value head. Take a multiple of {one.queries} below {total}."
            )
        return [wanted // one.queries]
    if max(1, round(wanted * one.groups)) >= one.groups:
        raise SpecError(
            f"width: heads={wanted} leaves {one.groups} of {one.groups} groups of heads. Take a smaller "
            "share, or leave heads out."
        )
    return sorted(range(1, one.groups), key=lambda groups: abs(groups - wanted * one.groups))


def neurons(wanted: float, size: int) -> int:
    """Neurons that stay of `size`: a number as it was given, a share rounded to multiples.

    Tiles of matrix products and groups of quantised weights are 64 or 32 wide. The multiple is the
    largest of 64, 32, 16 and 8 that is at most an eighth of the size, so that rounding moves the size
    by no more than a sixteenth.

    Raises:
        SpecError: none would go.
    """
    count = wanted if isinstance(wanted, int) else wanted * size
    if not isinstance(count, int):
        step = next((step for step in (64, 32, 16, 8) if 8 * step <= count), 1)
        count = max(step, round(count / step) * step)
    if count >= size:
        raise SpecError(
            f"width: ffn={wanted} leaves {count} of {size} neurons. Take a smaller share or number."
        )
    return count


def _ffn_field(config: Any) -> str:
    """The field of the config that holds the number of neurons."""
    return "n_inner" if hasattr(config, "n_inner") else "intermediate_size"


def _choice(
    found: Importance | None,
    what: Literal["neurons", "groups"],
    place: int,
    total: int,
    count: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """int64 `[count]`, rising: what stays in block `place`."""
    if found is None:
        return torch.randperm(total, generator=generator)[:count].sort().values
    return found.best(what, place, count)


def _take(tensors: dict[str, torch.Tensor], name: str, dim: int, kept: torch.Tensor) -> None:
    if name in tensors:
        tensors[name] = tensors[name].index_select(dim, kept.to(tensors[name].device))


def _keep_neurons(tensors: dict[str, torch.Tensor], ffn: FeedForward, kept: torch.Tensor) -> None:
    for path in ffn.into:
        _take(tensors, f"{path}.weight", 1 if ffn.transposed else 0, kept)
        _take(tensors, f"{path}.bias", 0, kept)
    _take(tensors, f"{ffn.out}.weight", 0 if ffn.transposed else 1, kept)


def _keep_groups(tensors: dict[str, torch.Tensor], one: Attention, kept: torch.Tensor) -> None:
    keys = _spread(kept, one.width)
    queries = _spread(kept, one.width * one.queries)
    for suffix in (".weight", ".bias"):
        _take(tensors, one.q + suffix, 0, queries)
        _take(tensors, one.k + suffix, 0, keys)
        _take(tensors, one.v + suffix, 0, keys)
    _take(tensors, f"{one.o}.weight", 1, queries)
    if one.norms is not None:
        _take(tensors, f"{one.norms[0]}.weight", 0, queries)
        _take(tensors, f"{one.norms[1]}.weight", 0, keys)


def _spread(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of the kept groups, which are `width` rows each."""
    return (kept[:, None] * width + torch.arange(width)).flatten()
