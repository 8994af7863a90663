"""Drafting heads: what they are, how they are trained, how they are kept.

    feature of the newest logits ──► block k ──► the model's own head ──► token k places further on
                                     x + SiLU(W x + b), W = b = 0 at first

Only the blocks are trained; the model is not touched, so features are computed once and training
goes over them. Positions of the last rows are left out of it: there each head's candidates are
counted, and the counts shape the tree of drafts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from compresskit.errors import Conflict, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compresskit.method import Progress

RANKS = 10
"""Candidates of a head that are counted, and that a tree may use (Medusa's trees use as many)."""
DECAY = 0.8
"""Weight of a head's loss relative to the one before it (Medusa)."""
HELD_OUT = 8
"""One row of so many is counted on, not trained on."""


class Heads(nn.Module):
    """`number` residual blocks over features of `width`."""

    def __init__(self, number: int, width: int) -> None:
        """Start as the identity: each head then says what the model's own says."""
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(number))
        self.accuracy: list[list[float]] = []
        """For each head, how often its candidate of each rank is right, as counted by `count`."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features `[N, E]` to those of each head: `[K, N, E]`."""
        return torch.stack([features + F.silu(block(features)) for block in self.blocks])


class Examples(NamedTuple):
    """Features `[N, E]`, and the tokens 2, 3, ... places after each of them, `[N, K]`."""

    features: torch.Tensor
    tokens: torch.Tensor


def examples(rows: torch.Tensor, states: torch.Tensor, number: int) -> Examples:
    """What `count` heads learn from rows of tokens `[R, L]` with their states `[R, L, E]`.

    The model's own head speaks for the next token; head k (from 1) for the one k places after that.
    """
    length = rows.shape[1] - number - 1
    further = [rows[:, place + 1 : place + 1 + length] for place in range(1, number + 1)]
    return Examples(
        states[:, :length].flatten(0, 1).float(), torch.stack(further, -1).flatten(0, 1)
    )


def logits(heads: Heads, top: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Logits `[K, N, V]` of every head."""
    seen = heads(features)
    held: Any = getattr(top, "weight", features)
    flat: torch.Tensor = top(seen.flatten(0, 1).to(held.dtype))
    return flat.view(*seen.shape[:2], -1)


def train(
    heads: Heads,
    top: nn.Module,
    learn: Examples,
    *,
    steps: int,
    positions: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> None:
    """Take `steps` of AdamW, each over so many `positions` drawn anew; `top` is frozen."""
    number = learn.tokens.shape[1]
    weights = torch.tensor([DECAY**k for k in range(number)], device=learn.features.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(steps):
            drawn = torch.randint(len(learn.features), (positions,), generator=generator)
            drawn = drawn.to(learn.features.device)
            said = logits(heads, top, learn.features[drawn]).float()
            loss = F.cross_entropy(
                said.flatten(0, 1), learn.tokens[drawn].t().flatten(), reduction="none"
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss.view(number, -1).mean(-1) @ weights)
            optimizer.step()
            schedule.step()
            progress("drafting heads", step + 1, steps)
    heads.requires_grad_(False)


@torch.no_grad()
def count(heads: Heads, top: nn.Module, held_out: Examples) -> None:
    """Count, for each head, how often its candidate of each rank is the token that came."""
    hits = torch.zeros(held_out.tokens.shape[1], RANKS, dtype=torch.double)
    pieces = zip(
        torch.split(held_out.features, 256), torch.split(held_out.tokens, 256), strict=True
    )
    for features, tokens in pieces:
        said = logits(heads, top, features)
        best = said.topk(min(RANKS, said.shape[-1]), -1).indices
        found = (best == tokens.t().unsqueeze(-1)).sum(1)
        hits[:, : found.shape[-1]] += found.cpu()
    heads.accuracy = (hits / len(held_out.features)).tolist()


def save(heads: Heads, path: Path, *, model: str) -> None:
    """Write heads for the model with the fingerprint `model` as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"model": model, "accuracy": json.dumps(heads.accuracy)}
    save_file(
        {name: tensor.contiguous() for name, tensor in heads.state_dict().items()},
        path,
        metadata=told,
    )


def load(path: Path, *, model: str, number: int, width: int) -> Heads:
    """Read heads that `save` wrote.

    Raises:
        ModelError: the file holds no such heads.
        Conflict: they are another model's, or of another number.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        shares = json.loads(told["accuracy"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path}: no drafting heads ({error!r}). Name another file, or one that does not exist "
            "yet: heads are then trained and written there."
        ) from None
    _refuse_others(path, told.get("model"), model, len(shares), number)
    heads = Heads(number, width)
    heads.load_state_dict(tensors)
    heads.accuracy = shares
    return heads.requires_grad_(False)


def _refuse_others(path: Path, theirs: str | None, ours: str, held: int, wanted: int) -> None:
    if theirs != ours:
        raise Conflict(
            f"{path}: these heads were trained for another model (its embedding has the SHA-256 "
            f"{str(theirs)[:12]}, this one's {ours[:12]}). Train heads for this model: leave path "
            "out, or name a new file."
        )
    if held != wanted:
        raise Conflict(
            f"{path}: holds {held} heads, draft={wanted} needs {wanted}. Set draft={held}, or name a "
            "new file."
        )


def split(rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on and of those to count on, spread over the text."""
    held = [row for row in rows if row % HELD_OUT == HELD_OUT - 1]
    return [row for row in rows if row not in held], held
