"""Move a scale a channel from activations into weights: what AWQ and SmoothQuant share.

    method   statistics of the inputs, weights --> s [K], or None to leave the layers as they are
    here     x / s   by the norm or the linear layer before, if that can be proved, else at run time
             W * s   packed

Both look at the dense model only, so the calibration text flows through dense blocks. The output
head is reached by a norm outside the blocks; its scale is applied at run time, one product a
channel beside a whole vocabulary of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from compresskit.hf import modules
from compresskit.methods.quant._calibrate import Walk
from compresskit.methods.quant._fold import Bench

if TYPE_CHECKING:
    import torch
    from pydantic import JsonValue

    from compresskit.hf.modules import Site
    from compresskit.method import Context
    from compresskit.methods.quant._calibrate import AbstractCalibrated
    from compresskit.methods.quant._fold import Fold
    from compresskit.methods.quant._moments import Moments, Shared
    from compresskit.methods.quant._packing import Scheme
    from compresskit.system import System


class Smoother(Protocol):
    """What a method decides; it adds its own errors up as it goes."""

    def scale(self, weights: list[torch.Tensor], moments: Moments) -> torch.Tensor | None:
        """The scale `[K]`, float32, for weights `[N, K]` that share their inputs; None for all ones."""

    def store(self, target: Scaled, moments: Moments) -> Any:
        """The stored form of `target.exact`."""

    def facts(self) -> dict[str, JsonValue]:
        """What it has to say in the end."""


class Scaled:
    """A weight to be packed: W * s / t, in float32."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None, divisor: torch.Tensor | None
    ) -> None:
        """`scale` s `[K]` of its inputs, `divisor` t `[N]` that a following layer has put there."""
        self.weight, self.scale, self.divisor = weight, scale, divisor
        self.exact = weight.float()
        if scale is not None:
            self.exact = self.exact * scale
        if divisor is not None:
            self.exact = self.exact / divisor.unsqueeze(1)

    def difference(self, stored: torch.Tensor) -> torch.Tensor:
        """How far `stored` `[N, K]`, in place of `exact`, is off in terms of W."""
        back = stored - self.exact
        if self.divisor is not None:
            back = back * self.divisor.unsqueeze(1)
        return back if self.scale is None else back / self.scale


class _Smoothing:
    """One walk through a model."""

    def __init__(self, walk: Walk, smoother: Smoother, seed: int, *, fold_only: bool) -> None:
        self.walk, self.smoother, self.seed = walk, smoother, seed
        self.fold_only = fold_only
        self.into: dict[str, int] = {"norm": 0, "linear": 0, "run time": 0, "none": 0}

    def block(self, index: int, seen: list[Shared]) -> None:
        """Quantise the layers of one block."""
        bench: Bench | None = None
        divisors: dict[str, torch.Tensor] = {}
        others = [site for one in seen for site in one.sites]
        settled: list[tuple[Shared, torch.Tensor | None, torch.Tensor | None]] = []
        for one in seen:
            scale = self.smoother.scale([site.weight() for site in one.sites], one.moments)
            if scale is None:
                self.into["none"] += 1
                settled.append((one, None, None))
                continue
            stream = self.walk.stream
            bench = bench or Bench(stream.blocks[index].module, stream.samples[index], self.seed)
            free = [site for site in others if site.name not in divisors]
            fold = bench.fold(one, free)
            if fold is None and self.fold_only:
                self.into["none"] += 1
                settled.append((one, None, None))
                continue
            settled.append((one, *self._placed(scale, one, fold, free, divisors)))
        # Only now, since a layer's rows may have been divided for one that comes later. The bench
        # has run on the block as it was; its copies are no longer needed.
        del bench
        for one, scale, at_run_time in settled:
            for site in one.sites:
                self.pack(site, one.moments, scale, at_run_time, divisors.get(site.name))

    def _placed(
        self,
        scale: torch.Tensor,
        one: Shared,
        fold: Fold | None,
        free: list[Site],
        divisors: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Divide what comes before, or say what to multiply by at run time; the scale as it is."""
        if fold is None:
            self.into["run time"] += 1
            return self.at_run_time(scale, one.sites[0])
        if fold.kind == "rows":
            self.into["linear"] += 1
            name = next(site.name for site in free if site.module is fold.producer)
            divisors[name] = scale
            return scale, None
        self.into["norm"] += 1
        return fold.divide(scale), None

    @staticmethod
    def at_run_time(scale: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """What to multiply activations by, in the type of the model, and the scale that makes it."""
        inverse = (1 / scale).to(site.weight().dtype)
        return 1 / inverse.float(), inverse

    def pack(
        self,
        site: Site,
        moments: Moments,
        scale: torch.Tensor | None,
        at_run_time: torch.Tensor | None = None,
        divisor: torch.Tensor | None = None,
    ) -> None:
        """Replace one layer."""
        target = Scaled(site.weight(), scale, divisor)
        own = None if at_run_time is None else at_run_time.clone()
        layer = self.walk.packing.pack(
            site,
            self.walk.scheme,
            stored=self.smoother.store(target, moments),
            exact=target.exact,
            input_scale=own,
        )
        if divisor is not None and layer.bias is not None:
            layer.bias = (layer.bias.float() / divisor).to(layer.bias.dtype)
        site.replace(layer)

    def head(self, one: Shared, *, shared_with_embedding: bool) -> None:
        """Quantise the output head; its rows must stay as they are where they are looked up too."""
        site = one.sites[0]
        scale = None
        if not shared_with_embedding and not self.fold_only:
            scale = self.smoother.scale([site.weight()], one.moments)
        if scale is None:
            self.into["none"] += 1
            self.pack(site, one.moments, None)
            return
        self.into["run time"] += 1
        self.pack(site, one.moments, *self.at_run_time(scale, site))


def smooth(
    method: AbstractCalibrated,
    system: System,
    ctx: Context,
    scheme: Scheme[Any],
    smoother: Smoother,
    *,
    label: str,
    products: bool,
    keep: bool,
    fold_only: bool = False,
) -> System:
    """Quantise `system` with the scales that `smoother` chooses."""
    walk = Walk(method, system, ctx, scheme, label)
    smoothing = _Smoothing(walk, smoother, ctx.seed, fold_only=fold_only)
    for index, seen in walk.blocks(products=products, keep=keep, advance=True):
        smoothing.block(index, seen)
    top = walk.at_head(products=products, keep=keep)
    if top is not None:
        shared = walk.embedding is not None and walk.tied
        smoothing.head(top, shared_with_embedding=shared)
    modules.release_freed()
    return walk.finish(scales_folded_into=dict(smoothing.into), **smoother.facts())
