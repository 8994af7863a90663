"""The likeliest tokens of each place, and how much probability is left for the others together.

    teacher   .61 .22 .09 | .03 .02 .02 .01     k = 3
    kept      .61 .22 .09 |      .08

A student taught by the kept tokens alone learns to forget the rest, so what is left is kept as well:
a loss may treat it as one more token, or spread it. Either way the tail's inside is lost for good,
and no number of places averages that away (that is a bias; `draws` has none).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from compresskit.distill.batch import TopK
from compresskit.distill.teachers.cache.formats import (
    Column,
    Format,
    Stored,
    entropy,
    id_type,
    mean_of,
)
from compresskit.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class TopKFormat(Format):
    """Ids and log-probabilities of the `k` likeliest tokens."""

    kind: ClassVar[Literal["topk"]] = "topk"
    about: ClassVar[str] = (
        "kl is that of the teacher from what the cache gives back, the tail spread evenly; "
        "cutting the tail off biases the student (Anshumann et al. 2025, arXiv 2503.16870)"
    )

    k: Annotated[int, Field(ge=1)] = 64
    """Tokens kept of each place."""
    store: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the log-probabilities: bfloat16 keeps them to one part in 256."""

    def columns(self, vocabulary: int) -> Mapping[str, Column]:
        """ids, logprobs, and rest: the log of what is left."""
        if self.k > vocabulary:
            raise SpecError(
                f"{self.label()}: the teacher has {vocabulary} tokens. Set k={vocabulary} or less."
            )
        number = getattr(torch, self.store)
        return {
            "ids": Column(id_type(vocabulary), self.k),
            "logprobs": Column(number, self.k),
            "rest": Column(number, 1),
        }

    def uniforms(self) -> int:
        """None: nothing is drawn."""
        return 0

    def pack(self, logprobs: torch.Tensor, uniforms: torch.Tensor) -> Stored:
        """Keep the likeliest, in falling order."""
        columns = self.columns(logprobs.shape[-1])
        kept, ids = logprobs.topk(self.k, dim=-1)
        # Summed up, not subtracted from one: small tails would drown in the rounding of the top.
        rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return {
            "ids": ids.to(columns["ids"].dtype),
            "logprobs": kept.to(columns["logprobs"].dtype),
            "rest": rest.to(columns["rest"].dtype),
        }

    def unpack(self, stored: Mapping[str, torch.Tensor]) -> TopK:
        """Bring the rounded numbers back to a sum of one, which a divergence takes for granted."""
        kept, rest = stored["logprobs"].float(), stored["rest"].float()
        whole = torch.cat((kept, rest), dim=-1)
        whole = whole - whole.logsumexp(-1, keepdim=True)
        return TopK(stored["ids"].long(), whole[:, :-1], whole[:, -1])

    def errors(self, logprobs: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
        """Kl (nats) of the teacher from what comes back, its rest spread evenly; the rest's mass."""
        back = self.unpack(stored)
        kept = logprobs.gather(-1, back.ids).double()
        kl = mean_of(kept.exp(), kept - back.logprobs.double())
        mass = back.rest.double().exp()
        if others := logprobs.shape[-1] - self.k:
            tail = logprobs.scatter(-1, back.ids, -torch.inf)
            spread = back.rest.double() - math.log(others)
            left = tail.exp().sum(-1, dtype=torch.float64)
            kl = kl - entropy(tail) - mean_of(left[:, None], spread[:, None])
        return {"kl": kl, "rest": mass}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Both means as they are."""
        return {"kl_nats": means["kl"], "mass_beyond_k": means["rest"]}
