"""Which records are compared, and which are refused."""

from __future__ import annotations

import pytest

from compresskit import store
from compresskit.compare import compare, load
from compresskit.errors import RecordError, UsageError

PARTS = [
    ("model", {"revision": "other"}, "model revision differs: base"),
    ("model", {"dtype": "float16"}, "dtype differs"),
    ("model", {"tokenizer_sha256": "2" * 64}, "tokenizer differs"),
    ("device", {"kind": "cuda"}, "kind of device differs"),
    ("prompts", {"sha256": "3" * 64}, "prompt text differs"),
]


@pytest.mark.parametrize(("part", "change", "says"), PARTS)
def test_unlike_things_are_refused_with_both_values(bench, part, change, says):
    base = bench.golden("int8")
    new = base.model_copy(update={part: getattr(base, part).model_copy(update=change)})
    reason = bench.refusal(base, new)
    assert says in reason
    value = next(iter(change.values()))
    assert repr(value) in reason


def test_other_prompts_are_refused(bench):
    base, new = (
        bench.golden("int8").model_copy(update={"prompts_sha256": digit * 64}) for digit in "12"
    )
    assert bench.refusal(base, new).startswith("prompts differs: base '111")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol_id": "other"}, "quality protocol differs"),
        ({"text": None}, "quality text differs"),
    ],
)
def test_quality_of_another_protocol_or_text_is_refused(bench, change, says):
    base = bench.golden("int8")
    likelihood = base.quality.likelihood
    if "text" in change:
        change = {"text": likelihood.text.model_copy(update={"sha256": "5" * 64})}
    quality = base.quality.model_copy(update={"likelihood": likelihood.model_copy(update=change)})
    assert says in bench.refusal(base, base.model_copy(update={"quality": quality}))


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("workload", {"prompt_tokens": 33}, "workload.prompt_tokens differs: base 32, new 33"),
        ("sampling", {"temperature": 0.5}, "sampling.temperature differs: base 0.0, new 0.5"),
        ("protocol", {"warmups": 2}, "protocol.warmups differs: base 1, new 2"),
        ("quality", {"windows": 4}, "quality.windows differs"),
        ("model", {"name": "another"}, "model differs: base 'synthetic', new 'another'"),
    ],
)
def test_as_given_the_rest_of_the_spec_must_agree(bench, part, change, says):
    base = bench.golden("dense")
    document = getattr(base.spec, part).model_dump(mode="json") | change
    spec = base.spec.replace(**{part: document})
    new = base.model_copy(update={"spec": spec, "digest": spec.digest()})
    assert says in bench.refusal(base, new)


def test_the_stack_may_differ_as_given(bench):
    found = compare([bench.golden("dense")], [bench.golden("int8")])
    assert not found.refused
    assert found.rows[0].label == "quant/int8 against dense"


def test_an_invalid_record_is_refused_on_either_side(bench):
    sound, short = bench.golden("int8"), bench.golden("short")
    assert "the new record is INVALID (osl_mismatch" in bench.refusal(sound, short)
    assert "the base record is INVALID" in bench.refusal(short, sound)


def test_what_an_old_record_does_not_state_is_not_held_against_it(bench):
    base = bench.golden("int8").model_copy(update={"prompts": None, "prompts_sha256": None})
    assert not compare([base], [bench.golden("int8")]).refused


def test_records_are_matched_by_digest_and_the_rest_is_listed(bench):
    dense, int8, ngram = (bench.golden(name) for name in ("dense", "int8", "ngram"))
    found = compare([dense, int8], [ngram, int8])
    assert [(row.base.digest, row.new.digest) for row in found.rows] == [(int8.digest,) * 2]
    assert [one.digest for one in found.only_base] == [dense.digest]
    assert [one.digest for one in found.only_new] == [ngram.digest]


def test_among_several_records_of_one_spec_the_one_of_this_machine_is_taken(bench):
    here = bench.golden("int8")
    elsewhere = here.model_copy(
        update={
            "device": here.device.model_copy(update={"name": "Another CPU"}),
            "started_at": "2999-01-01T00:00:00Z",
        }
    )
    found = compare([elsewhere, here], [here, bench.golden("dense")])
    assert found.rows[0].base is here
    assert "2 base records of quant/int8" in found.notes[0]


def test_a_run_that_fails_now_is_worse_and_one_that_runs_again_is_better(bench):
    ok = bench.golden("int8")
    failed = ok.model_copy(update={"status": "failed", "reason": "out of memory"})
    outcomes = bench.judge(ok, failed)
    assert list(outcomes) == ["status"]
    assert outcomes["status"].word == "worse"
    assert outcomes["status"].reason == "out of memory"
    assert bench.judge(failed, ok)["status"].word == "better"
    assert bench.judge(failed, failed)["status"].word == "same"


def test_a_tolerance_for_an_unknown_metric_is_bad_usage():
    with pytest.raises(UsageError, match="no tolerance for 'speed'"):
        compare([], [], tolerances={"speed": 1.0})


def test_loading_refuses_what_a_gate_must_not_overlook(bench, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none")
    with pytest.raises(UsageError, match="no record in"):
        load(tmp_path)
    store.save(bench.golden("int8"), tmp_path / "deep")
    (tmp_path / "machine.json").write_text("{}")
    assert len(load(tmp_path)) == 1
    (tmp_path / "broken.json").write_text('{"schema_version": 2')
    with pytest.raises(RecordError, match=r"broken\.json"):
        load(tmp_path)
