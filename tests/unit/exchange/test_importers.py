"""Files of other tools become peers: published numbers in, the same numbers out, faults refused."""

from __future__ import annotations

import json

import pytest

from compresskit.errors import RecordError
from compresskit.exchange import formats
from compresskit.exchange.importers.fields import clean
from compresskit.record import Measured, Unavailable

from .conftest import FOREIGN

near = pytest.approx


def read(name: str, tool: str):
    return formats.read(FOREIGN / name, tool)


def value(peer, name: str) -> float:
    reading = peer.metrics[name]
    assert isinstance(reading, Measured)
    assert reading.source.startswith(f"imported: {peer.tool}")
    return reading.value


def changed(name: str, tool: str, change):
    """Read a golden JSON file after an edit."""
    document = json.loads((FOREIGN / name).read_text(encoding="utf-8"))
    change(document)
    return formats.parse(json.dumps(document).encode(), tool, where=name)


@pytest.mark.parametrize("name", ["llama-bench.json", "llama-bench.jsonl"])
def test_llama_bench(name):
    """The numbers of llama-bench's README: medians of its samples, its own averages beside."""
    prompt, generation = read(name, "llama-bench")
    assert (prompt.label, generation.label) == ("pp512", "tg128")
    assert prompt.model == "qwen2 7B Q4_K - Medium"
    assert prompt.device == "NVIDIA GeForce RTX 4080"
    assert value(prompt, "prefill_tokens_per_s") == near(512e9 / 71745200)
    assert value(prompt, "weights_bytes") == 4677120000
    assert prompt.stated["avg_ts"].value == 7100.002165
    assert value(generation, "decode_tokens_per_s_per_seq") == near(128e9 / 1075361300)
    assert value(generation, "tpot_s") == near(1.0753613 / 128)
    assert generation.stated["avg_ts"].value == 118.881588
    assert "prefill_tokens_per_s" not in generation.metrics
    assert (generation.batch, generation.new_tokens, generation.context["n_threads"]) == (1, 128, 8)


def test_llama_bench_without_samples_says_that_it_is_a_mean_of_rates():
    def drop(document):
        for row in document:
            del row["samples_ns"]

    _, generation = changed("llama-bench.json", "llama-bench", drop)
    reading = generation.metrics["decode_tokens_per_s_per_seq"]
    assert reading.value == 118.881588
    assert "mean of its rates" in reading.source


def test_llama_bench_prompt_and_generation_in_one_test():
    (one, _) = changed(
        "llama-bench.json", "llama-bench", lambda d: d[0].update(n_gen=128, avg_ts=8875.0)
    )
    assert one.label == "pp512+tg128"
    assert value(one, "e2e_s") == near(0.0717452)
    assert value(one, "output_tokens_per_s") == near(128 / 0.0717452)


def test_llama_bench_keeps_the_depth_of_the_cache():
    one, _ = changed("llama-bench.json", "llama-bench", lambda d: d[0].update(n_depth=512))
    assert (one.label, one.prompt_tokens) == ("pp512 @ d512", 1024)


def test_vllm():
    (one,) = read("vllm.json", "vllm")
    assert value(one, "ttft_s") == near(0.1)
    assert value(one, "tpot_s") == near(0.02)
    assert value(one, "itl_s") == near(0.04)
    assert value(one, "output_tokens_per_s") == near(27.7778, abs=1e-4)
    assert value(one, "requests_per_s") == near(1 / 0.18)
    assert (one.model, one.batch, one.prompt_tokens, one.new_tokens) == ("org/model", 1, 8, 5)
    # Not asked for with --percentile-metrics: unknown, so absent.
    assert "e2e_s" not in one.metrics


def test_vllm_appends_runs_line_by_line():
    line = (FOREIGN / "vllm.json").read_bytes()
    first, second = formats.parse(line + b"\n" + line, "vllm", where="appended.json")
    assert (first.file.entry, second.file.entry) == (0, 1)
    assert first.metrics == second.metrics


def test_zero_is_what_vllm_writes_for_no_values():
    (one,) = changed("vllm.json", "vllm", lambda d: d.update(median_tpot_ms=0.0))
    assert isinstance(one.metrics["tpot_s"], Unavailable)
    assert "had no values" in one.metrics["tpot_s"].reason


def test_vllm_acceptance_is_a_share_here():
    (one,) = changed(
        "vllm.json",
        "vllm",
        lambda d: d.update(spec_decode_acceptance_rate=25.0, spec_decode_acceptance_length=2.0),
    )
    assert value(one, "draft_acceptance_rate") == 0.25
    assert value(one, "mean_acceptance_length") == 2.0


def test_lm_eval():
    wikitext, lambada = read("lm-eval.json", "lm-eval")
    assert value(wikitext, "bits_per_byte") == 1.3394
    assert wikitext.stated["word_perplexity,none"].value == 130.4801
    assert wikitext.stated["word_perplexity,none"].stderr is None
    # Per word, per byte and per token are three things: ours is per token.
    assert "perplexity" not in wikitext.metrics
    assert lambada.metrics == {}
    assert lambada.stated["acc,none"].value == 0.1
    assert lambada.stated["acc,none"].stderr == 0.1
    assert lambada.stated["perplexity,none"].value == 605.3866
    assert wikitext.model == "EleutherAI/pythia-14m-deduped"
    assert wikitext.context["documents"] == 10
    assert (wikitext.context["version"], wikitext.context["n_shot"]) == (2.0, 0)
    assert wikitext.measured_at == "2026-01-01T00:00:00Z"


def test_lm_eval_finds_the_model_in_its_arguments():
    tasks = changed("lm-eval.json", "lm-eval", lambda d: d.pop("model_name"))
    assert tasks[0].model == "EleutherAI/pythia-14m-deduped"


def test_mlperf_interactive_of_eight_mi300x():
    (one,) = read("mlperf-interactive.txt", "mlperf")
    assert value(one, "output_tokens_per_s") == 8840.42
    assert value(one, "ttft_p99_s") == near(0.4359761)
    assert value(one, "tpot_p99_s") == near(0.039507635)
    assert one.verdict == "VALID"
    assert "ttft_s" not in one.metrics
    assert (one.model, one.device) == (None, None)


def test_mlperf_server_and_its_detail_log_agree():
    (summary,) = read("mlperf-server.txt", "mlperf")
    (detail,) = read("mlperf-detail.txt", "mlperf")
    assert value(summary, "output_tokens_per_s") == 29522.56
    assert value(summary, "requests_per_s") == 99.86
    assert value(summary, "ttft_s") == near(0.950532291)
    assert value(summary, "e2e_s") == near(32.917446649)
    found = [{name: r.value for name, r in one.metrics.items()} for one in (summary, detail)]
    assert found[0] == found[1]
    assert summary.label == detail.label == "PySUT Server"


def test_mlperf_offline():
    (one,) = read("mlperf-offline.txt", "mlperf")
    assert value(one, "output_tokens_per_s") == 33396.9
    assert value(one, "requests_per_s") == 112.646
    assert "ttft_p99_s" not in one.metrics


def _text(old: str, new: str, name: str = "mlperf-server.txt") -> bytes:
    text = (FOREIGN / name).read_text(encoding="utf-8")
    assert old in text
    return text.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "neither a summary nor a detail log"),
        (b"\xff\xfe", "not text"),
        (_text("Result is : VALID", "Result is : PERHAPS"), "neither VALID nor INVALID"),
        (_text("Result is : VALID\n", ""), "neither VALID nor INVALID"),
        (_text("second: 29522.56", "second: 29522.57"), "told twice"),
        (_text(": 164964162", ": nan"), "is no finite number"),
        (_text("(ns)   : 1760966679", "(ns)   : 0"), "must be above zero"),
        (_text("(ns)   : 1760966679", "(ns)   : 1" + "0" * 40), "nothing can measure"),
        (_text('"value": 99.86', '"value": NaN', "mlperf-detail.txt"), "is not JSON"),
        (_text('"value": 29522.56', '"value": "x"', "mlperf-detail.txt"), "no finite number"),
    ],
)
def test_a_doctored_mlperf_log_is_refused(data, sentence):
    with pytest.raises(RecordError, match=sentence):
        formats.parse(data, "mlperf", where="log.txt")


@pytest.mark.parametrize(
    ("name", "tool", "change", "sentence"),
    [
        (
            "llama-bench.json",
            "llama-bench",
            lambda d: d[1].pop("avg_ts"),
            "result 1: avg_ts is mis",
        ),
        (
            "llama-bench.json",
            "llama-bench",
            lambda d: d[0].update(avg_ts=75),
            "raw numbers give 7100",
        ),
        ("llama-bench.json", "llama-bench", lambda d: d[0].update(avg_ts=-1), "avg_ts is negative"),
        ("llama-bench.json", "llama-bench", lambda d: d[0].update(avg_ts=True), "no finite number"),
        (
            "llama-bench.json",
            "llama-bench",
            lambda d: d[0].update(n_prompt=0),
            "nothing was tested",
        ),
        ("llama-bench.json", "llama-bench", lambda d: d[0].update(n_prompt=0.5), "a whole number"),
        ("llama-bench.json", "llama-bench", lambda d: d[0].update(samples_ns=[]), "holds no times"),
        (
            "llama-bench.json",
            "llama-bench",
            lambda d: d[0].update(samples_ns=[0]),
            "a time of zero",
        ),
        ("llama-bench.json", "llama-bench", lambda d: d[0].update(samples_ns="x"), "is no list"),
        ("llama-bench.json", "llama-bench", lambda d: d.append(3), "object per result"),
        ("llama-bench.json", "llama-bench", lambda d: d.clear(), "holds no result"),
        ("vllm.json", "vllm", lambda d: d.update(duration=0), "duration is 0"),
        ("vllm.json", "vllm", lambda d: d.update(duration=-1), "duration is negative"),
        ("vllm.json", "vllm", lambda d: d.update(completed=0), "no request was completed"),
        ("vllm.json", "vllm", lambda d: d.update(output_throughput=99), "raw numbers give 27"),
        ("vllm.json", "vllm", lambda d: d.update(ttfts=[9.0]), "mean_ttft_ms is 100"),
        ("vllm.json", "vllm", lambda d: d.update(median_ttft_ms="fast"), "no finite number"),
        ("vllm.json", "vllm", lambda d: d.update(model_id=7), "model_id is no text"),
        ("vllm.json", "vllm", lambda d: d.pop("total_output_tokens"), "only generation runs"),
        ("vllm.json", "vllm", lambda d: d.pop("total_input_tokens"), "no result of vllm"),
        ("vllm.json", "vllm", lambda d: d.update(spec_decode_acceptance_rate=101), "101 per cent"),
        ("lm-eval.json", "lm-eval", lambda d: d.pop("results"), "no result of lm-eval"),
        ("lm-eval.json", "lm-eval", lambda d: d.update(results=[]), "results is no object"),
        ("lm-eval.json", "lm-eval", lambda d: d.update(results={}), "holds no result"),
        ("lm-eval.json", "lm-eval", lambda d: d["results"].update(piqa={}), "no score"),
        ("lm-eval.json", "lm-eval", lambda d: d.update(config="hf"), "config is no object"),
    ],
)
def test_a_doctored_file_is_refused_with_its_place(name, tool, change, sentence):
    with pytest.raises(RecordError, match=sentence):
        changed(name, tool, change)


@pytest.mark.parametrize("tool", ["llama-bench", "vllm", "lm-eval"])
@pytest.mark.parametrize(
    "data", [b"", b"{", b"[[]]", b'"x"', b"NaN", b'{"a": NaN}', b"\xff", b"[" * 9999]
)
def test_what_is_no_json_object_is_refused(tool, data):
    with pytest.raises(RecordError):
        formats.parse(data, tool, where="file.json")


def test_a_file_of_another_tool_is_refused():
    for name, tool in (("vllm.json", "llama-bench"), ("llama-bench.json", "vllm")):
        with pytest.raises(RecordError, match="is missing; this is no result of"):
            read(name, tool)


def test_names_from_files_cannot_steer_a_terminal():
    assert clean("a\x1b[31mred\x07\r\nb\u202e") == "a [31mred b"
    assert len(clean("x" * 10_000)) == 200
    (one,) = changed("vllm.json", "vllm", lambda d: d.update(label="\x1b]0;title\x07 run"))
    assert one.label == "]0;title run"
