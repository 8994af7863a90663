"""From logits to the numbers of one token: all in float32, all in nats.

    nll      -log q(t)                         how surprised the model is by the true token t
    KL       sum_v p_v (log p_v - log q_v)     how far its prediction q is from the baseline's p
    agree    argmax q == argmax p              whether both would say the same next token

KL is zero exactly if the logits are equal (up to a shift); rounding can make it negative by less
than 1e-6, and such values are kept: clamping them would bias a mean that is itself about 1e-6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOM = 16 << 20
"""Bytes of one float32 copy; a handful are alive at a time."""


class Pair(NamedTuple):
    """Scores of the artefact beside its baseline; each a tensor like the targets."""

    nll: torch.Tensor
    baseline_nll: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


def nll(logits: torch.Tensor, targets: torch.Tensor, *, who: str = "artefact") -> torch.Tensor:
    """Negative log likelihood, float32 like `targets` (int64 `[B, n]`), of logits `[B, n, V]`.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    parts = [
        _pick(_log_softmax(piece, who), targets.flatten()[at : at + piece.shape[0]])
        for at, piece in _pieces(logits)
    ]
    return torch.cat(parts).view(targets.shape)


def pair(logits: torch.Tensor, baseline: torch.Tensor, targets: torch.Tensor) -> Pair:
    """Score logits `[B, n, V]` beside the baseline's for `targets` (int64 `[B, n]`).

    Raises:
        RunError: a logit is NaN or infinite, or the two vocabularies differ.
    """
    if logits.shape != baseline.shape:
        raise RunError(
            f"the artefact's logits are {tuple(logits.shape)}, the baseline's "
            f"{tuple(baseline.shape)}: predictions over different vocabularies or lengths "
            "cannot be compared."
        )
    truth = targets.flatten()
    reference = baseline.flatten(0, 1)
    parts = []
    for at, piece in _pieces(logits):
        q = _log_softmax(piece, "artefact")
        p = _log_softmax(reference[at : at + piece.shape[0]], "baseline")
        target = truth[at : at + piece.shape[0]]
        parts.append(Pair(_pick(q, target), _pick(p, target), kl(p, q), agree(p, q)))
    return Pair(*(torch.cat(column).view(targets.shape) for column in zip(*parts, strict=True)))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log probabilities `[..., V]`.

    >>> p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.6, 0.3, 0.1]).log()
    >>> round(float(kl(p, q)), 5)
    0.02681
    """
    return (p.exp() * (p - q)).sum(-1)


def agree(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Tell, per position of `[..., V]`, whether the most likely token is the same."""
    return p.argmax(-1) == q.argmax(-1)


def _pieces(logits: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows `[m, V]` of `[B, n, V]`, few at a time, with the index of the first."""
    flat = logits.flatten(0, 1)
    size = max(1, _ROOM // (4 * flat.shape[-1]))
    for at in range(0, flat.shape[0], size):
        yield at, flat[at : at + size]


def _log_softmax(logits: torch.Tensor, who: str) -> torch.Tensor:
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        kind = "NaN" if bool(torch.isnan(logits).any()) else "infinite"
        raise RunError(
            f"the {who} gave {kind} logits, so its quality cannot be scored. Try a wider dtype; if "
            "that does not help, the method breaks this model."
        )
    return logits.log_softmax(-1)


def _pick(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
