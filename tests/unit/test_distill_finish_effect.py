"""What the finish is for: a student that has learned with rounded weights loses less by rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from compresskit_kernels import dispatch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit import catalogue, text as texts
from compresskit.assets import tiny_path
from compresskit.device import resolve
from compresskit.distill import data, finish
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train
from compresskit.hf.tokenizer import HFTokenizer
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


def test_the_card_says_what_the_student_is_worth_as_it_will_be_stored(tmp_path: Any) -> None:
    """The rounded figures of the card again, from the saved folder packed by the method itself."""
    recipe = Recipe.decode(
        {
            "teacher": {"name": "tiny:draft"}, "student": "layers:keep=1", "data": "calibration",
            "held_out_rows": 4, "length": 32, "batch": 2, "budget": "6 steps", "check_every": 0.5,
            "finish": INT3, "finish_share": 0.34, "precision": "float32",
        },
        where="test",
    )  # fmt: skip
    card = train(recipe, tmp_path).card
    # Steps 0 and 3 do not round yet; the finish begins behind step 4.
    assert [(check.step, check.packed_nll is None) for check in card.checks] == [
        (0, True), (3, True), (4, False), (6, False),
    ]  # fmt: skip
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(tmp_path), ())
    held_out = data.load("calibration", None, tokenizer, length=32, held_out_rows=4).held_out
    last = card.checks[-1]
    with torch.no_grad():
        logits = saved(held_out.tokens, use_cache=False).logits[:, :-1].float()
    dense = functional.cross_entropy(logits.flatten(0, 1), held_out.tokens[:, 1:].flatten()).item()
    assert last.nll == pytest.approx(dense, rel=1e-5)
    # Fast products keep their weights in bfloat16; the reference computes with what is stored.
    with dispatch.forced("reference"):
        stored = nll_of_artefact(saved, held_out.tokens)
    assert last.packed_nll == pytest.approx(stored, rel=1e-5)
    # Control: three bits are felt, so one figure cannot pass for the other.
    assert last.packed_nll != pytest.approx(dense, rel=1e-3)
    assert f"stored as {INT3}: {last.packed_nll:.4f}" in (tmp_path / "README.md").read_text()
