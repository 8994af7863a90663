"""Prepacked and compiled decoding give the tokens of the eager mode, or say why they cannot."""

from __future__ import annotations

import shutil

import pytest
import torch

from compresskit import artefact as artefacts, catalogue
from compresskit.decode import pad
from compresskit.device import resolve
from compresskit.errors import Conflict
from compresskit.measure.memory.weights import weight_bytes
from compresskit.spec import EngineSpec, ModelSpec, RunSpec, SamplingSpec
from compresskit.system import Request
from compresskit.traits import Trait

BF16 = pytest.mark.skipif(
    Trait.BF16 not in resolve("cpu").traits, reason="this CPU has no bfloat16 instructions"
)
COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)
TEXTS = ("Once upon a time there was", "Mira has the code 4821. The code of Mira is")


def opened(mode: str, dtype: str = "auto", *methods: str):
    spec = RunSpec(
        model=ModelSpec(name="tiny", dtype=dtype),
        device="cpu",
        engine=EngineSpec(mode=mode),
        stack=tuple(catalogue.parse_method(text) for text in methods),
    )
    return artefacts.opened(artefacts.plan(spec))


def greedy(system, texts=TEXTS, new: int = 12) -> list[list[int]]:
    rows, mask = pad([system.tokenizer.encode(text) for text in texts], device=torch.device("cpu"))
    request = Request(tokens=rows, mask=mask, max_new_tokens=new, sampling=SamplingSpec())
    return torch.cat([chunk.tokens for chunk in system.generate(request)], dim=1).tolist()


@BF16
def test_prepacked_equals_eager_bit_for_bit() -> None:
    ids = torch.arange(40).unsqueeze(0)
    logits = []
    for mode in ("eager", "prepacked"):
        with opened(mode, "bfloat16") as artefact, torch.inference_mode():
            system = artefact.system
            logits.append(system.step(ids, system.new_cache(40), keep=0))
            tokens = greedy(system)
            held = weight_bytes(system.model)
        if mode == "prepacked":
            assert "dense" not in held
            assert held["packed"] > 0
            assert "dense_linear" in system.kernels
    assert torch.equal(logits[0], logits[1])
    with opened("eager", "bfloat16") as artefact:
        assert greedy(artefact.system) == tokens


def test_prepacked_refuses_float32() -> None:
    with pytest.raises(Conflict, match="bfloat16"), opened("prepacked", "float32"):
        pass


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inside inductor
def test_compiled_equals_eager_padded_or_not() -> None:
    with opened("eager") as artefact:
        alone, together = greedy(artefact.system, TEXTS[:1]), greedy(artefact.system)
    with opened("compiled") as artefact:
        assert "torch.compile" in artefact.system.kernels["decode_step"]
        # Twice each: the second request runs the first one's graph on a cache of its own.
        assert [greedy(artefact.system, TEXTS[:1]) for _ in range(2)] == [alone, alone]
        assert [greedy(artefact.system) for _ in range(2)] == [together, together]


@BF16
@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inside inductor
def test_compiled_weights_are_packed_and_caches_are_not() -> None:
    """Freezing that does not engage leaves a compiled step no faster than eager, without a word."""
    from torch._dynamo.utils import counters

    packed = "mkldnn_linear_weight_pack_matcher_count"
    before = counters["inductor"][packed]
    with opened("compiled", "bfloat16") as artefact:
        # A graph that kept the first request's cache would go on in it and answer otherwise.
        first, second, third = (greedy(artefact.system, TEXTS[:1], new=30) for _ in range(3))
        assert first == second == third
        layers = artefact.system.model.config.num_hidden_layers
    assert counters["inductor"][packed] - before >= 7 * layers


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inside inductor
def test_compiled_takes_more_shapes_than_torch_allows_by_default() -> None:
    import torch._dynamo.config as dynamo

    # Torch's own limit is 8; a lower one is passed as soon, and every graph takes seconds to build.
    with dynamo.patch(recompile_limit=2), opened("compiled") as artefact:
        for batch in range(1, 5):
            assert len(greedy(artefact.system, TEXTS[:1] * batch, new=3)) == batch


def test_compiled_needs_shapes_that_stay() -> None:
    with (
        pytest.raises(
            Conflict, match="mode 'compiled' needs 'static_shapes', which kv/int8 does not leave"
        ),
        opened("compiled", "auto", "kv/int8"),
    ):
        pass
