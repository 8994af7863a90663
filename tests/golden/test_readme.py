"""README's tables are what the tool prints now: `pytest tests/golden --regolden` writes them anew."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from compresskit import catalogue, stats
from compresskit.report import bits, cells, held, join, markdown, speculation, students, table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def methods() -> str:
    lines = ["| method | stage | what it does | parameters |", "|---|---|---|---|"]
    for name in catalogue.method_names():
        row = catalogue.describe(name)
        parameters = ", ".join(f"`{p['name']}={p['default']}`" for p in row["parameters"])
        lines.append(f"| `{name}` | {row['stage']} | {row['summary']} | {parameters or '–'} |")
    return "\n".join(lines) + "\n"


def demo() -> str:
    folders = sorted((ROOT / "results").glob("*/demo"))
    return markdown.render(table.build(join.load(folders)))


def interleaved() -> str:
    path = min((ROOT / "results").glob("*/interleaved.json"))
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| arm | ms/token (median) | speed against our eager loop |", "|---|--:|--:|"]
    for name, seconds in sorted(document["seconds_per_token"].items()):
        ratio = document["speed_against_loop"][name]
        lines.append(
            f"| {name} | {1000 * stats.median(seconds):.1f} "
            f"| {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    cost = stats.median(document["loop_over_bare_pairs"])
    return "\n".join(lines) + f"\n\nOur loop over the bare model, median of pairs: {cost:+.1%}.\n"


SHOWN = {
    "effective_bits_per_parameter": ("bits/param", "plain"),
    "weights_bytes": ("weights", "quantity"),
    "decode_ratio_to_baseline": ("× eager dense", "ratio"),
    "decode_ratio_to_best_dense": ("× best dense", "ratio"),
    "kl_mean_nats": ("KL (nats)", "plain"),
    "top1_agreement": ("same top-1", "percent"),
}
ON_GRID = "⚠"


def schemes(suite: str) -> str:
    """The weight schemes of one suite: at equal bits side by side, the closest to dense first."""
    folders = sorted((ROOT / "results").glob(f"*/{suite}"))
    if not folders:  # not measured yet
        return ""
    built = bits.by_bits(table.build(join.load(folders)))
    (group,) = built.groups
    dense = next(row for row in group.rows if row.dense and row.mode == "eager")
    heads = ["scheme", *(head for head, _ in SHOWN.values()), "ppl ratio"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * (len(heads) - 1)]
    flagged = False
    for row in group.rows:
        on_grid = bits.on_grid(row)
        flagged |= on_grid
        shown = [
            cells.text(replace(row.cells[key], note=None), style)
            for key, (_, style) in SHOWN.items()
        ]
        own, base = row.cells["perplexity"].value, dense.cells["perplexity"].value
        ratio = f"{own / base:.3f}" if own and base and not row.dense else "–"
        name = f"{row.name()} {ON_GRID}" if on_grid else row.name()
        lines.append(f"| {' | '.join([name.replace('quant/', ''), *shown, ratio])} |")
    if flagged:
        lines += ["", f"{ON_GRID} the baseline lies on this very grid already: not to be ranked."]
    return "\n".join(lines) + "\n"


CACHES = {
    "cache_nominal_ratio": ("asked", "ratio"),
    "cache_achieved_ratio": ("held", "ratio"),
    "cache_effective_bits": ("bits/number", "plain"),
    "cache_bytes_read_per_token": ("read/token", "quantity"),
    "kl_mean_nats": ("KL (nats)", "plain"),
    "top1_agreement": ("same top-1", "percent"),
    "task_delta_aware": ("recall Δ, question in view", "words"),
    "task_delta_agnostic": ("recall Δ, question unknown", "words"),
}


def caches(suite: str) -> str:
    """Cache methods of one suite, in the order of what they hold."""
    folders = sorted((ROOT / "results").glob(f"*/{suite}"))
    if not folders:  # not measured yet
        return ""
    (group,) = held.by_cache(table.build(join.load(folders))).groups
    shown = {key: how for key, how in CACHES.items() if key in group.rows[0].cells}
    heads = ["cache", *(head for head, _ in shown.values())]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * len(shown)]
    for row in group.rows:
        texts = [
            cells.text(replace(row.cells[key], note=None), style)
            for key, (_, style) in shown.items()
        ]
        lines.append(f"| {' | '.join([row.name().replace('kv/', ''), *texts])} |")
    return "\n".join(lines) + "\n"


WORDS = {"better": "▲", "worse": "▼", "same": "=", "inconclusive": "?"}


def kv_cost() -> str:
    """Decode time against the length of the cache, and what the cache holds at the longest."""
    folders = sorted((ROOT / "results").glob("*/kv-cost"))
    if not folders:  # not measured yet
        return ""
    document = json.loads((folders[0] / "curve.json").read_text(encoding="utf-8"))
    lengths = document["lengths"]
    longest = list(lengths)[-1]
    heads = [
        "cache",
        *(f"{int(tokens):,} tokens" for tokens in lengths),
        f"held at {int(longest):,}",
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * (len(heads) - 1)]
    for name in document["rows"]:
        times = []
        for at in lengths.values():
            row = at[name]
            times.append(f"{1000 * row['median_seconds']:.1f} ms")
            if row.get("ratio") is not None:
                times[-1] += f" ({row['ratio']:.2f} {WORDS[row['verdict']]})"
        held_bytes = sum(lengths[longest][name]["cache_bytes"].values()) / 1e6
        lines.append(f"| {' | '.join([name.replace('kv/', ''), *times, f'{held_bytes:.1f} MB'])} |")
    return "\n".join(lines) + "\n"


DRAFTERS = {
    "tokens_per_step": ("tok/step", "plain"),
    "draft_acceptance_rate": ("accepted", "share"),
    "draft_share": ("draft", "share"),
    "host_share": ("host", "share"),
    "predicted_ratio_to_baseline": ("× predicted", "ratio"),
    "decode_ratio_to_baseline": ("× same-mode dense", "ratio"),
    "decode_ratio_to_best_dense": ("× best dense", "ratio"),
    "best_draft_length": ("best k", "count"),
    "lossless": ("lossless", "words"),
}


def drafters(suite: str) -> str:
    """Drafters of one suite, a block for each kind of work."""
    folders = sorted((ROOT / "results").glob(f"*/{suite}"))
    if not folders:  # not measured yet
        return ""
    heads = ["work", "row", *(head for head, _ in DRAFTERS.values())]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " --: |" * len(DRAFTERS)]
    for group in speculation.by_speculation(table.build(join.load(folders))).groups:
        work = str(group.context["text"]).partition("#")
        for row in group.rows:
            texts = [
                cells.text(replace(row.cells[key], note=None), style)
                for key, (_, style) in DRAFTERS.items()
            ]
            name = row.name().replace("speculative/", "")
            lines.append(f"| {' | '.join([work[2] or work[0], name, *texts])} |")
    return "\n".join(lines) + "\n"


TAUGHT = {
    "decode_ratio_to_best_dense": ("× best dense", "ratio"),
    "weights_bytes": ("weights", "quantity"),
    "bits_per_teacher_parameter": ("bits/teacher param", "plain"),
    "kl_mean_nats": ("KL ± SE (nats)", "spread"),
    "bits_per_byte": ("bits/byte", "plain"),
    "pareto": ("best in", "words"),
    "training_s": ("training", "duration"),
    "training_tokens": ("training tokens", "count"),
    "break_even_output_tokens_by_time": ("break-even tokens", "count"),
}


def taught(suite: str) -> str:
    """Teacher, students and quantised ones of one suite."""
    folders = sorted((ROOT / "results").glob(f"*/{suite}"))
    if not folders:  # not measured yet
        return ""
    heads = ["row", "decode tok/s", *(head for head, _ in TAUGHT.values())]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --: |" * (len(heads) - 1)]
    (group,) = students.by_students(table.build(join.load(folders))).groups
    columns = {"decode_tokens_per_s": ("", "plain"), **TAUGHT}
    for row in group.rows:
        texts = [
            cells.text(replace(row.cells[key], note=None), style)
            for key, (_, style) in columns.items()
        ]
        name = (
            row.name().replace("build/students/", "").replace("distill/student:path=", "student ")
        )
        lines.append(f"| {' | '.join([name, *texts])} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("page", "name", "make"),
    [
        ("README.md", "quantization", partial(schemes, "quantization")),
        ("benchmarks/README.md", "gemma", partial(schemes, "quantization-gemma")),
        ("README.md", "kv-tiny", partial(caches, "kv-tiny")),
        ("benchmarks/README.md", "kv", partial(caches, "kv")),
        ("benchmarks/README.md", "kv-cost", kv_cost),
        ("README.md", "speculative", partial(drafters, "speculative")),
        ("benchmarks/README.md", "speculative-tiny", partial(drafters, "speculative-tiny")),
        ("benchmarks/README.md", "spec-bench", partial(drafters, "spec-bench")),
        ("README.md", "distill", partial(taught, "distill")),
        ("README.md", "distill-tiny", partial(taught, "distill-tiny")),
        ("README.md", "speculative-student", partial(drafters, "speculative-student")),
        ("README.md", "methods", methods),
        ("README.md", "demo", demo),
        ("benchmarks/README.md", "interleaved", interleaved),
    ],
)
def test_pages_show_what_the_tool_prints(page: str, name: str, make, regolden: bool) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, _, rest = text.partition(begin)
    shown, _, tail = rest.partition(end)
    if name != "methods" and not regolden and _own_results():
        pytest.skip("results/ holds runs of your own; the pages show the committed ones")
    wanted = make()
    if regolden:
        path.write_text(head + begin + wanted + end + tail, encoding="utf-8")
    else:
        assert shown == wanted


def _own_results() -> bool:
    """Whether somebody measured here since the checkout, as README's first command does."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return False
    words = [git, "-C", str(ROOT), "status", "--porcelain", "--", "results"]
    return bool(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())


def test_readme_opens_with_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    first = text.partition("```console\n")[2].partition("```")[0].splitlines()
    assert first == ["pip install . && compresskit demo", "pip install -e '.[test]' && pytest"]


def test_what_readme_links_to_exists() -> None:
    for path in ("benchmarks/weights.toml", "benchmarks/interleaved.py", "benchmarks/bench_ops.py",
                 "compresskit/assets/tiny/README.md", "compresskit/method.py", ".ci/run"):  # fmt: skip
        assert (ROOT / path).exists(), path
