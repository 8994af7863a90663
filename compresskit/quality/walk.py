"""Feed rows of tokens through a system and see the logits of every scored position.

    prefill ──► step ──► step ──► ...          one fresh cache and one `attached()` per walk
                 │        │
               see()    see()                  logits never outlive the call

Logits are the bulk of the memory: 512 positions of a vocabulary of 262,144 are 537 MB in float32.
So a forward pass delivers at most `LARGEST_FORWARD` bytes of them, and `hold`, which keeps the
baseline's logits while the artefact is walked, never keeps more than `LARGEST_HELD`. Baseline and
artefact take turns instead of going side by side, because they may share one model object whose
attention `attach` switches over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compresskit.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from compresskit.quality.protocol import Cut
    from compresskit.system import System

LARGEST_FORWARD = 128 << 20
"""Bytes of logits of one forward pass, counted as float32."""
LARGEST_HELD = 512 << 20
"""Bytes of baseline logits that are kept at a time."""


class Logits(NamedTuple):
    """What a head gives: its width and its type."""

    vocabulary: int
    dtype: torch.dtype

    def positions(self, room: int, rows: int, *, size: int = 4) -> int:
        """Positions per row whose logits fit into `room` bytes, at least one."""
        return max(1, room // (self.vocabulary * size * rows))


class Span(NamedTuple):
    """Input positions `start:stop`."""

    start: int
    stop: int


@torch.inference_mode()
def probe(system: System, row: Sequence[int]) -> Logits:
    """Find the shape of the logits with a short forward pass: no engine has to declare it.

    Two tokens where there are two: a single one is a decode step, which a compiled engine would
    compile for.
    """
    with system.attached():
        tokens = torch.tensor([row[:2]], device=system.device.torch)
        logits = system.step(tokens, system.new_cache(len(row)))
    return Logits(logits.shape[-1], logits.dtype)


@torch.inference_mode()
def walk(
    system: System,
    tokens: torch.Tensor,
    cuts: Sequence[Cut],
    see: Callable[[int, torch.Tensor], None],
) -> None:
    """Run `tokens` (int64 `[B, S]`) through a fresh cache.

    `see(position, logits)` gets the logits `[B, n, V]` of each scored cut and the input position
    of the first of them. A prefill goes through the system's prompt stage, as it does in decoding.
    """
    with system.attached():
        cache = system.new_cache(tokens.shape[1])
        for start, stop, scored in cuts:
            piece = tokens[:, start:stop]
            if scored:
                see(start, system.step(piece, cache, keep=0))
            else:
                system.step(system.prompt(piece), cache)


def hold(
    system: System, tokens: torch.Tensor, cuts: Sequence[Cut], span: Span, shape: Logits
) -> torch.Tensor:
    """Walk and keep the logits of `span`: `[B, span, V]` in the type the head gave."""
    held = torch.empty(
        tokens.shape[0],
        span.stop - span.start,
        shape.vocabulary,
        dtype=shape.dtype,
        device=tokens.device,
    )
    seen = 0

    def see(position: int, logits: torch.Tensor) -> None:
        nonlocal seen
        for at, row in clip(position, logits, span):
            held[:, at - span.start : at - span.start + row.shape[1]] = row
            seen += row.shape[1]

    walk(system, tokens, cuts, see)
    if seen != span.stop - span.start:
        raise RunError(f"scored {seen} positions of {span}: the cuts do not cover it once.")
    return held


def clip(position: int, logits: torch.Tensor, span: Span) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the part of `logits`, which start at `position`, that lies in `span`, if any."""
    low, high = max(position, span.start), min(position + logits.shape[1], span.stop)
    if low < high:
        yield low, logits[:, low - position : high - position]


def spans(start: int, stop: int, size: int) -> Iterator[Span]:
    """Split `start:stop` into spans of at most `size` positions."""
    for low in range(start, stop, size):
        yield Span(low, min(low + size, stop))
