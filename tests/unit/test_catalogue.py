"""Methods are found by path, decoded strictly, and suites resolve to specs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compresskit import catalogue, suite
from compresskit.errors import SpecError, UnknownName
from compresskit.spec import EngineSpec, MethodSpec


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'quant/int8'"):
        catalogue.get("quant/int88")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"unknown engine 'nativ'\. Did you mean 'native'"):
        catalogue.engine(EngineSpec(name="nativ"))


def test_defaults_are_filled_so_equal_stacks_have_equal_digests() -> None:
    assert catalogue.parse_method("quant/int4") == catalogue.parse_method("quant/int4:group=64")
    assert catalogue.parse_method("quant/int4:group=32") != catalogue.parse_method("quant/int4")


@pytest.mark.parametrize(
    "text", ["quant/int4:group", "quant/int4:=4", "quant/int4:group=7", "quant/int4:grup=32"]
)
def test_bad_parameters_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        catalogue.parse_method(text)


def test_labels_show_what_differs_from_the_defaults() -> None:
    assert (
        catalogue.short_label(catalogue.parse_method("quant/int4:group=32"))
        == "quant/int4:group=32"
    )
    assert catalogue.short_label(catalogue.parse_method("quant/int4")) == "quant/int4"
    assert catalogue.label((), "prepacked") == "dense (prepacked)"


def test_a_method_of_another_package_is_found_by_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.metadata import EntryPoint

    from compresskit.methods.quant import int8

    monkeypatch.setitem(sys.modules, "elsewhere", int8)
    name = next(
        n
        for n in dir(int8)
        if isinstance(getattr(int8, n), type) and getattr(int8, n).__module__ == int8.__name__
    )
    point = EntryPoint("other/int8", f"elsewhere:{name}", "compresskit.methods")
    monkeypatch.setattr(
        catalogue, "entry_points", lambda group: [point] if group == "compresskit.methods" else []
    )
    catalogue.method_names.cache_clear()
    catalogue.get.cache_clear()
    try:
        assert "other/int8" in catalogue.method_names()
        assert catalogue.decode("other/int8", {}).__class__.__name__ == name
    finally:
        catalogue.method_names.cache_clear()
        catalogue.get.cache_clear()


def test_a_suite_adds_its_baselines_once(tmp_path: Path) -> None:
    path = write(
        tmp_path, '[[variant]]\nstack = ["quant/int8"]\n[[variant]]\nstack = ["kv/int8"]\n'
    )
    specs = suite.resolve(suite.read(path))
    assert [[method.name for method in spec.stack] for spec in specs] == [
        [],
        ["quant/int8"],
        ["kv/int8"],
    ]


def test_eager_baselines_come_first(tmp_path: Path) -> None:
    path = write(tmp_path, '[[variant]]\nmode = "prepacked"\n[[variant]]\nstack = ["kv/int8"]\n')
    modes = [spec.engine.mode for spec in suite.resolve(suite.read(path)) if not spec.stack]
    assert modes == ["eager", "prepacked"]


def test_a_sweep_gives_every_combination(tmp_path: Path) -> None:
    text = """
    baselines = false
    [[variant]]
    stack = [{ name = "quant/int4", head = false }]
    [variant.sweep]
    "quant/int4.group" = [32, 64]
    "workload.prompt_tokens" = [16, 32]
    """
    specs = suite.resolve(suite.read(write(tmp_path, text)))
    points = [(spec.stack[0].params["group"], spec.workload.prompt_tokens) for spec in specs]
    assert points == [(32, 16), (32, 32), (64, 16), (64, 32)]
    assert all(spec.stack[0].params["head"] is False for spec in specs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[variant]]\nstak = []", "unknown key 'variant.0.stak'. Did you mean 'stack'"),
        ("[workload]\nprompt_tokns = 3", "Did you mean 'prompt_tokens'"),
        ("name = 3", "name"),
        ("[[variant]\n", "not valid TOML"),
        ('[[variant]]\nstack = ["quant/int9"]', "unknown method"),
        ("[[variant]]\nstack = [{ group = 3 }]", "give the method as name"),
        ('[[variant]]\n[variant.sweep]\n"quant/int4.group" = [32]', "not in this variant's stack"),
        ('[[variant]]\n[variant.sweep]\n"workload.nothing" = [32]', "unknown key"),
        ('[[variant]]\n[variant.sweep]\n"work.prompt_tokens" = [32]', "no such part"),
    ],
)
def test_a_wrong_suite_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((SpecError, UnknownName), match=message):
        suite.resolve(suite.read(write(tmp_path, text)))


def test_a_missing_suite_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        suite.read(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["demo", "demo-fast"])
def test_shipped_suites_resolve(name: str) -> None:
    specs = suite.resolve(suite.read(suite.shipped(name)))
    assert len(specs) >= 6
    assert specs[0].stack == ()


def test_method_specs_survive_their_label() -> None:
    spec = catalogue.normalise(MethodSpec(name="quant/int4", params={"group": 128}))
    assert catalogue.parse_method(spec.label()) == spec
