"""One training: what it learns, what stops it, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit import card as cards
from compresskit.distill import checkpoint, school, train as training
from compresskit.distill.progress import Silent
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train
from compresskit.errors import InputError, RunError, SpecError, UsageError
from compresskit.hf.sources import silent
from compresskit.hf.student import sizes
from compresskit.measure.energy.counters import Null

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.card import Card, Check

RECIPE: dict[str, Any] = {
    "student": "layers:keep=2,choose=uniform",
    "data": "calibration",
    "held_out_rows": 8,
    "length": 32,
    "batch": 4,
    "rate": 0.003,
    "budget": "10 steps",
    "check_every": 0.5,
    "precision": "float32",
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.decode({**RECIPE, **changes}, where="test")


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(recipe(), folder, threads=1).card


def test_the_student_is_a_model_with_a_card(plain: tuple[Path, Card]) -> None:
    folder, card = plain
    assert cards.read(folder) == card
    assert card.predicted == card.size
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sizes.size_of_model(model) == card.size
    assert AutoTokenizer.from_pretrained(folder)("a story")["input_ids"]
    assert "Student of tiny" in (folder / "README.md").read_text()
    left = {path.name for path in folder.iterdir()}
    assert {checkpoint.FILE, "student.partial"}.isdisjoint(left)
    assert not [name for name in left if name.endswith(".partial")]


def test_it_learns_and_says_what_that_took(plain: tuple[Path, Card]) -> None:
    folder, card = plain
    before, middle, after = card.checks
    assert before.kl is not None
    assert middle.kl is not None
    assert after.kl is not None
    assert after.kl < middle.kl < before.kl
    assert after.nll < before.nll
    assert [check.step for check in card.checks] == [0, 5, 10]
    told = card.training
    assert (told.steps, told.tokens) == (10, 10 * 4 * 32)
    # Ten batches and the held-out rows; no row's last token is read.
    assert told.teacher_tokens == (10 * 4 + 8) * 31
    assert told.seconds > 0
    lines = curve(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["rate"] < max(line["rate"] for line in lines)
    assert set(lines[0]["parts"]) == {"forward_kl"}


def test_the_last_check_is_of_the_student_that_is_saved(plain: tuple[Path, Card]) -> None:
    """The held-out figures again, by transformers alone, from the folder."""
    folder, card = plain
    data = school.rows_of.load(
        "calibration", None, _Tokens(folder), length=32, held_out_rows=8
    )  # fmt: skip
    rows = data.held_out.tokens
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path).eval()
        for path in (folder, school.artefact.find_model(recipe().teacher).path)
    )
    with torch.no_grad():
        mine, theirs = (model(rows).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    labels = rows[:, 1:, None]
    assert card.checks[-1].nll == pytest.approx(-mine.gather(2, labels).mean().item(), rel=1e-5)
    kl = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
    assert card.checks[-1].kl == pytest.approx(kl, rel=1e-5)
    # Control: the student before training was another one.
    assert card.checks[0].kl != pytest.approx(kl, rel=0.1)


class _Tokens:
    def __init__(self, folder: Path) -> None:
        self.inner = AutoTokenizer.from_pretrained(folder)
        self.bos_id = self.inner.bos_token_id

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        found: list[int] = self.inner(text, add_special_tokens=special)["input_ids"]
        return found


def test_accumulated_batches_are_one_larger_batch(plain: tuple[Path, Card], tmp_path: Path) -> None:
    train(recipe(batch=1, accumulate=4), tmp_path)
    for mine, theirs in zip(curve(tmp_path), curve(plain[0]), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(
    plain: tuple[Path, Card], tmp_path: Path
) -> None:
    """Really two, over gloo; on CPUs torch launches them, since accelerate would want MPI."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "compresskit", "distill", "--out", str(tmp_path), "--device", "cpu",
        *(f"--{key.replace('_', '-')}={value}" for key, value in {**RECIPE, "batch": 2}.items()),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next:") == 1
    for mine, theirs in zip(curve(tmp_path), curve(plain[0]), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    card = cards.read(tmp_path)
    assert card is not None
    assert card.training.processes == 2
    assert card.training.teacher_tokens == plain[1].training.teacher_tokens


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    wild = recipe(rate=1e25, warmup=0.0, save_every="1 steps")
    with pytest.raises(RunError, match=r"the (loss|gradient) is .*of step \d+, is kept.*--rate"):
        train(wild, tmp_path)
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["step"] == len(curve(tmp_path))
    assert all(bool(value.isfinite().all()) for value in state["lesson"].values())


def test_a_loss_that_is_not_finite_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No checkpoint had been written yet"):
        train(recipe(rate=1e25, warmup=0.0), tmp_path)


def test_early_stop_keeps_the_best_student(tmp_path: Path) -> None:
    """A rate that spoils what was learned: the student is the best one, not the last."""
    looks: list[Check] = []

    class Looks(Silent):
        def look(self, check: Check) -> None:
            looks.append(check)

    card = train(
        recipe(rate=0.3, warmup=0.5, check_every=0.1, patience=2, budget="20 steps"),
        tmp_path, watcher=Looks(),
    ).card  # fmt: skip
    assert "no progress" in card.stopped
    assert card.training.steps < 20
    best = min(looks[:-1], key=lambda check: check.kl or 0.0)
    assert looks[-1] == best
    assert card.checks[-1] == best
    assert card.training.tokens > best.tokens


def test_a_budget_in_joules_asks_for_a_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.counters, "find", lambda *_: Null("nobody counts here"))
    with pytest.raises(UsageError, match=r"cannot count joules \(nobody counts here\)"):
        train(recipe(budget="5 J"), tmp_path)


def test_a_budget_in_seconds_ends(tmp_path: Path) -> None:
    card = train(recipe(budget="0.01 minutes", batch=1), tmp_path).card
    assert card.training.seconds >= 0.6
    assert card.checks[-1].step == card.training.steps


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"student": "vocabulary:size=400", "teacher_cache": "topk:k=4"},
            SpecError,
            "in its own tokens",
        ),
        ({"length": 5000}, InputError, "tokens at most"),
        ({"data": "missing.txt"}, InputError, "missing.txt"),
        ({"batch": 4000}, InputError, "4000 are needed for one step"),
        ({"loss": "hidden", "teacher_cache": "topk:k=4"}, SpecError, "no hidden states"),
        ({"loss": "jsd", "teacher_cache": "draws:n=4"}, SpecError, "not drawn"),
        ({"loss": "jsd + ce", "on_policy": 0.5}, SpecError, "own tokens are right"),
        ({"finish": "kv/int8"}, SpecError, "kv/int8"),
        # Heard before the first step, not when the finish begins.
        ({"finish": 'quant/int4:skip=["no"]'}, SpecError, "matches no linear layer"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        train(recipe(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_of_fewer_tokens(tmp_path: Path) -> None:
    """Its teacher is asked by the teacher's own numbers; whether it learns shows in its own text."""
    card = train(recipe(student="vocabulary:size=420", budget="20 steps"), tmp_path).card
    assert card.predicted == card.size
    assert [check.kl for check in card.checks] == [None] * len(card.checks)
    assert card.checks[-1].nll < card.checks[0].nll
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == 420
    text = "Once there was a cat."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_narrowed_teacher_says_what_it_says_among_the_students_tokens(tmp_path: Path) -> None:
    room = school.enrol(
        recipe(student="vocabulary:size=420"), training.devices.resolve("cpu"), processes=1,
        notify=lambda _: None, progress=silent,
    )  # fmt: skip
    assert isinstance(room.teacher, school.Narrowed)
    ids = room.teacher.ids
    batch = room.data.train.pick(torch.tensor([0, 3]))
    said = room.teacher.targets(batch)
    logits = said.head(said.hidden)
    whole = room.teacher.inner.model(ids[batch.tokens[:, :-1]]).logits.flatten(0, 1)
    torch.testing.assert_close(logits, whole[:, ids])
    names = room.draft.tokenizer.convert_ids_to_tokens(list(range(420)))
    theirs = AutoTokenizer.from_pretrained(room.source.path).convert_ids_to_tokens(ids.tolist())
    assert names == theirs
    with pytest.raises(SpecError, match="tokens that its teacher does not know"):
        school.narrowed.ids_in(room.draft.tokenizer, room.tokenizer.inner, 419)


def test_rows_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    save_file({"tokens": torch.full((32, 32), 60_000)}, tmp_path / "rows.safetensors")
    with pytest.raises(InputError, match="token 60000 is not of this model"):
        train(recipe(data=f"rows:{tmp_path / 'rows.safetensors'}"), tmp_path / "out")


def test_a_cached_teacher_teaches_as_the_model_does(
    plain: tuple[Path, Card], tmp_path: Path
) -> None:
    card = train(recipe(teacher_cache="topk:k=64"), tmp_path / "out", cache=tmp_path / "cache").card
    assert card.checks[-1].kl == pytest.approx(plain[1].checks[-1].kl, rel=0.02)
    assert "teacher_cache" in card.facts
    # A second student of the same cache: nothing is read anew but held-out text, and yet it is charged.
    again = train(
        recipe(teacher_cache="topk:k=64", rate=0.001), tmp_path / "more", cache=tmp_path / "cache"
    ).card
    assert again.training.teacher_tokens == card.training.teacher_tokens
    assert again.training.energy.kind == "unavailable"


def test_the_students_own_rows(tmp_path: Path) -> None:
    card = train(recipe(on_policy=0.5, budget="3 steps"), tmp_path).card
    wrote = card.facts["on_policy_of_first_process"]
    # Two of four rows in each of three steps, three quarters of 32 tokens each.
    assert isinstance(wrote, dict)
    assert wrote["tokens"] == 3 * 2 * 24


def test_sizes_are_told_before_any_weight_is_loaded() -> None:
    known = school.predict(recipe(), silent)
    assert known.student.parameters < known.teacher.parameters
    assert known.student.kv_bytes_per_token * 2 == known.teacher.kv_bytes_per_token
