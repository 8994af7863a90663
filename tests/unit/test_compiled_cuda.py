"""What only a GPU reaches in the compiled mode, with torch.compile played: how it is asked, and what is
done around it. That a graph of the GPU then computes the same is for `tests/gpu`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compresskit.hf import compiled


class Compiler:
    """In place of `torch.compile`: keeps what it was asked and runs the function as it is."""

    def __init__(self, monkeypatch):
        self.options = None
        self.shapes: list[tuple[int, ...]] = []
        self.settings: list[tuple[int, bool]] = []
        monkeypatch.setattr(torch, "compile", self)

    def __call__(self, forward, **options):
        self.options = options

        def run(tokens, *others):
            import torch._dynamo.config as dynamo
            import torch._inductor.config as inductor

            self.shapes.append(tuple(tokens.shape))
            self.settings.append((dynamo.recompile_limit, inductor.freezing))
            return forward(tokens, *others)

        return run


@pytest.fixture
def compiler(monkeypatch):
    # Nothing is learned here, and a model that another test decoded with holds tensors of inference mode.
    with torch.no_grad():
        yield Compiler(monkeypatch)


def on_cuda(system, widths=(1,)):
    """The system as `compile_decode` makes it for a GPU, its tensors where they are."""
    device = SimpleNamespace(kind="cuda", torch=system.device.torch)
    return compiled.compile_decode(replace(system, device=device, widths=widths))


def test_the_gpu_is_asked_for_graphs_without_breaks(lab, compiler):
    finished = on_cuda(lab.system("llama"))
    assert compiler.options == {"dynamic": False, "fullgraph": True, "mode": "reduce-overhead"}
    assert finished.kernels["decode_step"] == "torch.compile (CUDA graphs)"
    assert finished.fixed_widths


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_tokens_are_those_of_the_eager_loop(architecture, lab, compiler):
    plain = lab.system(architecture)
    request = lab.request(lab.prompt(11), 9)
    want = lab.rows(plain.generate(request))
    finished = on_cuda(plain)
    assert lab.rows(finished.generate(request)) == want
    # The prompt is eager; every token after the first goes through the graph, one shape for all.
    assert compiler.shapes == [(1, 1)] * 8


def test_constants_are_folded_on_the_cpu_only(lab, compiler):
    finished = on_cuda(lab.system("llama"))
    list(finished.generate(lab.request(lab.prompt(5), 4)))
    import torch._dynamo.config as dynamo

    (limit, freezing), *later = compiler.settings
    assert (limit, freezing) == (compiled.GRAPHS, False)
    assert all(settings == (dynamo.recompile_limit, False) for settings in later)


def where(cache):
    """Addresses of all tensors of a cache that has been filled."""
    names = ("keys", "values", "cumulative_length")
    return [getattr(layer, name).data_ptr() for layer in cache.layers for name in names]


def filled(finished, lab, capacity=20, rows=1):
    cache = finished.new_cache(capacity)
    finished.step(lab.prompt(6).repeat(rows, 1), cache)
    return cache


def test_a_cache_lies_where_the_last_one_lay(lab, compiler):
    """A graph that was recorded once reads and writes there; elsewhere it would be recorded anew."""
    finished = on_cuda(lab.system("llama"))
    first = filled(finished, lab)
    places = where(first)
    beside = filled(finished, lab)  # while the first is alive
    assert not set(where(beside)) & set(places)
    del first
    # Between two requests other memory comes and goes, as that of a prompt does.
    other = [torch.zeros(4096) for _ in range(20)]
    assert where(filled(finished, lab)) == places
    assert other
    del beside


def test_other_shapes_have_places_of_their_own(lab, compiler):
    finished = on_cuda(lab.system("llama"))
    places = where(filled(finished, lab))
    two = where(filled(finished, lab, rows=2))
    longer = where(filled(finished, lab, capacity=200))
    assert not set(places) & set(two)
    assert not set(places) & set(longer)
    assert where(filled(finished, lab)) == places
    assert where(filled(finished, lab, rows=2)) == two


def test_what_an_earlier_request_left_is_not_seen(lab, compiler):
    plain = lab.system("llama")
    finished = on_cuda(plain)
    long, short = lab.request(lab.prompt(60, seed=1), 30), lab.request(lab.prompt(7, seed=2), 12)
    for request in (long, short, long):
        assert lab.rows(finished.generate(request)) == lab.rows(plain.generate(request))
    # A graph that took the numbers of the first cache for constants would answer as it did.
    assert lab.rows(finished.generate(long)) != lab.rows(finished.generate(short))


def test_the_cache_starts_empty_and_takes_tokens_back(lab, compiler):
    finished = on_cuda(lab.system("llama"))
    cache = filled(finished, lab)
    del cache
    cache = filled(finished, lab)
    assert int(cache.get_seq_length()) == 6
    for layer in cache.layers:
        layer.crop(-2)
    assert int(cache.get_seq_length()) == 4


def test_tensors_of_the_cache_keep_the_mark_that_graphs_need(lab, compiler):
    """transformers marks them as lying at one address; only frozen weights on the CPU mind that."""
    finished = on_cuda(lab.system("llama"))
    cache = finished.new_cache(20)
    prompt = lab.prompt(6)
    finished.step(prompt, cache)
    marked = "_dynamo_static_input_type"
    tensors = [v for v in vars(cache.layers[0]).values() if isinstance(v, torch.Tensor)]
    assert any(hasattr(tensor, marked) for tensor in tensors)
    on_cpu = compiled.compile_decode(lab.system("llama"))
    cache = on_cpu.new_cache(20)
    on_cpu.step(prompt, cache)
    tensors = [v for v in vars(cache.layers[0]).values() if isinstance(v, torch.Tensor)]
    assert not any(hasattr(tensor, marked) for tensor in tensors)
