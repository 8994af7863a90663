"""A student in its teacher's place: what is loaded, what it is judged by, and what its card costs."""

from __future__ import annotations

import gc
import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from compresskit import artefact, assets, card as cards, catalogue, compare, runner, store, sweep
from compresskit.card import Card, Check, Size
from compresskit.errors import Conflict, ModelError, UnknownName
from compresskit.hf import modules
from compresskit.hf.cache import cache_bytes
from compresskit.hf.sources import resolve
from compresskit.measure import environment
from compresskit.metrics import METRICS
from compresskit.metrics.payback import break_even_seconds
from compresskit.record import Record, Training, Unavailable
from compresskit.report import join
from compresskit.report.join import differences
from compresskit.spec import (
    EngineSpec,
    ModelSpec,
    ProtocolSpec,
    QualitySpec,
    RunSpec,
    SamplingSpec,
    WorkloadSpec,
)
from compresskit.system import Request

TEACHER = resolve("tiny")
STUDENT = resolve("tiny:draft")


@pytest.fixture(scope="module", autouse=True)
def unhurried():
    """Every run collects garbage many times, to measure in peace; no test here reads a clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


def spec_of(*methods, mode="eager", dtype="auto", **changes) -> RunSpec:
    return RunSpec(
        model=ModelSpec(dtype=dtype),
        device="cpu",
        engine=EngineSpec(mode=mode),
        stack=tuple(catalogue.parse_method(text) for text in methods),
        **changes,
    )


@contextmanager
def opened(*methods, **options):
    with artefact.opened(artefact.plan(spec_of(*methods, **options))) as found:
        yield found


def card_of(teacher_revision=TEACHER.revision, device="some CPU") -> Card:
    size = Size(parameters=853_120, weight_bytes=10, flops_per_token=1, kv_bytes_per_token=1)
    return Card(
        recipe={"student": "layers:keep=0.5"},
        recipe_digest="0123456789ab",
        teacher="tiny",
        teacher_revision=teacher_revision,
        teacher_baseline="tiny_trained",
        teacher_size=size,
        predicted=size,
        size=size,
        training=Training(
            seconds=600.0,
            energy=Unavailable(reason="no counter"),
            steps=10,
            tokens=1000,
            teacher_tokens=1000,
            device=device,
            threads=1,
            started_at="2026-01-01T00:00:00Z",
        ),
        checks=(Check(step=0, tokens=0, nll=3.0), Check(step=10, tokens=1000, nll=2.0, kl=0.3)),
        stopped="the budget is spent",
    )


@pytest.fixture
def folder(tmp_path):
    """The small tiny model with a card, as `compresskit distill` would leave it."""
    path = tmp_path / "student"
    shutil.copytree(assets.tiny_path("draft"), path)
    (path / cards.FILE).write_text(cards.dumps(card_of()), encoding="utf-8")
    return path


def answer(system, new=12) -> list[int]:
    ids = torch.tensor([system.tokenizer.encode("One, two, three, four,")])
    request = Request(tokens=ids, max_new_tokens=new, sampling=SamplingSpec())
    return [token for chunk in system.generate(request) for token in chunk.tokens[0].tolist()]


# Which model runs


def test_the_student_is_loaded_and_the_teacher_is_not(monkeypatch):
    paths = []
    load_model = artefact.load.load_model

    def watched(path, *rest):
        paths.append(path)
        return load_model(path, *rest)

    monkeypatch.setattr("compresskit.engines.native.load.load_model", watched)
    with opened("distill/student") as found:
        assert paths == [STUDENT.path]
        assert found.parameters == modules.parameter_count(found.system.model) < 853_120
        alone = answer(found.system)
    with artefact.opened(
        artefact.plan(spec_of().replace(model=ModelSpec(name="tiny:draft")))
    ) as own:
        assert answer(own.system) == alone
    # Negative control: the teacher says something else.
    with opened() as teacher:
        assert answer(teacher.system) != alone


def test_it_is_computed_in_the_type_of_the_run_not_in_its_own(tmp_path):
    path = tmp_path / "half"
    with opened("distill/student") as found:
        found.system.model.to(torch.float16).save_pretrained(path)
        found.system.tokenizer.inner.save_pretrained(path)
    assert artefact.load.checkpoint_dtype(artefact.load.read_config(path)) == "float16"
    with opened(f"distill/student:path={path}") as found:
        assert found.system.model.dtype is torch.float32
    with opened(f"distill/student:path={path}", dtype="bfloat16") as found:
        assert found.system.model.dtype is torch.bfloat16


@pytest.fixture(scope="module")
def plain():
    """The student alone: its tokens, the bytes of its weights and of a cache."""
    with opened("distill/student") as found:
        return measured(found.system)


def measured(system) -> tuple[list[int], int, int]:
    cache = system.new_cache(64)
    with torch.inference_mode():
        system.step(torch.arange(40).unsqueeze(0), cache)
    held = sum(cache_bytes(cache).values())
    return answer(system), modules.weight_bytes(system.model), held


@pytest.mark.parametrize(
    ("rest", "smaller"),
    [
        (("quant/int4:group=32",), ("weights",)),
        (("kv/int8",), ("cache",)),
        (("speculative/ngram",), ()),
        (("quant/int4:group=32", "kv/int8", "speculative/ngram"), ("weights", "cache")),
    ],
    ids=["quant", "kv", "speculative", "all"],
)
def test_it_goes_under_what_its_teacher_goes_under(rest, smaller, plain):
    with opened("distill/student", *rest) as found:
        tokens, weights, cache = measured(found.system)
        assert found.system.facts["student"]["name"] == "tiny:draft"
    assert (weights < plain[1], cache < plain[2]) == ("weights" in smaller, "cache" in smaller)
    if rest == ("speculative/ngram",):
        assert tokens == plain[0]


@pytest.mark.parametrize(("mode", "dtype"), [("compiled", "float32"), ("prepacked", "bfloat16")])
def test_every_mode_gives_the_tokens_of_the_eager_student(mode, dtype):
    with opened("distill/student", mode=mode, dtype=dtype) as found:
        fast = answer(found.system, new=6)
    with opened("distill/student", dtype=dtype) as found:
        assert answer(found.system, new=6) == fast


def test_order_of_the_stack_does_not_matter():
    one = artefact.plan(spec_of("quant/int8", "distill/student"))
    with artefact.opened(one) as found:
        assert found.parameters < 853_120


# What is refused before weights are loaded


def test_two_students_cannot_stand_in_for_one_teacher():
    plan = artefact.plan(spec_of("distill/student", "distill/student:path=tiny"))
    with pytest.raises(Conflict, match="both fill the 'model' stage"):
        plan.check()


def test_a_student_of_other_weights_is_refused_by_its_card(folder):
    (folder / cards.FILE).write_text(cards.dumps(card_of("sha256:other")), encoding="utf-8")
    plan = artefact.plan(spec_of(f"distill/student:path={folder}"))
    with pytest.raises(Conflict, match="sha256:other") as refused:
        plan.check()
    assert TEACHER.revision in str(refused.value)
    record = runner.run(spec_of(f"distill/student:path={folder}"))
    assert record.status == "skipped"
    # The card of the right teacher is accepted.
    (folder / cards.FILE).write_text(cards.dumps(card_of()), encoding="utf-8")
    plan.check()


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("./no/such/folder", ModelError, "no file or folder"),
        ("tini:draft", UnknownName, "tiny:draft"),
    ],
)
def test_a_student_that_is_not_there_is_a_wrong_request(path, error, words):
    with pytest.raises(error, match=words):
        runner.run(spec_of(f"distill/student:path={path}"))


def test_a_folder_without_a_model_and_a_broken_card_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        artefact.plan(spec_of(f"distill/student:path={tmp_path / 'empty'}"))
    (folder / cards.FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="not the card of a student"):
        artefact.plan(spec_of(f"distill/student:path={folder}")).check()


def test_a_draft_larger_than_the_student_is_refused():
    """What comes after is checked against the student, not against the teacher."""
    stack = ("speculative/draft_model:model=tiny",)
    artefact.plan(spec_of(*stack)).check()
    with pytest.raises(Conflict, match="larger than tiny:draft"):
        artefact.plan(spec_of("distill/student", *stack)).check()


def test_a_helper_is_no_place_for_a_student():
    stack = 'speculative/draft_model:model=tiny:draft,methods=["distill/student"]'
    with pytest.raises(Conflict, match=r"Name tiny:draft there itself"), opened(stack):
        pass


def test_a_prompt_longer_than_the_students_context_is_found_early(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    spec = spec_of(f"distill/student:path={folder}", workload=WorkloadSpec(prompt_tokens=100))
    with pytest.raises(sweep.SpecError, match="context of"):
        sweep.preflight([spec], lambda *_: None)
    sweep.preflight([spec.baseline()], lambda *_: None)


# What a record says


@pytest.fixture(scope="module")
def small():
    return {
        "workload": WorkloadSpec(prompt_tokens=16, new_tokens=4),
        "protocol": ProtocolSpec(passes=("throughput", "memory", "quality"), repeats=1, warmups=0),
        "quality": QualitySpec(prefill=16, continuation=8, windows=4, greedy_prompts=1),
    }


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory) -> tuple[Record, Record]:
    """Teacher and student, run; the student without a card, as a vendor's model is."""
    path = tmp_path_factory.mktemp("bare") / "student"
    shutil.copytree(assets.tiny_path("draft"), path, ignore=shutil.ignore_patterns(cards.FILE))
    student = spec_of(f"distill/student:path={path}", **small)
    return runner.run(spec_of(**small)), runner.run(student)


def test_a_record_of_a_student_is_compared_with_its_teacher(pair, tmp_path):
    teacher, student = pair
    assert (teacher.status, student.status) == ("ok", "ok"), student.reason
    assert student.quality.fidelity.kl.mean > 0.01
    assert student.quality.fidelity.baseline_digest == teacher.digest
    assert student.model.revision == teacher.model.revision
    assert student.model.parameters < teacher.model.parameters
    assert differences(student, teacher) == []
    told = student.facts["student"]
    assert told["revision"] == STUDENT.revision
    assert told["teacher_parameters"] == teacher.model.parameters
    bits = METRICS["bits_per_teacher_parameter"].value(student).value
    assert bits == pytest.approx(32 * student.model.parameters / teacher.model.parameters, rel=0.01)
    assert METRICS["bits_per_teacher_parameter"].value(teacher).value == pytest.approx(32, rel=0.01)
    assert store.load(store.save(student, tmp_path)) == student
    row = join.of(pair).rows[1]
    assert row.baseline.record is teacher


def test_what_nobody_knows_is_no_zero(pair):
    teacher, student = pair
    for key in ("training_s", "training_tokens", "training_energy_j"):
        assert "no student" in METRICS[key].value(teacher).reason
        assert "without a card" in METRICS[key].value(student).reason
    assert "without a card" in break_even_seconds(student, teacher).reason


def test_the_card_brings_the_cost_into_the_record(folder, small, pair, tmp_path):
    record = runner.run(spec_of(f"distill/student:path={folder}", **small))
    assert record.setup.training == card_of().training
    assert METRICS["training_s"].value(record).value == 600
    told = record.facts["student"]
    assert (told["recipe_digest"], told["checks"]) == ("0123456789ab", 2)
    assert told["last_check"]["kl"] == 0.3
    assert "trained on some CPU" in break_even_seconds(record, pair[0]).reason
    assert store.load(store.save(record, tmp_path)) == record


def test_a_folder_taught_anew_is_run_again_and_not_compared(folder, small, tmp_path):
    spec = spec_of(f"distill/student:path={folder}", **small)
    record = runner.run(spec)
    store.save(record, tmp_path)
    here = environment.describe()
    assert sweep._kept(spec, tmp_path, here) == record
    again = record.model_copy(
        update={"facts": {**record.facts, "student": {"revision": "sha256:before"}}}
    )
    store.save(again, tmp_path)
    assert sweep._kept(spec, tmp_path, here) is None
    (refusal,) = compare.compare([again], [record]).refused
    assert "student differs" in refusal.reason


def test_a_student_larger_than_its_teacher_runs_with_a_warning():
    spec = spec_of("distill/student:path=tiny").replace(model=ModelSpec(name="tiny:draft"))
    with artefact.opened(artefact.plan(spec)) as found:
        assert any("takes more bytes" in word for word in found.system.facts["warnings"])
    with opened("distill/student") as found:
        assert not any("takes more bytes" in w for w in found.system.facts.get("warnings", ()))


def test_another_tokenizer_leaves_bits_per_byte(folder, small, pair):
    """A token more, as a trimmed vocabulary has some fewer: the ids mean something else."""
    with opened(f"distill/student:path={folder}") as found:
        found.system.tokenizer.inner.add_tokens(["<another>"])
        found.system.tokenizer.inner.save_pretrained(folder)
    record = runner.run(spec_of(f"distill/student:path={folder}", **small))
    assert record.status == "ok", record.reason
    assert record.quality.fidelity is None
    assert record.quality.greedy is None
    assert record.quality.likelihood.bits_per_byte > 0
    assert "another tokenizer" in METRICS["kl_mean_nats"].value(record).reason
    assert differences(record, pair[0]) == ["tokenizer"]
