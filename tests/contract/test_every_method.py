"""What every method promises, checked for each one that the catalogue finds.

A new method file is covered the moment it exists. Where a promise is a number, it is counted
(bytes, tokens, forward passes), never timed.
"""

from __future__ import annotations

import gc
import json
import types

import pytest
import torch
from compresskit_kernels import dispatch
from pydantic import ValidationError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compresskit import assets, catalogue, metrics, stack
from compresskit.hf.cache import cache_bytes
from compresskit.hf.prepack import opaque_bytes
from compresskit.measure.count import counting
from compresskit.measure.memory.weights import weight_bytes
from compresskit.method import AbstractMethod, Stage
from compresskit.spec import MethodSpec, SamplingSpec
from compresskit.system import Request
from compresskit.traits import Trait

NAMES = catalogue.method_names()
# Text of the kind the tiny model was trained on, so that what it does is no noise.
PROMPT = assets.text_path("heldout").read_text(encoding="utf-8")[:900]
NEW = 40
ROOM = 256
"""Tokens that a cache is made for; static ones hold no more."""


def spec_of(name: str) -> MethodSpec:
    return catalogue.normalise(MethodSpec(name=name, params=dict(catalogue.get(name).example)))


def command_line(name: str) -> str:
    return spec_of(name).label()


def answers(system, request) -> list[list[int]]:
    """New tokens of each row."""
    rows: list[list[int]] = [[] for _ in request.tokens]
    for chunk in system.generate(request):
        for row, new, length in zip(
            rows, chunk.tokens.tolist(), chunk.lengths.tolist(), strict=True
        ):
            row += new[:length]
    return rows


def greedy(system, new=NEW) -> list[int]:
    ids = torch.tensor([system.tokenizer.encode(PROMPT)])
    return answers(system, Request(tokens=ids, max_new_tokens=new, sampling=SamplingSpec()))[0]


@pytest.fixture(scope="module")
def baseline(open_stack):
    with open_stack() as opened:
        cache = opened.system.new_cache(ROOM)
        with torch.inference_mode():
            opened.system.step(torch.arange(200).unsqueeze(0), cache)
        return {
            "tokens": greedy(opened.system),
            "weights": sum(weight_bytes(opened.system.model).values()),
            "cache": sum(cache_bytes(cache).values()),
        }


def test_the_catalogue_is_not_empty() -> None:
    assert {"quant/int8", "quant/int4", "kv/int8", "kv/sink_window", "speculative/ngram"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_builds_from_its_example_and_round_trips(name: str) -> None:
    spec = spec_of(name)
    again = catalogue.normalise(MethodSpec.model_validate_json(spec.model_dump_json()))
    assert again == spec
    assert catalogue.parse_method(spec.label()) == spec
    cls = catalogue.get(name)
    assert issubclass(cls, AbstractMethod)
    assert getattr(cls, "__final__", False), "decorate the class with @final"
    with pytest.raises(ValidationError, match="frozen"):
        cls().anything = None


@pytest.mark.parametrize("name", NAMES)
def test_documents_itself(name: str) -> None:
    cls = catalogue.get(name)
    text = cls.__doc__ or ""
    assert "Paper:" in text
    assert "Cost:" in text
    assert isinstance(cls.stage, Stage)
    described = catalogue.describe(name)
    assert all(parameter["help"] for parameter in described["parameters"])
    json.dumps(described, allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_refused(name: str) -> None:
    with pytest.raises(catalogue.SpecError, match="unknown key"):
        catalogue.decode(name, {"no_such_parameter": 1})


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_keeps_its_promises(name: str, open_stack, baseline) -> None:
    with open_stack(command_line(name)) as opened:
        system = opened.system
        tokens = greedy(system)
        assert len(tokens) == NEW
        if Trait.LOSSLESS in opened.traits:
            assert tokens == baseline["tokens"]
        json.dumps(dict(system.facts), allow_nan=False)
        assert all(isinstance(value, str) for value in system.kernels.values())
        stage = catalogue.get(name).stage
        if stage is Stage.DECODE:
            counted, counter = counting(system)
            greedy(counted)
            assert counter.calls < NEW, "no draft was ever accepted"
        if not system.simulated:
            if stage is Stage.WEIGHTS:
                assert sum(weight_bytes(system.model).values()) < baseline["weights"]
            # A control or another way to store the same rows asks for all of them.
            if stage is Stage.CACHE and system.facts.get("cache_nominal") != {"keep_share": 1.0}:
                cache = system.new_cache(ROOM)
                with torch.inference_mode():
                    system.step(torch.arange(200).unsqueeze(0), cache)
                assert sum(cache_bytes(cache).values()) < baseline["cache"]


def reachable_bytes(root: object) -> int:
    """Bytes of every tensor storage that `root` keeps alive, found by the garbage collector."""
    stop = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    queue, seen, storages = [root], {id(root)}, {}
    while queue:
        one = queue.pop()
        if isinstance(one, torch.Tensor):
            if one.is_mkldnn:
                storages[id(one)] = opaque_bytes(one)
            elif not is_traceable_wrapper_subclass(one):  # its inner tensors are met by themselves
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, stop):
                seen.add(id(other))
                queue.append(other)
    return sum(storages.values())


@pytest.mark.parametrize("stack", [(), *((name,) for name in NAMES)])
def test_the_accounts_miss_no_tensor(stack: tuple[str, ...], open_stack) -> None:
    """Classes of bytes add up to every storage that the model, and the cache, keep alive."""
    with open_stack(*map(command_line, stack)) as opened, torch.inference_mode():
        system = opened.system
        cache = system.new_cache(ROOM)
        system.step(torch.arange(200).unsqueeze(0), cache)
        for token in range(3):
            system.step(torch.tensor([[token]]), cache)
        assert sum(cache_bytes(cache).values()) == reachable_bytes(cache)
        assert sum(weight_bytes(system.model).values()) == reachable_bytes(system.model)


def test_the_independent_count_finds_what_the_accounts_miss(open_stack) -> None:
    """Negative control: it is no second look at the same dictionaries."""
    with open_stack() as opened:
        model = opened.system.model
        held = sum(weight_bytes(model).values())
        model.forgotten = {"original": [torch.ones(1000)]}
        assert reachable_bytes(model) == held + 4000
        assert sum(weight_bytes(model).values()) == held
        del model.forgotten


@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(name: str, open_stack, baseline) -> None:
    """The baseline after a method has run, in the same process, is the baseline before."""
    with open_stack(command_line(name)) as opened:
        greedy(opened.system, new=8)
    with open_stack() as opened:
        assert greedy(opened.system) == baseline["tokens"]
        assert sum(weight_bytes(opened.system.model).values()) == baseline["weights"]


@pytest.mark.parametrize("name", NAMES)
def test_traits_are_honest_about_rollback(name: str, open_stack) -> None:
    """A stack that claims ROLLBACK crops exactly: the next logits equal those without the detour."""
    from compresskit.hf.cache import roll_back

    with open_stack(command_line(name)) as opened, torch.inference_mode():
        if Trait.ROLLBACK not in opened.traits:
            return
        system = opened.system
        ids = torch.tensor([system.tokenizer.encode(PROMPT)])
        straight, detour = system.new_cache(2 * ROOM), system.new_cache(2 * ROOM)
        system.step(ids, straight)
        system.step(ids, detour)
        system.step(torch.tensor([[5, 6, 7]]), detour)
        roll_back(detour, 3)
        probe = torch.tensor([[9]])
        torch.testing.assert_close(system.step(probe, detour), system.step(probe, straight))


@pytest.mark.parametrize("name", NAMES)
def test_traits_are_honest_about_padding(name: str, open_stack) -> None:
    """A stack that claims PADDED_BATCH gives a padded row the tokens it gives it alone."""
    from compresskit.decode import pad

    # The plain formula: fast products round differently by the number of rows, and a near tie of
    # two tokens would tell about that alone.
    with dispatch.forced("reference"), open_stack(command_line(name)) as opened:
        system = opened.system
        if Trait.PADDED_BATCH not in opened.traits:
            return
        rows = [system.tokenizer.encode(PROMPT), system.tokenizer.encode("One, two, three,")]
        tokens, mask = pad(rows, device=torch.device("cpu"))
        request = Request(tokens=tokens, mask=mask, max_new_tokens=12, sampling=SamplingSpec())
        together = answers(system, request)
        for row, ids in enumerate(rows):
            alone = Request(tokens=torch.tensor([ids]), max_new_tokens=12, sampling=SamplingSpec())
            assert [together[row]] == answers(system, alone)


def test_facts_use_names_that_metrics_know_or_say_what_they_are(open_stack) -> None:
    with open_stack("quant/int8") as opened:
        assert "effective_bits_per_parameter" in opened.system.facts
    assert "effective_bits_per_parameter" in metrics.METRICS


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_a_pair_is_accepted_or_refused_with_a_reason(first: str, second: str, open_stack) -> None:
    from compresskit import assets
    from compresskit.device import resolve
    from compresskit.engines.native import Native
    from compresskit.traits import INITIAL

    engine = Native()
    start = engine.traits(assets.tiny_path("target"), resolve("cpu")) | INITIAL
    placed = catalogue.place([spec_of(first), spec_of(second)])
    layers = stack.walk(placed, start)
    conflicts = [layer.conflict for layer in layers if layer.conflict]
    # The order typed by the user does not matter across stages.
    swapped = stack.walk(tuple(reversed(placed)), start)
    if placed[0].method.stage != placed[1].method.stage:
        assert [layer.conflict for layer in swapped] == [layer.conflict for layer in layers]
    if conflicts:
        assert any(word in conflicts[0] for word in ("needs", "both fill", "cannot work"))
