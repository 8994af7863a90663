"""Exact probabilities of the first tokens, in a tree of the model's own.

    prompt ─┬─ a ─┬─ aa ─┬─ aaa, aab, ... other       the `branches` most likely tokens at each place
            │     ├─ ab ...                            and one cell for all the others
            │     └─ other
            ├─ b ...
            └─ other

m³ + m² + m + 1 cells at most for three tokens, whatever the vocabulary; all texts of a level are one forward pass of
the plain model, and `compresskit.sampling.probabilities` filters, as in every loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.sampling import probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compresskit.spec import SamplingSpec
    from compresskit.system import System

LEAVES = 81
"""Texts told apart at most: 4 branches for three tokens, 3 for four, 2 for five and six."""
OTHER = -1
_ROWS = 64
"""Texts of one forward pass."""

Key = tuple[int, ...]


class Cells(NamedTuple):
    """The law of the first `depth` tokens after `prompt`: cell -> probability.

    A cell is `depth` tokens, or fewer of which the last is `OTHER`.
    """

    prompt: tuple[int, ...]
    law: Mapping[Key, float]
    children: Mapping[Key, frozenset[int]]
    """Beginning of a text -> its tokens with branches of their own."""
    depth: int = 3

    def cell(self, answer: Sequence[int]) -> Key:
        """Where the first `depth` tokens of `answer` belong."""
        key: Key = ()
        for token in answer[: self.depth]:
            if token not in self.children[key]:
                return (*key, OTHER)
            key = (*key, token)
        return key


def branches(depth: int) -> int:
    """Tokens told apart at each of `depth` places.

    >>> [branches(depth) for depth in (3, 4, 5, 6)]
    [4, 3, 2, 2]
    """
    return max(2, int(LEAVES ** (1 / depth) + 1e-9))


@torch.inference_mode()
def exact(plain: System, prompt: Sequence[int], sampling: SamplingSpec, depth: int = 3) -> Cells:
    """Enumerate the tree by forward passes of `plain`; sampling needs a temperature above 0."""
    law: dict[Key, float] = {}
    children: dict[Key, frozenset[int]] = {}
    level: dict[Key, float] = {(): 1.0}
    with plain.attached():
        for _ in range(depth):
            rows = _next(plain, prompt, list(level), sampling)
            grown: dict[Key, float] = {}
            for (key, before), row in zip(level.items(), rows, strict=True):
                top, tokens = row.topk(min(branches(depth), len(row)))
                kept = [
                    (token, chance)
                    for token, chance in zip(tokens.tolist(), top.tolist(), strict=True)
                    if chance > 0
                ]
                children[key] = frozenset(token for token, _ in kept)
                for token, chance in kept:
                    grown[*key, token] = before * chance
                # Summed from the rest itself: what the filters left out is exactly 0.
                rest = row.index_fill(0, tokens, 0.0).sum()
                law[*key, OTHER] = before * float(rest)
            level = grown
    return Cells(tuple(prompt), {**law, **level}, children, depth)


def _next(
    plain: System, prompt: Sequence[int], keys: Sequence[Key], sampling: SamplingSpec
) -> torch.Tensor:
    """Double `[len(keys), V]`: the distribution after each text, normalised to the last bit."""
    found = []
    for start in range(0, len(keys), _ROWS):
        texts = torch.tensor(
            [[*prompt, *key] for key in keys[start : start + _ROWS]], device=plain.device.torch
        )
        logits = plain.step(texts, plain.new_cache(texts.shape[1]))[:, -1]
        found.append(probabilities(logits, sampling).double().cpu())
    rows = torch.cat(found)
    return rows / rows.sum(-1, keepdim=True)
