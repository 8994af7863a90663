"""The compiled mode on real hardware: tokens of the eager loop, one graph a shape, none skipped."""

import pytest
import torch

from compresskit.artefact import opened, plan
from compresskit.decode import pad
from compresskit.spec import RunSpec
from compresskit.system import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # in inductor
]
STACKS = (
    (),
    ("quant/int8",),
    ("quant/int4",),
    ("quant/fp8",),
    ("quant/int8_dynamic",),
    ("speculative/oracle",),
)


def artefact(mode, stack, model="tiny"):
    methods = [{"name": name, "params": {}} for name in stack]
    return opened(
        plan(
            RunSpec().replace(
                model={"name": model, "dtype": "float32"},
                device="cuda",
                engine={"mode": mode},
                stack=methods,
            )
        )
    )


def greedy(system, text, new=40):
    ids = [system.tokenizer.encode(text)]
    tokens, mask = pad(ids, device=system.device.torch)
    request = Request(tokens, new, RunSpec().sampling, mask=mask)
    return [t for chunk in system.generate(request) for t in chunk.tokens[0].tolist()][:new]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "+".join(stack) or "dense")
def test_compiled_tokens_are_the_eager_ones_and_nothing_is_built_twice(stack):
    from torch._dynamo.utils import counters

    texts = ["The red fox runs over the hill. " * 2, "Seven boats lie in the harbour. " * 2]
    with artefact("eager", stack) as one:
        want = [greedy(one.system, text) for text in texts]
    with artefact("compiled", stack) as other:
        assert greedy(other.system, texts[0]) == want[0]
        built = counters["stats"]["unique_graphs"]
        skipped = counters["inductor"]["cudagraph_skips"]
        assert [greedy(other.system, text) for text in (*texts, texts[0])] == [*want, want[0]]
        assert counters["stats"]["unique_graphs"] == built
        assert counters["inductor"]["cudagraph_skips"] == skipped == 0


def test_random_weights_are_drawn_on_the_device():
    with artefact("eager", (), "random:llama-3.2-1b:layers=2") as found:
        weights = list(found.system.model.parameters())
        assert {one.device.type for one in weights} == {"cuda"}
        assert found.system.synthetic == "synthetic weights"
