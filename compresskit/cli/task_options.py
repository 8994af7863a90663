"""Options for long-context tasks, which `run` and `evaluate` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="A long-context task: niah_single, niah_multikey, niah_multivalue, variable_tracking, "
        "common_words, or all; repeat. [default: none]",
    ),
]
TaskTokens = Annotated[int, typer.Option(min=32, help="Tokens of a task's prompt.")]
TaskSamples = Annotated[int, typer.Option(min=1, help="Prompts of each task.")]
TaskDepths = Annotated[
    list[float] | None,
    typer.Option(
        "--task-depth",
        min=0,
        max=1,
        help="Where the needle lies, 0 (beginning) to 1 (end); repeat. [default: 0 to 1 by 0.25]",
    ),
]
TaskChat = Annotated[
    bool, typer.Option("--task-chat", help="Ask tasks in the model's chat template.")
]


def document(
    names: list[str] | None, tokens: int, samples: int, depths: list[float] | None, *, chat: bool
) -> dict[str, Any]:
    """The `tasks` entry of a quality spec; none where no task was named."""
    if not names:
        return {}
    tasks: dict[str, Any] = {"tokens": tokens, "samples": samples, "chat": chat}
    if "all" not in names:
        tasks["names"] = names
    if depths:
        tasks["depths"] = depths
    return {"tasks": tasks}
