"""A step that computes only what no earlier prompt has computed.

    first pass over an empty cache          prompt = stored prefix + rest
        lookup the prefix
        copy its rows into the cache
        run the model on the rest           at least as many tokens as logits are wanted
        store the rows of the rest
    every later pass                        as it was

Copies both ways: neither eviction from the store nor tokens taken back from the cache can hurt the
other. Only prompts are stored, not answers.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from compresskit.hf.rows import Layout
    from compresskit.methods.reuse._rows import RowMemory
    from compresskit.methods.reuse._store import Store
    from compresskit.system import Step


class PrefixStep:
    """`System.step` with a store of prefixes in front."""

    def __init__(
        self,
        inner: Step,
        *,
        layout: Layout,
        store: Store,
        memory: RowMemory,
        salt: str = "",
        shortest: int = 1,
    ) -> None:
        """Put `store` in front of `inner`.

        Args:
            inner: the step that computes.
            layout: of the caches that `inner` fills.
            store: what is known, and where.
            memory: the rows themselves.
            salt: prompts share prefixes only under equal salts.
            shortest: fewest tokens worth taking from the store.

        Raises:
            Conflict: the store holds rows of another model or cache method.
        """
        if store.identity != layout.identity:
            raise Conflict(
                "this prefix store holds rows of another model, type or cache method "
                f"({store.identity[:12]}, not {layout.identity[:12]}): make a store for this one."
            )
        self.inner, self.layout, self.store, self.memory = inner, layout, store, memory
        self.salt, self.shortest = salt, shortest

    @contextmanager
    def salted(self, salt: str) -> Iterator[None]:
        """Use another salt for the requests inside."""
        before, self.salt = self.salt, salt
        try:
            yield
        finally:
            self.salt = before

    def __call__(
        self,
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Step, from the end of the longest stored prefix if this is the first pass."""
        if cache.get_seq_length() > 0:
            return self.inner(
                tokens, cache, mask=mask, positions=positions, keep=keep, features=features
            )
        self.layout.check(cache)
        statistics = self.store.statistics
        if not _plain(tokens, mask, positions):
            statistics.bypassed += 1
            return self.inner(
                tokens, cache, mask=mask, positions=positions, keep=keep, features=features
            )
        ids: list[int] = tokens[0].tolist()
        match = self.store.lookup(ids, self.salt)
        try:
            # Logits are not stored, so the tokens they are wanted of are computed.
            used = min(match.length, len(ids) - keep) if keep else 0
            used = used if used >= self.shortest else 0
            if used:
                self.layout.restore(cache, self.memory.read(match.slots, used))
            logits = self.inner(tokens[:, used:], cache, mask=mask, keep=keep, features=features)
            statistics.lookups += 1
            statistics.prompt_tokens += len(ids)
            statistics.hits += used > 0
            statistics.hit_tokens += used

            def write(slots: Sequence[int]) -> None:
                self.memory.write(slots, cache, match.length)

            self.store.extend(match, write)
        finally:
            self.store.release(match)
        return logits


def _plain(tokens: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> bool:
    """One sequence without padding, whose positions count from 0."""
    return tokens.shape[0] == 1 and positions is None and (mask is None or bool(mask.bool().all()))
