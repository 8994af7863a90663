"""transformers' own quantised, static and offloaded caches, made to answer for themselves.

They are baselines: what a user gets with `cache_implementation`. The numbers they give back are
untouched. What is added is what they leave out: their bytes by kind (some hide in tensor
subclasses or in tuples), the full-precision copy that every step writes, and an error where they
would go on with a corrupt cache:

    crop            quantised layers say that they can, and then lose rows or fail inside
    select, repeat  codes stay in the old batch
    beams           in transformers 5.17 codes keep the old order

Their rounding stays what it is: the first pass gets its own keys and values back unrounded; later
passes quantise the whole cache again whenever the residual is full (quanto, hqq), or keep the scale
of the first pass for ever, so that larger values are clipped (fp8).
"""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from compresskit.errors import Conflict, MissingExtra, RunError
from compresskit.hf.cache import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

Backend = Literal["quanto", "hqq", "fp8"]


class _Library(NamedTuple):
    """What stands behind a backend."""

    layer: str
    """Class in `transformers.cache_utils`."""
    module: str = ""
    """What it imports; empty: torch alone."""
    package: str = ""
    extra: str = ""


_LIBRARIES: Mapping[str, _Library] = {
    "quanto": _Library("QuantoQuantizedLayer", "optimum.quanto", "optimum-quanto", "quanto"),
    "hqq": _Library("HQQQuantizedLayer", "hqq.core.quantize", "hqq", "hqq"),
    "fp8": _Library("Fp8QuantizedLayer"),
}


class Wrapped:
    """Mixed into a quantised layer of transformers: accounts and refusals."""

    is_croppable = False
    copied = 0
    """Bytes of the full-precision copy that the last pass wrote."""

    # Of the layer that this is mixed into.
    is_initialized: bool

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Note how much was dequantised: everything, but for the first pass, which gets its own."""
        first = not self.is_initialized
        seen = super().update(*args, **kwargs)  # type: ignore[misc]
        self.copied = 0 if first else sum(tensor.nbytes for tensor in seen)
        return seen

    def copied_bytes(self) -> int:
        """Bytes that a decode step writes to read them once, beside what it reads of the codes."""
        return self.copied

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything held with its kind: codes, scales (and zero points), residual."""
        for name, value in vars(self).items():
            for tensor in tensors_in(value):
                if not name.startswith("_quantized_"):
                    yield "residual" if name in ("keys", "values") else "other", tensor
                else:
                    # fp8 codes are floating-point, too, but of one byte.
                    wide = tensor.is_floating_point() and tensor.element_size() > 1
                    yield "scales" if wide else "codes", tensor

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As the layer does, where it reorders its codes at all."""
        if hasattr(self, "residual_length") and not hasattr(self, "_pending_beam_idx"):
            self._refuse(
                "reorder beams: this version of transformers leaves its codes as they were"
            )
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse."""
        self._refuse("take tokens back: only its unquantised newest rows would be cropped")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        """Refuse."""
        self._refuse("select rows of the batch: its codes would stay as they were")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse."""
        self._refuse("repeat rows of the batch: its codes would stay as they were")

    def _refuse(self, what: str) -> NoReturn:
        raise RunError(f"transformers' {type(self).__name__} cannot {what}. Use a cache of ours.")


def quantised_layer(backend: Backend, **options: int) -> Callable[[int], Any]:
    """Return what makes the layers of transformers' `QuantizedCache`; `options` are its own.

    Raises:
        MissingExtra: the library behind `backend` is not installed.
        Conflict: this version of transformers has no such layer.
    """
    cls = _layer_class(backend)
    return lambda index: cls(**options)


@functools.cache
def _layer_class(backend: Backend) -> type[Any]:
    library = _LIBRARIES[backend]
    base = getattr(cache_utils, library.layer, None)
    if base is None:
        import transformers

        raise Conflict(
            f"transformers {transformers.__version__} has no {backend} cache (the class "
            f"{library.layer}); install a newer one: pip install -U transformers"
        )
    if library.module:
        _import(library)
    return type(library.layer, (Wrapped, base), {})


def _import(library: _Library) -> None:
    """Import what the layer will import, quietly: both libraries use what torch deprecates."""
    try:
        # Not by import alone: what quanto compiles at its first use outlives its removal.
        version(library.package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(library.module)
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise MissingExtra(library.package, extra=library.extra) from error


def offloaded(config: PreTrainedConfig) -> Cache:
    """Return transformers' cache that keeps all layers but the current one in host memory."""
    return DynamicCache(config=config, offloading=True)
