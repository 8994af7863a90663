"""Take a model that is there: a smaller one of the same tokens, or a student that has more to learn.

given:model=pypi:smollm2-135m      a small model of the teacher's family, taught by the large one
given:model=build/first            a student of an earlier training, whose lesson was another
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from compresskit import card as cards
from compresskit.device import resolve as resolve_device
from compresskit.hf import load
from compresskit.hf.sources import resolve
from compresskit.hf.student.maker import Draft, Maker
from compresskit.hf.student.rebuild import check_plain
from compresskit.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from pydantic import JsonValue

    from compresskit.hf.sources import ResolvedModel


@final
class Given(Maker):
    """Begin with the weights of another model; the teacher has to count tokens as it does.

    A model that was itself distilled brings its card along: what it cost is kept in the facts, and
    `compresskit distill` adds it to the cost of the training to come.
    """

    name: ClassVar[str] = "given"

    model: str
    """A folder, a Hub id, pypi:NAME, or tiny:draft."""
    revision: str | None = None
    """Pin of a Hub model: a commit, branch or tag."""

    def shape(self, config: Any) -> Any:
        """See `Maker.shape`."""
        found = load.load_config(self._source().path, ModelSpec())
        check_plain(found, where=self.name)
        return found

    def make(self, draft: Draft, rows: torch.Tensor, *, seed: int) -> Draft:
        """See `Maker.make`."""
        source = self._source()
        kind = "cuda" if draft.model.device.type == "cuda" else "cpu"
        loaded = load.load_model(source.path, ModelSpec(dtype="float32"), resolve_device(kind))
        count, total = loaded.model.config.num_hidden_layers, len(draft.blocks)
        alike = tuple(
            draft.blocks[max(0, round((place + 1) * total / count) - 1)] for place in range(count)
        )
        facts: dict[str, JsonValue] = {"model": self.model, "revision": source.revision}
        card = cards.read(Path(source.path))
        if card is not None:
            facts["recipe_digest"] = card.recipe_digest
            facts["training"] = card.training.model_dump(mode="json")
        tokenizer = loaded.tokenizer.inner
        return Draft(loaded.model, tokenizer, alike, {**draft.facts, self.name: facts})

    def _source(self) -> ResolvedModel:
        return resolve(self.model, revision=self.revision)
