"""Round weights in the forward pass, so that a student expects its quantisation.

    weight (float, what the optimizer moves, what is saved)
      │ the method's own scheme: codes, scales, and back
      ▼
    rounded weight ──► the layer's product         backward: the gradient goes past the rounding,
                                                   to the weight, as if it had not been there

For the last part of a training: `begin`, some steps, `end`. A layer's `weight` then reads rounded,
whoever reads it (the layer, a loss that takes the head's products piece by piece), while parameters,
their names and the state dict stay what they are: optimizers and checkpoints notice nothing. What is
read is bit for bit what the method will pack, for it comes from the method's scheme; what the
method leaves dense stays dense, and a tied embedding is rounded only where the method packs it.

Rounding is of weights alone: a method that rounds activations too (`quant/int8_dynamic`) does so in
the artefact, not here. One more copy of the weights is held, made anew when they have changed.

Papers: Bengio et al. 2013, arXiv 1308.3432 (the straight-through estimator); Jacob et al. 2018, arXiv
1712.05877 (training with the rounding of inference); Liu et al. 2023, LLM-QAT, arXiv 2305.17888
(language models, taught by their own full-precision form).
Differs: the scales follow from the weights at every step, as the method takes them; none is learned.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from compresskit import catalogue
from compresskit.errors import SpecError
from compresskit.hf import modules
from compresskit.methods.quant._linear import find_embedding, select
from compresskit.methods.quant._rowwise import AbstractRowwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.hf.modules import Site
    from compresskit.methods.quant._linear import Scheme

STATE = "_rounded_reads"
"""Attribute of a module whose weights read rounded."""


def check(method: str) -> AbstractRowwise:
    """The quantiser that `method` names, as typed on the command line.

    Raises:
        SpecError: it cannot be had layer by layer from the weights alone, or is no quantiser.
    """
    spec = catalogue.parse_method(method)
    found = catalogue.decode(spec.name, spec.params)
    if not isinstance(found, AbstractRowwise):
        raise SpecError(
            f"finish: {spec.name} cannot be imitated while weights change: only methods that round "
            f"each weight by itself can ({', '.join(supported())}). Finish with one of those on the "
            "same grid, then apply the method that you want."
        )
    return found


def supported() -> list[str]:
    """Names of the methods that `check` lets pass."""
    names = [name for name in catalogue.method_names() if name.startswith("quant/")]
    return [name for name in names if issubclass(catalogue.get(name), AbstractRowwise)]


def begin(model: Any, method: str, *, saved_as: torch.dtype | None = None) -> None:
    """Let every layer of `model` that `method` would pack compute with rounded weights.

    `saved_as` is the type that the student will be saved in, where it is not its own: weights are
    cast to it before they are rounded, as they will be when the saved student is packed.

    Raises:
        SpecError: the method cannot be imitated, or does not suit the model. All reads as it is then.
        Conflict: the model has no layer to round.
    """
    quantiser = check(method)
    end(model)
    for weight in list(_weights(model, quantiser, saved_as)):
        for module, attribute in weight.holders:
            _read_rounded(module, attribute, weight.rounded)


def end(model: nn.Module) -> None:
    """Let every weight read as it is; does nothing where nothing reads rounded."""
    for module in model.modules():
        if STATE in vars(module):
            del vars(module)[STATE]
            module.__class__ = type(module).__bases__[0]


def rounds(model: nn.Module) -> bool:
    """Whether any weight of `model` reads rounded."""
    return any(STATE in vars(module) for module in model.modules())


class Rounded:
    """What a weight reads as while it is rounded; kept until the weight changes.

    In-place changes count up a tensor's version, all but those of fused optimizers. So once a gradient
    has come back, and a step may have been, the bits of the weight are added up at every reading: that
    takes a fraction of the time of rounding it anew, which is done only where the sum has changed.
    """

    def __init__(self, rounds: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`rounds` turns a weight into the rounded one, of the same shape."""
        self.rounds = rounds
        self.value: torch.Tensor | None = None
        self.came_back = False
        """A gradient has passed since the weight was last rounded."""
        self._seen: tuple[int, int] | None = None
        self._bits = torch.empty(0)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` rounded, in its type and on its device; gradients go to `weight`."""
        if self.value is None or self._changed(weight):
            # Made outside of inference mode: an evaluation may be the first to ask, and a step after
            # it has to remember what it read.
            with torch.inference_mode(mode=False), torch.no_grad():
                self.value = self.rounds(weight.detach()).to(weight.dtype)
            self._seen, self._bits = _place(weight), _bits(weight)
            self.came_back = False
        passed: torch.Tensor = _Straight.apply(weight, self)  # type: ignore[no-untyped-call]
        return passed

    def _changed(self, weight: torch.Tensor) -> bool:
        if _place(weight) != self._seen:
            return True
        return self.came_back and not torch.equal(_bits(weight), self._bits)


def _place(weight: torch.Tensor) -> tuple[int, int]:
    """Changes with every counted change in place, and with another tensor in this one's place."""
    return weight._version, weight.data_ptr()


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """Sum of the bits of each row as whole numbers, int32; overflow wraps around and does no harm."""
    whole = torch.int16 if weight.element_size() == 2 else torch.int32
    return weight.detach().view(whole).sum(dim=-1, dtype=torch.int32)


class _Straight(torch.autograd.Function):
    """Forward the rounded weight, backward the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: Rounded) -> torch.Tensor:
        ctx.rounded = rounded
        assert rounded.value is not None
        return rounded.value.view_as(rounded.value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.rounded.came_back = True
        return grads[0], None


def _read_rounded(module: nn.Module, attribute: str, rounded: Rounded) -> None:
    """Make `module.attribute` read rounded; the parameter stays where torch keeps it.

    A property of the class goes before torch's look-up of parameters, so the module becomes one of
    a subclass of its own class that differs in this alone.
    """
    state: dict[str, Rounded] = vars(module).setdefault(STATE, {})
    if not state:
        kind = type(module)
        module.__class__ = type(f"Rounded{kind.__name__}", (kind,), {})
    state[attribute] = rounded

    def read(self: nn.Module) -> torch.Tensor:
        weight = self._parameters[attribute]
        assert weight is not None
        found: Rounded = vars(self)[STATE][attribute]
        return found.of(weight)

    setattr(type(module), attribute, property(read))


class _Weight(NamedTuple):
    """A parameter that is rounded, and where it is read so."""

    holders: tuple[tuple[nn.Module, str], ...]
    rounded: Rounded


def _weights(
    model: Any, method: AbstractRowwise, saved_as: torch.dtype | None
) -> Iterator[_Weight]:
    """What `quantise_linears` would pack, in its order and by its rules."""
    rounding = method.rounding(model)
    embedding = find_embedding(model, with_head=method.head) if method.embeddings else None
    top = modules.head(model)
    tied = modules.is_tied(model)
    for site in select(model, with_head=method.head, skip=rounding.skip):
        holders = [(site.module, "weight")]
        if embedding is not None and tied and site.module is top:
            holders.append((embedding.module, "weight"))
            embedding = None
        turned = not isinstance(site.module, nn.Linear)  # Conv1D
        rounds = _layer(rounding.scheme_of(site), turned=turned, saved_as=saved_as)
        yield _Weight(tuple(holders), Rounded(rounds))
    for site in modules.experts(model):
        if not any(fnmatchcase(site.name, pattern) for pattern in rounding.skip):
            yield from _experts(site, rounding.scheme_of, saved_as)
    if embedding is not None:
        alone = _layer(rounding.scheme_of(embedding), turned=False, saved_as=saved_as)
        yield _Weight(((embedding.module, "weight"),), Rounded(alone))


def _experts(
    site: Site, scheme_of: Callable[[Site], Scheme[Any]], saved_as: torch.dtype | None
) -> Iterator[_Weight]:
    """The two parameters of fused experts; each expert is a weight of its own."""
    module: Any = site.module
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        scheme = scheme_of(site._replace(name=f"{site.name}.{name}"))
        each = _layer(scheme, turned=bool(module.is_transposed), saved_as=saved_as)

        def stacked(
            weight: torch.Tensor, each: Callable[[torch.Tensor], torch.Tensor] = each
        ) -> torch.Tensor:
            return torch.stack([each(expert) for expert in weight])

        yield _Weight(((module, name),), Rounded(stacked))


def _layer(
    scheme: Scheme[Any], *, turned: bool, saved_as: torch.dtype | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounding of one weight by `scheme`; `turned`: its inputs run along the first dimension."""

    def rounds(weight: torch.Tensor) -> torch.Tensor:
        rows = weight.t() if turned else weight
        stored = scheme.store(rows if saved_as is None else rows.to(saved_as))
        values: torch.Tensor = stored.dequantise()
        return values.t() if turned else values

    return rounds
