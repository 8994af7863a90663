"""Two records side by side, with what several checks ask about them computed once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from compresskit.compare import agree, bridge
from compresskit.validity import series

if TYPE_CHECKING:
    from compresskit.compare.agree import Key
    from compresskit.record import Record, Sample

Place = tuple[str, int]
"""A repetition: the name of its pass and its number."""


class Two:
    """The base record and the new one."""

    def __init__(self, base: Record, new: Record) -> None:
        """Remember both; nothing is computed yet."""
        self.base, self.new = base, new
        self._lacking: dict[tuple[Key, ...], str] = {}

    def lacking(self, needs: tuple[Key, ...]) -> str:
        """Say why a check with these needs cannot be made; empty if it can."""
        if needs not in self._lacking:
            self._lacking[needs] = agree.lacking(needs, self.base, self.new)
        return self._lacking[needs]

    @cached_property
    def samples(self) -> tuple[dict[Place, Sample], dict[Place, Sample]]:
        """Repetitions of both sides by place: equal places ran the same prompts."""
        return _samples(self.base), _samples(self.new)

    @cached_property
    def common(self) -> list[Place]:
        """Places that both sides have."""
        base, new = self.samples
        return [place for place in base if place in new]

    @cached_property
    def paired(self) -> bool:
        """Both took turns in one session."""
        sessions = {block.pair for block in self.base.blocks if block.pair is not None}
        return any(block.pair in sessions for block in self.new.blocks)

    @cached_property
    def bridge(self) -> bridge.Bridge | str:
        """Both records made comparable across sessions, or why they are not."""
        return bridge.build(self.base, self.new)


def _samples(record: Record) -> dict[Place, Sample]:
    """A repeat of the run starts with the same prompts again: only its first block counts."""
    first = record.model_copy(update={"blocks": record.blocks[:1]})
    return {
        (one.name, index): sample
        for one in series(first)
        for index, sample in enumerate(one.samples)
    }
