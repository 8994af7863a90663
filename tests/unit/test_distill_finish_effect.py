"""What the finish is for: a student that has learned with rounded weights loses less by rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit import catalogue, text as texts
from compresskit.assets import tiny_path
from compresskit.device import resolve
from compresskit.distill import finish
from compresskit.method import Context
from compresskit.system import System

INT3 = "quant/intn:bits=3"
STEPS, BATCH, LENGTH, RATE = 16, 4, 128, 1e-3


def load(role: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path(role), dtype=torch.float32).eval()


def rows(source: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path("target"))
    ids = tokenizer._tokenizer.encode(texts.load(source).content, add_special_tokens=False).ids
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def nll_of_artefact(model: Any, held_out: torch.Tensor) -> float:
    """Nats a token once every layer is packed in three bits."""
    spec = catalogue.parse_method(INT3)
    nothing: dict[str, Any] = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
    context: Any = Context(load=None, calibration=None, seed=0, dtype="float32")  # type: ignore[arg-type]
    system = System(model=model, device=resolve("cpu"), context=LENGTH, **nothing)
    packed = catalogue.decode(spec.name, spec.params).apply(system, context).model
    with torch.no_grad():
        logits = packed(held_out, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()


@pytest.fixture(scope="module")
def lesson() -> Any:
    """Teach the shipped draft a little more; return its loss once packed in three bits."""
    torch.set_num_threads(1)
    teacher, text, held_out = load("target"), rows("calibration"), rows("embedded")[:24]

    @functools.cache
    def taught(method: str | None) -> float:
        model = load("draft")
        if method is not None:
            finish.begin(model, method)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            batch = text[torch.randint(len(text), (BATCH,), generator=generator)]
            with torch.no_grad():
                target = teacher(batch, use_cache=False).logits.log_softmax(-1)
            guess = model(batch, use_cache=False).logits.log_softmax(-1)
            apart = functional.kl_div(guess, target, log_target=True, reduction="sum")
            (apart / batch.numel()).backward()
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.step()
            optimizer.zero_grad()
        finish.end(model)
        return nll_of_artefact(model, held_out)

    return taught


def test_at_equal_steps_it_loses_less_by_being_packed(lesson: Any) -> None:
    # Of five seeds, see benchmarks/distill_seeds.py.
    assert lesson(INT3) < lesson(None) - 0.05


def test_getting_used_to_another_rounding_does_not_help(lesson: Any) -> None:
    # The control: everything is the same but for the grid, which is too fine to feel.
    assert lesson("quant/int8") > lesson(INT3) + 0.05
