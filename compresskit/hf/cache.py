"""Key/value caches: build them, take tokens back, count the bytes they hold.

A transformers `Cache` is a list of layers. A cache method swaps the full-attention layers for its
own and leaves the rest (sliding windows, recurrent states, shared layers) as the model made them:

    config ──► DynamicCache(config) ──► [full, sliding, full] ──► [ours, sliding, ours]

To write a cache method, subclass `Layer`, list in `tensors` what it holds, say in `holds` what that
is called in the accounts, and implement `update`. Resetting, beam reordering, batching and cropping
then cover all of it. A layer that wants to see queries, or to answer attention itself, returns
`hand(self, keys), values` from `update` and implements `attend` (see `hf.attention`).

transformers is followed from 5.17 to 5.23 by letting `DynamicCache` read the config: how it
describes layer types changed in between, which class a full-attention layer has did not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from compresskit.errors import Conflict, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedConfig

    from compresskit.hf.attention import Call
    from compresskit.system import NewCache

TOKENS = -2
"""Dimension that counts tokens in every tensor of a layer: `[B, K, S, *]`."""
KEYS_VALUES: Mapping[str, str] = MappingProxyType({"keys": "keys_values", "values": "keys_values"})
"""What the tensors of transformers' own layers are; what has another name there is `other`."""


class Layer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache layer that holds the tensors named in `tensors`, each `[B, K, S, *]`."""

    tensors: ClassVar[tuple[str, ...]] = ("keys", "values")
    holds: ClassVar[Mapping[str, str]] = KEYS_VALUES
    """Attribute -> what its bytes are (codes, scales, residual, index); the rest is `other`."""

    # None until the first `update`, as in transformers.
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        """Hold nothing yet; shapes and types come with the first `update`."""
        super().__init__()
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        for name in self.tensors:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Remember the type and device of the model's keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def append(self, **new: torch.Tensor) -> None:
        """Add rows to the tensors of those names, in copies that share no storage with `new`."""
        for name, rows in new.items():
            held = getattr(self, name)
            setattr(self, name, torch.cat((rows,) if held is None else (held, rows), dim=TOKENS))

    def attend(self, call: Call) -> torch.Tensor:
        """Answer the attention over what `update` handed out: `[B, T, H, D]`.

        Called only for keys marked by `hand`, right after `update`.
        """
        return call.dense()

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held by `change` of it."""
        for name in self.tensors:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, change(held))

    def get_seq_length(self) -> int:
        """Tokens seen, which for this class is the number of rows held."""
        return 0 if self.keys is None else self.keys.shape[TOKENS]

    def reset(self) -> None:
        """Forget everything."""
        # transformers 5.17 zeroes the tensors and so keeps their length.
        for name in self.tensors:
            setattr(self, name, None)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest rows; `tokens_to_remove` is zero or negative, as in transformers."""
        if tokens_to_remove > 0:
            raise RunError(f"crop takes minus the tokens to remove, not {tokens_to_remove}.")
        if tokens_to_remove < 0:
            self.each(lambda held: held[..., :tokens_to_remove, :])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i of the batch what row `beam_idx[i]` was."""
        self.each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.each(lambda held: held[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.each(lambda held: held.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to host memory."""
        self.each(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the model's device."""
        self.each(lambda held: held.to(self.device, non_blocking=True))


_OWNER = "_compresskit_layer"


def hand(layer: Layer, keys: torch.Tensor) -> torch.Tensor:
    """Return `keys` as a view marked as handed out by `layer`: attention over it asks the layer.

    A view, because a mark on a tensor that the layer holds would be a cycle of references, and
    caches would outlive their request.
    """
    marked = keys.detach()
    setattr(marked, _OWNER, layer)
    return marked


def owner(keys: torch.Tensor) -> Layer | None:
    """The layer that handed out `keys`, if one did."""
    return getattr(keys, _OWNER, None)


def new_dynamic(config: PreTrainedConfig) -> Cache:
    """Return the dense cache that the model would make for itself: the baseline."""
    return DynamicCache(config=config)


class FixedLayer(StaticLayer):  # type: ignore[misc]  # transformers is untyped here
    """A preallocated layer that can forget its newest tokens: what lies behind the length is masked."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Shorten the length; `tokens_to_remove` is zero or negative, as in transformers."""
        # In place: graphs read it at this address.
        self.cumulative_length.add_(tokens_to_remove)


def static(config: PreTrainedConfig, capacity: int) -> Cache:
    """Return a preallocated cache for `capacity` tokens, whose shapes never change."""
    cache = StaticCache(config=config, max_cache_len=capacity)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticLayer:  # sliding ones overwrite what they would have to give back
            cache.layers[index] = FixedLayer(max_cache_len=capacity)
    return cache


def build_cache(config: PreTrainedConfig, make_layer: Callable[[int], Layer]) -> Cache:
    """Return the model's cache with every full-attention layer replaced by `make_layer(index)`."""
    cache = new_dynamic(config)
    # The exact class: its subclasses (sliding, indexed, hybrid) hold more than keys and values.
    full = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise Conflict(
            f"{config.model_type} has no full-attention layer whose cache could be replaced "
            f"(its layers: {', '.join(kinds)}); run it without the cache method."
        )
    for index in full:
        cache.layers[index] = make_layer(index)
    return cache


def factory(config: PreTrainedConfig, make_layer: Callable[[int], Layer]) -> NewCache:
    """Return a `System.new_cache` for such caches; raise now if the model has no place for them."""
    build_cache(config, make_layer)
    return lambda capacity: build_cache(config, make_layer)


def enable_rollback(cache: Cache) -> None:
    """Let `roll_back` undo every later forward pass; call it once, after the prefill.

    From here on sliding layers keep what falls out of their window until the next `roll_back`;
    before the prefill that would be the whole prompt.
    """
    for index, layer in enumerate(cache.layers):
        if not layer.is_croppable:
            raise RunError(_cannot(layer, index, "it does not crop exactly"))
    cache.activate_past_recording()


def roll_back(cache: Cache, n: int) -> None:
    """Forget the newest `n` tokens, exactly.

    After `enable_rollback`, call it for every step, also with 0: the sliding layers then drop what
    they kept for a rollback.
    """
    if not 0 <= n <= cache.get_seq_length():
        raise RunError(
            f"cannot take {n} tokens back from a cache that has seen {cache.get_seq_length()}."
        )
    recording = [getattr(layer, "record_past", False) for layer in cache.layers]
    # All checks come first, so that a refusal leaves no layer shorter than the others.
    touched = [
        index
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "is_initialized", True) and (n > 0 or recording[index])
    ]
    for index in touched:
        _check_croppable(cache.layers[index], index, n, recorded=recording[index])
    for index in touched:
        cache.layers[index].crop(-n)


def _check_croppable(layer: Any, index: int, n: int, *, recorded: bool) -> None:
    if not layer.is_croppable:
        raise RunError(_cannot(layer, index, "it does not crop exactly"))
    window = getattr(layer, "sliding_window", None)
    if window is None:
        return
    seen, rows = layer.get_seq_length(), layer.keys.shape[TOKENS]
    if seen >= window and not recorded:
        raise RunError(
            _cannot(
                layer, index, "older tokens left its window; call enable_rollback after the prefill"
            )
        )
    if rows - n < min(seen - n, window - 1):
        raise RunError(
            _cannot(layer, index, f"of {n} tokens it can only restore {max(rows - window + 1, 0)}")
        )


def _cannot(layer: Any, index: int, reason: str) -> str:
    return f"cache layer {index} ({type(layer).__name__}) cannot take tokens back: {reason}."


def cache_bytes(*caches: Cache) -> dict[str, int]:
    """Bytes of memory that the layers of `caches` keep alive, by what they are, each counted once.

    A layer says what its tensors are in `holds`; whatever else it keeps is `other`. A view keeps its
    whole storage alive: the part that no tensor of the layers shows is `slack`, so that a layer
    which cropped without copying is charged for it.
    """
    held: dict[str, int] = {}
    left: dict[tuple[torch.device, int], int] = {}
    for kind, tensor in _named_tensors(caches):
        storage = tensor.untyped_storage()
        key = tensor.device, storage.data_ptr()
        # Tensors that overlap share what is there; the first one is charged.
        rest = left.get(key, storage.nbytes())
        shown = min(tensor.numel() * tensor.element_size(), rest)
        left[key] = rest - shown
        if shown:
            held[kind] = held.get(kind, 0) + shown
    slack = sum(left.values())
    return {**held, "slack": slack} if slack else held


def _named_tensors(caches: Iterable[Cache]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every distinct tensor with its kind, the named ones first: they are charged before others."""
    distinct: dict[tuple[int, int, torch.Size], tuple[str, torch.Tensor]] = {}
    for cache in caches:
        for part in (cache, *cache.layers):
            # A layer whose attributes are not one kind each names its tensors itself.
            named = getattr(part, "named_tensors", None)
            for kind, tensor in _by_attribute(part) if named is None else named():
                same = tensor.untyped_storage().data_ptr(), tensor.data_ptr(), tensor.shape
                distinct.setdefault(same, (kind, tensor))
    yield from sorted(distinct.values(), key=lambda one: one[0] == "other")


def _by_attribute(part: Any) -> Iterator[tuple[str, torch.Tensor]]:
    holds = getattr(part, "holds", KEYS_VALUES)
    for name, value in vars(part).items():
        for tensor in tensors_in(value):
            yield holds.get(name, "other"), tensor


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every plain tensor in `value`: itself, in collections, inside tensor subclasses."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
