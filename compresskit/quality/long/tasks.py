"""The tasks in both languages. To add one, write its two drafts and a line here and in `TaskName`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from compresskit.quality.long import niah, tracking, words
from compresskit.quality.long.dice import Dice
from compresskit.quality.long.draft import Draft

if TYPE_CHECKING:
    from compresskit.spec import TaskName

Style = Literal["plain", "tiny"]
Writer = Callable[[Dice, int, float], Draft]
"""(choices, number of needles, depth of the first) -> draft."""

TASKS: Mapping[TaskName, Mapping[Style, Writer]] = MappingProxyType(
    {
        "niah_single": {"plain": niah.single, "tiny": niah.tiny_single},
        "niah_multikey": {"plain": niah.multikey, "tiny": niah.tiny_multikey},
        "niah_multivalue": {"plain": niah.multivalue, "tiny": niah.tiny_multivalue},
        "variable_tracking": {
            "plain": tracking.variable_tracking,
            "tiny": tracking.tiny_variable_tracking,
        },
        "common_words": {"plain": words.common_words, "tiny": words.tiny_common_words},
    }
)


def drafts(
    task: TaskName,
    style: Style,
    *,
    samples: int,
    depths: tuple[float, ...],
    needles: int,
    seed: int,
) -> list[Draft]:
    """Write `samples` drafts; they take turns with the depths."""
    write = TASKS[task][style]
    return [
        write(Dice(task, style, seed, index), needles, depths[index % len(depths)])
        for index in range(samples)
    ]
