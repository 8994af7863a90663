"""What goes with a cache method and what does not: each rule as the refusal people get.

A stack is refused before any weight is loaded, by its traits; what only a request can tell (a padded
batch) is refused while running. Whatever is not refused is right: the last test runs it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from compresskit import artefact as artefacts, assets, catalogue, stack
from compresskit.cli.app import app
from compresskit.decode import pad
from compresskit.errors import Conflict, MissingExtra, RunError
from compresskit.hf.cache import cache_bytes
from compresskit.hf.step import eager_step
from compresskit.method import Context
from compresskit.spec import EngineSpec, MethodSpec, ModelSpec, RunSpec, SamplingSpec
from compresskit.system import Request
from compresskit.traits import Trait

KV = [name for name in catalogue.method_names() if name.startswith("kv/")]
ON_CPU = [name for name in KV if name != "kv/offload"]
PARTNERS = {
    "quant": "quant/int8",
    "speculative": "speculative/ngram",
    "reuse": "reuse/prefix_block",
}
"""One method of each other family; those of a family ask for the same traits."""
PROMPT = assets.text_path("heldout").read_text(encoding="utf-8")[:300]
NEW = 12


@pytest.fixture(scope="module")
def models(open_stack):
    """The tiny model, dense and with quantised weights; cache methods leave both as they are."""
    with open_stack() as dense, open_stack(PARTNERS["quant"]) as quantised:
        yield {"": dense.system, PARTNERS["quant"]: quantised.system}


CONTEXT = Context(
    load=None,
    calibration=lambda text, count: [3 + index % 250 for index in range(count)],
    seed=0,
    dtype="float32",
)


def built(models, *names):
    """The system with the methods on it; skip where a library is missing or layers do not fit."""
    weights = next((name for name in names if name in models), "")
    placed = catalogue.place([spec_of(name) for name in names if name != weights])
    try:
        return stack.build(placed, models[weights], CONTEXT)
    except (MissingExtra, Conflict) as reason:
        pytest.skip(str(reason))


def spec_of(name):
    return catalogue.normalise(MethodSpec(name=name, params=dict(catalogue.get(name).example)))


def method_of(name):
    return catalogue.decode(name, spec_of(name).params)


def run_spec(*names, mode="eager"):
    return RunSpec(
        model=ModelSpec(name="tiny"),
        device="cpu",
        engine=EngineSpec(mode=mode),
        stack=tuple(spec_of(name) for name in names),
    )


def walked(*names, mode="eager"):
    plan = artefacts.plan(run_spec(*names, mode=mode))
    return stack.walk(plan.methods, plan.start_traits(), last=plan.engine.requires(), mode=mode)


def conflict(*names, mode="eager"):
    """Why the stack is refused without loading weights, or None."""
    return next((layer.conflict for layer in walked(*names, mode=mode) if layer.conflict), None)


def traits(*names):
    return walked(*names)[-1].traits


def evicting(name):
    return Trait.FULL_CONTEXT in method_of(name).effects().removes


# The sentence that people read


def test_explain_prints_the_conflict_and_loads_nothing():
    arguments = ["explain", "--device", "cpu", "--json"]
    stack_of = ["--method", "kv/sink_window", "--method", "speculative/ngram"]
    result = CliRunner().invoke(app, [*arguments, *stack_of])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["conflict"]
    assert said == "speculative/ngram needs 'rollback', which kv/sink_window does not leave."
    assert said == conflict("kv/sink_window", "speculative/ngram")


# Rollback


@pytest.mark.parametrize("name", ON_CPU)
def test_speculation_runs_on_caches_that_roll_back_and_on_no_others(name):
    said = conflict(name, "speculative/ngram")
    if Trait.ROLLBACK in method_of(name).effects().removes:
        assert said == f"speculative/ngram needs 'rollback', which {name} does not leave."
    else:
        assert said is None


def test_both_kinds_exist():
    """Neither branch above is empty: some evict, some are exact."""
    assert conflict("kv/int8", "speculative/ngram") is None
    assert all(conflict(name, "speculative/ngram") for name in ON_CPU if evicting(name))
    assert sum(map(evicting, ON_CPU)) >= 2


# Two cache methods


@pytest.mark.parametrize("first", ON_CPU)
def test_two_cache_methods_are_refused(first):
    for second in ON_CPU:
        said = conflict(first, second)
        assert said is not None, second
        assert said.startswith(f"{second} needs ")
        assert said.endswith(f"which {first} does not leave.")


# Compiled steps


@pytest.mark.parametrize("name", ON_CPU)
def test_only_the_static_cache_compiles(name):
    said = conflict(name, mode="compiled")
    if name == "kv/static":
        assert said is None
    else:
        assert said == f"mode 'compiled' needs 'static_shapes', which {name} does not leave."


# Devices


def test_offloading_is_refused_without_a_gpu_before_weights_load():
    said = conflict("kv/offload")
    assert said == "kv/offload needs 'cuda', which the model, engine or device does not have."


# Quantised weights


@pytest.mark.parametrize("name", ON_CPU)
def test_quantised_weights_go_with_caches_that_need_no_float_ones(name):
    for mode in ("eager", "prepacked"):
        said = conflict("quant/int8", name, mode=mode)
        if Trait.FLOAT_WEIGHTS in method_of(name).effects().requires:
            assert said == f"{name} needs 'float_weights', which quant/int8 does not leave."
        else:
            assert said is None


# Padding


@pytest.mark.parametrize("name", ON_CPU)
def test_a_padded_batch_is_refused_where_padding_would_count(name, models):
    tokens, mask = pad([[5, 6, 7, 8, 9, 10], [11, 12]], device=torch.device("cpu"))
    system = built(models, name)
    request = Request(tokens, 3, SamplingSpec(), mask=mask)
    if Trait.PADDED_BATCH in traits(name):
        assert len(list(system.generate(request))) == 3
        return
    with pytest.raises(RunError, match="padded batch"):
        list(system.generate(request))


# Sliding windows


@pytest.mark.parametrize("name", ON_CPU)
def test_sliding_layers_stay_as_the_model_made_them(name, lab):
    method = method_of(name)
    if "group" in type(method).model_fields:
        method = method.model_copy(update={"group": 8})  # the head dimension of this model
    plain = lab.system("gemma3_text")
    # A model of our own: calibration wants gradients, and other tests share the lab's.
    model = copy.deepcopy(plain.model)
    words = SimpleNamespace(encode=lambda text, special=True: [5], bos_id=None)
    try:
        system = method.apply(
            replace(plain, model=model, step=eager_step(model), tokenizer=words), CONTEXT
        )
    except MissingExtra as missing:
        pytest.skip(str(missing))
    cache = system.new_cache(48)
    stock = [type(layer).__module__ == "transformers.cache_utils" for layer in cache.layers]
    if name != "kv/none":  # which has the text in place of layers
        assert list(cache.is_sliding) == [True, False, True]
        assert stock[0] and stock[2]
    # And the stack runs beyond the window of 16.
    assert len(list(system.generate(lab.request(lab.prompt(30), 6)))) == 6


# Beams


@pytest.mark.parametrize("name", ON_CPU)
@torch.inference_mode()
def test_reordered_rows_go_on_as_their_beams(name, models):
    """Beam search moves rows of the batch: all that a layer keeps must move along."""
    with torch.inference_mode(False):
        system = built(models, name)
    ids = system.tokenizer.encode(PROMPT)
    batch = torch.tensor([ids[:40], ids[40:80]])
    straight, swapped = system.new_cache(64), system.new_cache(64)
    for cache in (straight, swapped):
        system.step(batch, cache)
        for token in range(3, 6):
            system.step(torch.tensor([[token], [token + 3]]), cache)
    order = torch.tensor([1, 0])
    swapped.reorder_cache(order)
    probe = torch.tensor([[9], [20]])
    found = system.step(probe[order], swapped)[order]
    # Negative control: without the reordering the rows are another text's.
    wrong = system.new_cache(64)
    system.step(batch[order], wrong)
    expected, other = system.step(probe, straight), system.step(probe, wrong)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 1e-2


# Everything


class Decoded(NamedTuple):
    """Greedy tokens, and the bytes of the caches at the end."""

    tokens: list[int]
    held: int


def decoded(models, *names):
    system, caches = built(models, *names), []

    def noting(capacity):
        caches.append(system.new_cache(capacity))
        return caches[-1]

    ids = torch.tensor([system.tokenizer.encode(PROMPT)])
    watched = replace(system, new_cache=noting)
    tokens = [
        token
        for chunk in watched.generate(Request(ids, NEW, SamplingSpec()))
        for token in chunk.tokens[0, : int(chunk.lengths[0])].tolist()
    ]
    return Decoded(tokens, sum(sum(cache_bytes(cache).values()) for cache in caches))


def partners():
    families = {name.partition("/")[0] for name in catalogue.method_names()} - {"kv"}
    for family in sorted(families):
        first = next(n for n in catalogue.method_names() if n.startswith(f"{family}/"))
        yield PARTNERS.get(family, first)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("other", list(partners()))
def test_a_pair_runs_and_is_right_or_is_refused_first(name, other, models):
    """Right: exact methods change nothing, and the cache holds what it holds without the other."""
    pair = sorted((name, other), key=lambda one: one.startswith("kv/"))
    if said := conflict(*pair):
        with pytest.raises(Conflict) as refused:
            artefacts.plan(run_spec(*pair)).check()
        assert str(refused.value) == said
        return
    together = decoded(models, *pair)
    by_cache, by_other = decoded(models, name), decoded(models, other)
    assert len(together.tokens) == NEW
    exact = [Trait.LOSSLESS in traits(one) for one in (name, other)]
    assert (Trait.LOSSLESS in traits(*pair)) == all(exact)
    if exact[0]:
        assert together.tokens == by_other.tokens
    if exact[1]:
        assert together.tokens == by_cache.tokens
    if not other.startswith("reuse/"):  # which holds what it has stored as well
        # A draft that was taken back may leave an allocation a few rows larger.
        assert together.held == pytest.approx(by_cache.held, rel=0.15)


def test_the_comparison_would_see_another_cache(models):
    """Negative control: caches that differ give other tokens or other bytes."""
    exact = decoded(models, "kv/dynamic")
    for name in ("kv/sink_window", "kv/none", "kv/hf_fp8"):
        tokens, held = decoded(models, name)
        assert tokens != exact.tokens or held != pytest.approx(exact.held, rel=0.15)
