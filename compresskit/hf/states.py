"""Hidden states behind single blocks, seen while a model runs.

transformers can return all hidden states, but its last one has passed the final norm and so is not
what the last block gave; a hook on the block shows the same thing for every block.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from compresskit.errors import Conflict
from compresskit.hf import blocks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch


@contextmanager
def behind(model: Any, wanted: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While this is open, each forward pass of `model` fills the mapping handed out.

    It goes from block number to `[B, L, E]`, with the gradient that the pass has.

    Raises:
        Conflict: there is no such block.
    """
    seen: dict[int, torch.Tensor] = {}
    if not wanted:
        yield seen
        return
    found = blocks.find(model)
    for index in wanted:
        if not 0 <= index < len(found):
            raise Conflict(
                f"the model has blocks 0 to {len(found) - 1}: there is nothing behind a block {index}."
            )
    with ExitStack() as hooks:
        for index in wanted:

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                seen[index] = output[0] if isinstance(output, tuple) else output

            handle = found[index].module.register_forward_hook(keep)
            hooks.callback(handle.remove)
        yield seen
