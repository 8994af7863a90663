"""Blocks run one at a time compute what the model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compresskit.errors import Conflict
from compresskit.hf import blocks, modules, tiny

TOKENS = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))


class Toy(nn.Module):
    """A model of three blocks; subclasses change what happens around them."""

    returns_tuple = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(500, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.top = nn.Linear(8, 500)

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.between(layer, x)
        return self.top(x)

    def between(self, layer, x):
        return layer(x)


class Scaled(Toy):
    def between(self, layer, x):
        return layer(2 * x)


class Twice(Toy):
    def between(self, layer, x):
        return layer(layer(x))


class Named(nn.Module):
    """A block that takes its hidden states by name and returns them in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, *, shift, hidden_states):
        return self.inner(hidden_states) + shift, "extra"


class ByName(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Named() for _ in range(3)])

    def between(self, layer, x):
        out, extra = layer(hidden_states=x, shift=0.5)
        assert extra == "extra"
        return out


def through(model, head):
    stream = blocks.Stream(model, [TOKENS[:2], TOKENS[2:]])
    for index in range(len(stream.blocks)):
        stream.advance(index)
    return stream, torch.cat(list(stream.inputs_of_head(head)))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_goes_through_block_by_block(architecture):
    model = tiny.random_model(architecture)
    head = modules.head(model)
    _, inputs = through(model, head)
    torch.testing.assert_close(head(inputs), model(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("kind", [Toy, ByName])
@torch.no_grad()
def test_blocks_may_return_a_tensor_or_a_tuple_and_take_it_by_name(kind):
    model = kind()
    _, inputs = through(model, model.top)
    torch.testing.assert_close(model.top(inputs), model(TOKENS, use_cache=False))


@torch.no_grad()
def test_a_changed_block_changes_what_comes_after_it():
    """Negative control for the above: blocks are run as they are now, not as captured."""
    model = Toy()
    stream, _ = through(model, model.top)
    before = stream.hidden[0].clone()
    model.layers[1].weight.data *= 2
    _, inputs = through(model, model.top)
    assert not torch.allclose(inputs[:2], before)
    torch.testing.assert_close(model.top(inputs), model(TOKENS, use_cache=False))


def test_sliding_and_full_layers_get_their_own_masks():
    stream = blocks.Stream(tiny.random_model("gemma3"), [TOKENS])
    sliding, full = (call.kwargs["attention_mask"] for call in stream.calls[0])
    assert sliding is not None
    # The window is 16: token 39 does not see token 0 in the one, but does in the other.
    assert not bool(sliding[0, 0, 39, 0])
    assert full is None or bool(full[0, 0, 39, 0])


@pytest.mark.parametrize("kind", [Scaled, Twice])
def test_what_does_more_between_its_blocks_is_refused(kind):
    with pytest.raises(Conflict, match=f"{kind.__name__} does more between its blocks"):
        blocks.Stream(kind(), [TOKENS])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(Conflict, match="no list of blocks"):
        blocks.find(nn.Linear(2, 2))


def test_the_outermost_list_is_that_of_the_blocks():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    model = nn.Module()
    model.layers = nn.ModuleList([Routed()])
    assert [block.name for block in blocks.find(model)] == ["layers.0"]


def test_nothing_is_left_on_the_model():
    model = Toy()
    through(model, model.top)
    with (
        pytest.raises(RuntimeError, match="stop"),
        blocks._standing_in(blocks.find(model), [lambda x: x] * 3),
    ):
        raise RuntimeError("stop")
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
