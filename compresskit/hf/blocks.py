"""Find a decoder's blocks and run them one at a time on calibration tokens.

    model.forward, blocks stubbed  -->  each block's own arguments (masks, positions), as captured
    embedded tokens --block 0--> hidden --block 1--> hidden ... --last block--> norm --> head

Masks and positions are never rebuilt here: the model's own forward hands every block what it wants
(Gemma gives sliding and full layers different masks), while the blocks themselves stand aside. A
short pass through the whole model comes first. It shows in which order blocks are called, what they
return, and that each one's input is the output of the one before; a model that does more than that
between its blocks is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from compresskit.errors import Conflict
from compresskit.hf import modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PROBE = 16
"""Tokens of the short pass."""


class Block(NamedTuple):
    """One block of a decoder."""

    name: str
    """Dotted path from the model."""
    module: nn.Module


class Call(NamedTuple):
    """What a block is called with."""

    hidden: torch.Tensor
    """`[B, T, E]`."""
    args: tuple[Any, ...]
    """Positional arguments behind the hidden states."""
    kwargs: dict[str, Any]
    by_name: bool
    """The hidden states are passed by name."""

    def on(self, block: Callable[..., Any]) -> torch.Tensor:
        """Call `block`; return its hidden states."""
        if self.by_name:
            return _hidden(block(*self.args, hidden_states=self.hidden, **self.kwargs))
        return _hidden(block(self.hidden, *self.args, **self.kwargs))


class _Enough(Exception):
    """The forward pass has delivered what it was started for."""


def find(model: nn.Module) -> list[Block]:
    """The blocks of `model` in order: of all lists of modules the one with most parameters.

    Raises:
        Conflict: there is no list of modules.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise Conflict("The model keeps no list of blocks, so it cannot be calibrated block-wise.")
    # `max` keeps the first of equals, which is the outermost.
    path, found = max(lists, key=lambda item: modules.parameter_count(item[1]))
    return [Block(f"{path}.{index}", block) for index, block in enumerate(found)]


class Stream:
    """Batches of calibration tokens on their way through the blocks of a model."""

    def __init__(self, model: Any, batches: Sequence[torch.Tensor]) -> None:
        """Take each batch (int64 `[B, T]`) up to the first block.

        Raises:
            Conflict: the blocks do not simply follow one another.
        """
        self.model = model
        self.blocks = find(model)
        self.tokens = list(batches)
        self.samples = self._probe(self.tokens[0][:1, :PROBE])
        """One short call a block, with the hidden states that the dense model gives it."""
        captured = [self._captured(batch) for batch in self.tokens]
        self.hidden = [calls[0].hidden for calls in captured]
        """For each batch the input of the block that is next."""
        nothing = torch.empty(0)
        self.calls = [[call._replace(hidden=nothing) for call in calls] for calls in captured]
        """For each batch the arguments of every block; the hidden states are in `hidden`."""

    def run(self, index: int, batch: int) -> torch.Tensor:
        """Output of block `index` for one batch, as the block stands now."""
        call = self.calls[batch][index]._replace(hidden=self.hidden[batch])
        with torch.no_grad():
            return call.on(self.blocks[index].module)

    def advance(self, index: int) -> None:
        """Send all batches through block `index`."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, batch)

    def inputs_of_head(self, head: nn.Module) -> Iterator[torch.Tensor]:
        """What `head` is given for each batch, once all blocks are passed."""
        for tokens, hidden in zip(self.tokens, self.hidden, strict=True):
            seen: list[torch.Tensor] = []

            def caught(_: nn.Module, args: tuple[Any, ...], seen: Any = seen) -> None:
                seen.append(args[0])
                raise _Enough

            handle = head.register_forward_pre_hook(caught)
            # Only what the last block returns matters; its stub hands out the hidden states.
            stubs = [self._stub(index, hidden=hidden) for index in range(len(self.blocks))]
            try:
                with _standing_in(self.blocks, stubs):
                    self._forward(tokens)
            finally:
                handle.remove()
            yield from seen

    def _probe(self, tokens: torch.Tensor) -> list[Call]:
        calls: list[Call] = []
        order: list[int] = []
        outputs: list[Any] = []
        handles = []
        for index, block in enumerate(self.blocks):

            def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                order.append(index)
                calls.append(_call(args, kwargs))

            def after(_: nn.Module, args: Any, output: Any) -> None:
                outputs.append(output)

            handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.module.register_forward_hook(after))
        try:
            self._forward(tokens)
        finally:
            for handle in handles:
                handle.remove()
        follows = (
            call.hidden is (out := _hidden(output)) or torch.equal(call.hidden, out)
            for call, output in zip(calls[1:], outputs, strict=False)
        )
        if order != list(range(len(self.blocks))) or not all(follows):
            raise Conflict(
                f"{type(self.model).__name__} does more between its blocks than pass hidden states "
                "on, so it cannot be calibrated block by block. Use quant/hqq or quant/intn."
            )
        self._forms = [output if isinstance(output, tuple) else None for output in outputs]
        return calls

    def _captured(self, tokens: torch.Tensor) -> list[Call]:
        calls: list[Call] = []
        with _standing_in(self.blocks, [self._stub(i, calls) for i in range(len(self.blocks))]):
            self._forward(tokens)
        return calls

    def _stub(
        self, index: int, calls: list[Call] | None = None, hidden: torch.Tensor | None = None
    ) -> Callable[..., Any]:
        """A forward that notes its call and returns its input, or `hidden`, in the block's form."""
        form = self._forms[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = _call(args, kwargs)
            if calls is not None:
                calls.append(call)
                if len(calls) == len(self.blocks):
                    raise _Enough
            out = call.hidden if hidden is None else hidden
            return out if form is None else (out, *form[1:])

        return forward

    def _forward(self, tokens: torch.Tensor) -> None:
        with torch.no_grad():
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _Enough:
                return


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if args:
        return Call(args[0], args[1:], dict(kwargs), by_name=False)
    rest = dict(kwargs)
    return Call(rest.pop("hidden_states"), (), rest, by_name=True)


def _hidden(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _standing_in(blocks: Sequence[Block], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let `forwards` take the place of the blocks' own, which an attribute of the instance hides."""
    before = [block.module.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.module.__dict__["forward"] = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.module.__dict__.pop("forward", None)
            if own is not None:
                block.module.__dict__["forward"] = own
