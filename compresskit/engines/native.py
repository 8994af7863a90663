"""Run a transformers model in our own decode loop: the engine that every method fits."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, final

from compresskit.decode import autoregressive
from compresskit.device import gpus
from compresskit.engine import AbstractEngine
from compresskit.errors import Conflict
from compresskit.hf import load, parallel, placement, synthetic
from compresskit.hf.cache import new_dynamic
from compresskit.hf.step import eager_step
from compresskit.spec import Mode, PlacementSpec
from compresskit.system import System
from compresskit.traits import Trait

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compresskit.device import Device
    from compresskit.hf.load import Loaded
    from compresskit.spec import ModelSpec

_OFFERED = frozenset(
    {
        Trait.MODULES,
        Trait.FLOAT_WEIGHTS,
        Trait.OWN_CACHE,
        Trait.DENSE_CACHE,
        Trait.FULL_CONTEXT,
        Trait.ROLLBACK,
        Trait.SLOT_MASKS,
        Trait.STATIC_SHAPES,
        Trait.ATTENTION_HOOK,
        Trait.OWN_LOOP,
        Trait.LOGITS,
        Trait.BATCH,
        Trait.PADDED_BATCH,
        Trait.TRAINED,
    }
)


@final
class Native(AbstractEngine):
    """transformers model, our loop."""

    mode: Mode = "eager"
    """eager, prepacked (CPU, bfloat16) or compiled."""
    placement: PlacementSpec | None = None
    """How the model lies on several devices, if it does."""

    def traits(self, path: Path, device: Device) -> frozenset[Trait]:
        """Everything, but for what the config rules out.

        Experts add MOE; a checkpoint that comes quantised holds no floats; recurrent state cannot
        be taken back; windows go by slots; random weights have nothing to say.
        """
        config = load.read_config(path)
        traits = _OFFERED | frozenset(device.traits)
        if load.has_experts(config):
            traits |= {Trait.MOE}
        if synthetic.is_marked(config):
            traits -= {Trait.TRAINED}
        if config.get("quantization_config"):
            traits -= {Trait.FLOAT_WEIGHTS}
        if load.has_recurrent_state(config):
            traits -= {Trait.ROLLBACK, Trait.PADDED_BATCH, Trait.SLOT_MASKS}
        if load.has_windows(config):
            traits -= {Trait.SLOT_MASKS}
            if self.mode == "compiled":  # static windows overwrite what would have to come back
                traits -= {Trait.ROLLBACK}
        return traits - self.loses(device).keys()

    def loses(self, device: Device) -> Mapping[Trait, str]:
        """What cannot be done with a placed model.

        Its weights come and go, or are shares, so nothing reaches for them or compiles with them. Caches
        of ours were only tried on one device that computes.
        """
        if self.placement is None:
            return {}
        taken = {Trait.MODULES, Trait.STATIC_SHAPES}
        if len(device.ordinals) > 1 or self.placement.how != "spread":
            taken |= {Trait.OWN_CACHE, Trait.ATTENTION_HOOK}
        if parallel.demands(self.placement):
            taken |= {Trait.ROLLBACK}  # how much is drafted may go by the time it took
        return dict.fromkeys(taken, f"placement {self.placement.how!r}")

    def vet(self, path: Path, device: Device) -> None:
        """Refuse placements of what comes packed, and on a CPU ones that would spread nothing."""
        if self.placement is None:
            return
        how = self.placement.how
        if load.read_config(path).get("quantization_config"):
            raise Conflict(
                f"placement {how!r} moves dense weights; those of {path.name} come quantised, in layers that "
                "stay on one device. Place the unquantised checkpoint, or leave --placement out."
            )
        if parallel.demands(self.placement):
            if synthetic.draws(path, load.read_config(path)):
                raise Conflict(
                    f"placement {how!r} cuts the matrices of a file, and the random ones of {path.name} are "
                    "in none. Use --placement spread."
                )
            parallel.vet(device, len(gpus(device)))
        if how == "spread" and device.kind == "cpu" and self.placement.host_gb is None:
            raise Conflict(
                "placement 'spread' on a CPU has the host's memory and the disk to choose from, and the "
                "model would stay in memory. Say how much may: --placement spread:host_gb=4."
            )

    def for_others(self) -> Native:
        """A draft has to be small, so it stays whole on the device that computes."""
        return self.model_copy(update={"placement": None})

    @contextmanager
    def open(self, path: Path, model: ModelSpec, device: Device) -> Iterator[System]:
        """Load the model and offer it with a dense dynamic cache and the autoregressive loop."""
        if self.placement is None:
            yield self._system(load.load_model(path, model, device), device)
            return
        if parallel.demands(self.placement):
            loaded = load.load_model(path, model, device, "shared")
            told = parallel.facts(loaded.model, self.placement)
            yield self._system(loaded._replace(facts={**loaded.facts, **told}), device)
            return
        with TemporaryDirectory(prefix="compresskit-") as folder:
            limits = placement.limits(self.placement, device)
            loaded = load.load_model(path, model, device, load.Spread(limits, Path(folder)))
            told = placement.facts(loaded.model, self.placement)
            loaded = loaded._replace(facts={**loaded.facts, "placement": told})
            yield self._system(loaded, device.using(placement.gpus(loaded.model) or (0,)))

    def _system(self, loaded: Loaded, device: Device) -> System:
        config = loaded.model.config
        if self.mode != "compiled":  # inductor has attention of its own
            # Imported here: it brings transformers' modelling code, seconds of it.
            from compresskit.hf.attention import use_decode_attention

            use_decode_attention(loaded.model, device)
        return System(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            device=device,
            step=eager_step(loaded.model),
            new_cache=lambda capacity: new_dynamic(config),
            decode=autoregressive,
            context=loaded.context,
            kernels=loaded.kernels,
            facts=loaded.facts,
            simulated=loaded.simulated,
            synthetic=loaded.synthetic,
        )

    def requires(self) -> frozenset[Trait]:
        """Compiled steps need static shapes and our loop; packing needs the weights at hand."""
        if self.mode == "compiled":
            return frozenset({Trait.STATIC_SHAPES, Trait.OWN_LOOP})
        return frozenset({Trait.MODULES}) if self.mode == "prepacked" else frozenset()

    def finish(self, system: System) -> System:
        """Prepack or compile as the mode says; the eager mode leaves everything as it is."""
        if self.mode == "prepacked":
            return _prepacked(system)
        if self.mode == "compiled":
            from compresskit.hf.compiled import compile_decode

            return compile_decode(system)
        return system


def _prepacked(system: System) -> System:
    from compresskit.hf.prepack import prepack

    if system.device.kind != "cpu":
        raise Conflict(
            "mode 'prepacked' lays weights out for oneDNN on the CPU; use 'compiled' on CUDA."
        )
    names = prepack(system.model)
    return replace(
        system,
        kernels={**system.kernels, "dense_linear": "onednn:_linear_pointwise"}
        if names
        else system.kernels,
    )
