"""Keep the keys that queries to come are expected to look at.

    queries of the prompt, positions taken off   ──►   mean mu and covariance C of each head
    positions to come, averaged: R               ──►   q ~ N(R mu, R C R^T)
    score[s] = softmax over s ( scale * k_s R mu + scale^2 / 2 * k_s R C R^T k_s ) * |v_s|

The exponent is the logarithm of E[exp(scale * q k_s)] for such a q. No query of the future is needed,
and the end of the prompt counts no more than the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field, JsonValue

from compresskit.errors import Conflict, RunError
from compresskit.hf.cache import KEYS_VALUES, Layer, factory
from compresskit.methods.kv._evict import Evict, EvictingLayer, Rule
from compresskit.methods.kv._unrotated import Positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.hf.attention import Call
    from compresskit.hf.rotary import Rotary
    from compresskit.system import System

BLOCK = 4096
"""Tokens whose float32 copies exist at a time."""


def average_turn(x: torch.Tensor, rotary: Rotary, start: int, count: int) -> torch.Tensor:
    """Mean of `x` `[..., D]` turned to each of `count` positions from `start` on."""
    places = torch.arange(start, start + count, dtype=torch.float64, device=x.device)
    angles = places.unsqueeze(-1) * rotary.frequencies.to(x.device, torch.float64)
    cos, sin = angles.cos().mean(0).to(x.dtype), angles.sin().mean(0).to(x.dtype)
    n = cos.shape[0]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def expectation(
    keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, scale: float
) -> torch.Tensor:
    """Expected attention to rows, averaged over the query heads that share them: `[B, K, S]`.

    Args:
        keys: `[B, K, S, D]`.
        mean: of each head's queries, float32 `[B, H, 1, D]`.
        covariance: of each head's queries, float32 `[B, H, D, D]`.
        scale: factor of products of queries and keys.
    """
    batch, shared, _, width = keys.shape
    mean = mean.reshape(batch, shared, -1, 1, width)
    covariance = covariance.reshape(batch, shared, -1, width, width)
    parts = []
    for part in torch.split(keys, BLOCK, dim=-2):
        rows = part.float().unsqueeze(2)
        linear = (rows * mean).sum(-1)
        square = ((rows @ covariance) * rows).sum(-1)
        parts.append(scale * linear + scale**2 / 2 * square)
    return torch.cat(parts, dim=-1).softmax(dim=-1).mean(dim=2)


class ExpectedLayer(EvictingLayer):
    """Knows mean and covariance of the queries it has seen."""

    tensors = ("keys", "values", "mean", "spread")
    holds = MappingProxyType({**KEYS_VALUES, "mean": "index", "spread": "index"})
    watches = True

    mean: torch.Tensor | None
    """float32 `[B, H, 1, D]`."""
    spread: torch.Tensor | None
    """Sum of the squared deviations, float32 `[B, H, D, D]`."""

    def __init__(self, rule: Rule, positions: Positions, *, sink: int, future: int) -> None:
        """Hold nothing yet."""
        super().__init__(rule)
        self.positions, self.sink, self.future = positions, sink, future
        self.judges = 0

    def attend(self, call: Call) -> torch.Tensor:
        """Attend, take the queries into account, then drop."""
        if self.limit is None or self.rule.hold:
            start = self.get_seq_length() - call.query.shape[-2]
            # The first tokens are no normal text: their queries and keys are outliers.
            usual = call.query[..., max(self.sink - start, 0) :, :]
            if usual.shape[-2]:
                self.add(usual, max(start, self.sink))
        answer = super().attend(call)
        if not self.rule.hold:
            self.mean = self.spread = None
        return answer

    def add(self, query: torch.Tensor, start: int) -> None:
        """Take queries `[B, H, T, D]` at positions from `start` into mean and spread."""
        # Chan et al. 1983, Algorithms for Computing the Sample Variance: parts are merged without
        # the difference of large numbers that sums of squares would end in.
        for part in torch.split(query, BLOCK, dim=-2):
            bare = self.positions.off(part, start)
            count = part.shape[-2]
            start += count
            mean = bare.mean(dim=-2, keepdim=True)
            deviations = bare - mean
            spread = deviations.transpose(-1, -2) @ deviations
            if self.mean is not None and self.spread is not None:
                step = mean - self.mean
                total = self.judges + count
                spread += self.spread + step.transpose(-1, -2) @ step * (
                    self.judges * count / total
                )
                mean = self.mean + step * (count / total)
            self.mean, self.spread = mean, spread
            self.judges += count

    def score(self, call: Call | None) -> torch.Tensor:
        """Expected attention times the size of what would be read; the sinks are safe by rule."""
        if call is None or self.mean is None or self.spread is None:
            raise RunError("no query has been seen yet: drop rows after attention.")
        mean, covariance = self.mean, self.spread / self.judges
        rotary = self.positions.rotary
        if rotary is not None:
            start = self.get_seq_length()
            mean = average_turn(mean, rotary, start, self.future)
            # Turns the columns of C, then the rows of what came out: R C R^T.
            for _ in range(2):
                covariance = average_turn(covariance, rotary, start, self.future).transpose(-1, -2)
        usual = self.keys[..., self.sink :, :]
        attention = expectation(usual, mean, covariance, call.scale)
        sizes = torch.linalg.vector_norm(self.values[..., self.sink :, :].float(), dim=-1)
        return torch.nn.functional.pad(attention * sizes, (self.sink, 0))

    def keep(self, kept: torch.Tensor) -> None:
        """Keep these rows, and what is known of queries."""
        known = self.mean, self.spread
        self.mean = self.spread = None
        super().keep(kept)
        self.mean, self.spread = known

    def reset(self) -> None:
        """Forget everything, the count of queries included."""
        super().reset()
        self.judges = 0


@final
class ExpectedAttention(Evict):
    """Keep what queries to come are expected to attend to, given what those of the prompt were like.

    Paper: Devoto et al. 2025, Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution, arXiv 2510.00636.
    Differs: mean and covariance are those of the queries themselves, taken where attention sees them
    and turned back, not estimated through the query projection; so models that normalise queries
    work as well. A row is weighed by the norm of its value, as in NVIDIA's kvpress. Every head keeps
    as many rows as the others.
    Cost: float32 copies of the prompt's queries and keys, in blocks, and one product with a `[D, D]`
    matrix per row and query head, at the prompt only unless `decoding=hold`, which also holds mean
    and covariance of every query head.
    """

    example: ClassVar[Mapping[str, JsonValue]] = {"ratio": 0.5}

    future: int = Field(512, ge=1)
    """Positions to come over which the rotation is averaged."""
    sink: int = Field(4, ge=0)
    """First tokens, which are always kept and left out of all statistics."""

    def rule(self, rotary: Rotary | None = None) -> Rule:
        """The sinks are safe."""
        return super().rule(rotary)._replace(sink=self.sink)

    def maker(self, system: System, rule: Rule) -> Callable[[int], EvictingLayer]:
        """Layers that know how positions are on queries."""
        factory(system.model.config, lambda index: Layer())
        try:
            positions = Positions.of(system.model)
        except Conflict as error:
            raise Conflict(
                "kv/expected_attention takes positions off queries, and cannot do so for "
                f"{system.model.config.model_type}: they change with the length of the text, or pair "
                "numbers in a way unknown here. Use kv/snapkv."
            ) from error
        return lambda index: ExpectedLayer(rule, positions, sink=self.sink, future=self.future)

    def layer(self, rule: Rule, index: int, layers: int) -> EvictingLayer:
        """For a model without rotary positions."""
        return ExpectedLayer(rule, Positions(None), sink=self.sink, future=self.future)

    def describe(self) -> str:
        """One phrase about what is kept."""
        return f"{super().describe()}, as expected for the next {self.future} positions"
