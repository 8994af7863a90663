"""Compiled decoding: a static cache and a compiled step for each width that the loop asks for.

    prefill   eager (its shape changes from prompt to prompt), writes into the static cache
    decode    torch.compile of the model's forward for shape [B, T], T among `System.widths`: one
              token, and the blocks of a speculative loop:
              CPU   inductor with frozen weights, so that constants are folded and laid out once
              CUDA  mode "reduce-overhead", which replays a CUDA graph, on caches that keep their
                    addresses from request to request (`kept`)

Each batch size, width and cache capacity is a graph of its own; capacities are rounded up to `SLOTS`, so
that few are needed. `fullgraph` makes a graph break, or one recompilation too many, an error
instead of a silent return to eager code. The first decode step compiles; the runner pays it before
anything is timed and records it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit.errors import Conflict
from compresskit.hf.cache import static
from compresskit.hf.kept import Kept
from compresskit.hf.modules import release_freed
from compresskit.hf.step import eager_step

SLOTS = 128
"""Capacities are multiples of this many tokens."""
GRAPHS = 64
"""Most graphs of one process: one for each batch size, width, capacity and kind of mask."""

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.system import System


def compile_decode(system: System) -> System:
    """Return the system with a static cache and a compiled step for each of its widths.

    Raises:
        Conflict: torch.compile cannot work here (no C++ compiler).
    """
    config = system.model.config
    # Graphs of the GPU hold addresses; constants on the CPU must not (see `_unmark`).
    new = static if system.device.kind == "cpu" else Kept().cache
    return replace(
        system,
        new_cache=lambda capacity: new(config, -(-capacity // SLOTS) * SLOTS),
        step=CompiledStep(system.model, system.device.kind, system.widths),
        fixed_widths=True,
        kernels={**system.kernels, "decode_step": f"torch.compile ({_how(system.device.kind)})"},
    )


def _how(kind: str) -> str:
    return "inductor, frozen weights" if kind == "cpu" else "CUDA graphs"


class CompiledStep:
    """Steps of one of the `widths` go through the compiled forward, all others through the eager one."""

    def __init__(self, model: Any, kind: str, widths: tuple[int, ...] = (1,)) -> None:
        """Wrap `model`; a graph is built when the first step of its shape is taken."""
        self.kind = kind
        self.widths = frozenset(widths)
        self.built_bytes: int | None = 0
        """Anonymous memory that building the graphs has taken, their constants included; None where
        the system does not tell. It is the compiler's code, its caches and the graphs."""
        self._modules: list[Any] = []
        self._known: set[tuple[object, ...]] = set()
        self._eager = eager_step(model)
        with self._noted():
            self._compiled = _compile(model, kind)

    def __call__(
        self,
        tokens: torch.Tensor,
        cache: Any,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: int = 1,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits, as every `Step`."""
        logits: torch.Tensor
        hidden: torch.Tensor | None
        width = tokens.shape[1]
        seen = int(cache.get_seq_length())
        if positions is None:
            # A static cache cannot tell its length from its shape; counting here, outside the
            # graph, keeps the length out of the compiled code.
            positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device).unsqueeze(
                0
            )
        capacity = cache.get_max_length()
        if mask is not None and (mask.dim() == 4 or seen > 0):
            # Same width at every step, or each would be compiled anew.
            mask = torch.nn.functional.pad(mask, (0, capacity - mask.shape[-1]))
        if width not in self.widths or seen == 0:
            logits = self._eager(
                tokens, cache, mask=mask, positions=positions, keep=keep, features=features
            )
            if self.kind == "cpu":
                _unmark(cache)
            return logits
        wanted = features is not None
        graph = (*tokens.shape, capacity, None if mask is None else mask.dim(), wanted)
        with nullcontext() if graph in self._known else self._building():
            logits, hidden = self._compiled(tokens, cache, mask, positions, wanted)
        self._known.add(graph)
        if features is not None and hidden is not None:
            features.append(hidden[:, -keep:])
        return logits[:, -keep:]

    def constants(self) -> list[torch.Tensor]:
        """Tensors that the graphs keep alive: weights that were folded, laid out or just noted."""
        return [
            value
            for module in self._modules
            for value in vars(module).values()
            if isinstance(value, torch.Tensor)
        ]

    @contextmanager
    def _building(self) -> Iterator[None]:
        with self._noted(), _freezing(self.kind):
            yield

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note what is generated and how much memory is taken meanwhile."""
        before, modules = _anonymous(), _generated()
        yield
        known = {id(module) for module in modules}
        self._modules += [module for module in _generated() if id(module) not in known]
        after = _anonymous()
        if self.built_bytes is None or before is None or after is None:
            self.built_bytes = None
        else:
            self.built_bytes += after - before


def _generated() -> list[Any]:
    """The modules that inductor has generated in this process; frozen tensors are attributes."""
    from torch._inductor.codecache import PyCodeCache

    return list(getattr(PyCodeCache, "modules", ()))


def _anonymous() -> int | None:
    """Anonymous resident memory of this process in bytes, freed memory given back first (Linux)."""
    release_freed()
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _unmark(cache: Any) -> None:
    """Take back transformers' mark that the tensors of a static cache stay at their address.

    The mark is for CUDA graphs. Where weights are frozen it makes constants of the tensors too: the
    graph would go on writing into the first request's cache, for every later request.
    """
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and hasattr(value, "_dynamo_static_input_type"):
                del value._dynamo_static_input_type


@contextmanager
def _freezing(kind: str) -> Iterator[None]:
    """Settings that hold while a graph is built: room for many graphs, and frozen weights.

    torch allows eight graphs of one function and would then fail; a run with several batch sizes
    needs more. Freezing is for the CPU, and must hold when torch traces the call, not only in the
    backend: as an option of `torch.compile` it comes too late to turn the parameters into
    constants, and weights are then silently not packed (torch 2.13).
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    with dynamo.patch(recompile_limit=GRAPHS), inductor.patch(freezing=kind == "cpu"):
        yield


def _compile(model: Any, kind: str) -> Any:
    def forward(
        tokens: torch.Tensor,
        cache: Any,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        features: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = model(
            input_ids=tokens,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            output_hidden_states=features,
        )
        return output.logits, output.hidden_states[-1] if features else None

    if kind == "cpu":
        import torch._inductor.config as inductor

        if not _has_compiler(inductor):
            raise Conflict(
                "mode 'compiled' needs a C++ compiler on the CPU (g++ or clang++). Use --mode prepacked."
            )
        return torch.compile(forward, dynamic=False, fullgraph=True)
    return torch.compile(forward, dynamic=False, fullgraph=True, mode="reduce-overhead")


def _has_compiler(inductor: Any) -> bool:
    import shutil

    named = inductor.cpp.cxx
    candidates = named if isinstance(named, tuple | list) else (named,)
    return any(name and shutil.which(name) for name in (*candidates, "g++", "clang++"))
