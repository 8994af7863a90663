"""Specs are strict, frozen and digested the same way every time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from compresskit.errors import SpecError
from compresskit.spec import MethodSpec, RunSpec, WorkloadSpec


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(
        SpecError, match=r"unknown key 'workload.prompt_token'. Did you mean 'prompt_tokens'"
    ):
        RunSpec.decode({"workload": {"prompt_token": 4}}, where="suite.toml")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"workload": {"prompt_tokens": "128"}}, "workload.prompt_tokens"),
        ({"workload": {"prompt_tokens": 0}}, "greater than or equal to 1"),
        ({"sampling": {"temperature": float("nan")}}, "suite.toml"),
        ({"engine": {"mode": "fast"}}, "'eager', 'prepacked' or 'compiled'"),
        ({"protocol": {"passes": []}}, "protocol.passes"),
        ({"seed": True}, "seed"),
    ],
)
def test_bad_values_are_refused_with_their_place(document: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RunSpec.decode(document, where="suite.toml")


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunSpec().seed = 3  # type: ignore[misc]


@given(st.permutations(["group", "head", "symmetric"]))
def test_the_digest_does_not_depend_on_the_order_of_parameters(keys: list[str]) -> None:
    values = {"group": 64, "head": True, "symmetric": False}
    spec = RunSpec(
        stack=(MethodSpec(name="quant/int4", params={key: values[key] for key in keys}),)
    )
    again = RunSpec(stack=(MethodSpec(name="quant/int4", params=values),))
    assert spec.digest() == again.digest()


def test_the_digest_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from compresskit.spec import RunSpec; print(RunSpec().digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {RunSpec().digest() + "\n"}


def test_every_field_of_the_workload_changes_the_digest() -> None:
    plain = RunSpec().digest()
    changed = {
        "text": "book.txt",
        "prompt_tokens": 7,
        "new_tokens": 9,
        "batch_sizes": [1, 2],
        "chat": True,
    }
    assert set(changed) == set(WorkloadSpec.model_fields)
    digests = {
        RunSpec.decode({"workload": {key: value}}, where="t").digest()
        for key, value in changed.items()
    }
    assert len(digests | {plain}) == len(changed) + 1


def test_the_baseline_keeps_everything_but_the_stack() -> None:
    spec = RunSpec(stack=(MethodSpec(name="quant/int8"),), seed=5)
    assert spec.baseline() == RunSpec(seed=5)
    assert spec.baseline().baseline() == spec.baseline()
    assert [dense.engine.mode for dense in spec.best_dense()] == ["eager", "prepacked", "compiled"]


def test_a_round_trip_through_json_keeps_the_digest() -> None:
    spec = RunSpec(stack=(MethodSpec(name="quant/int4", params={"group": 32}),))
    assert RunSpec.model_validate_json(spec.model_dump_json()).digest() == spec.digest()
