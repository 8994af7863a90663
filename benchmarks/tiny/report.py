"""Write the README of the shipped models; its tables come from what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

INTRODUCTION = """# The tiny models

Three models trained from scratch for tests, the quick start and demonstrations, in transformers'
own formats, float32. They know stories, lists, sums and recall ("Note the pet: Mira fox." ...
"What is the pet of Mira? Mira fox.") made up by `benchmarks/tiny/`, and nothing else: their
figures show whether a method works and how it fails, not how a large model would fare.

Recall of words works; recall of whole four-digit codes does not: the first digit is found, the
next three are mostly guessed. Use words where a test needs recall.

| model | architecture | use |
|---|---|---|
| `target` | Llama, 4 layers, width 128, 4 query and 2 key/value heads | the model under test |
| `draft` | Llama, 2 layers, width 64, same vocabulary, distilled from `target` | speculation |
| `moe` | Mixtral, 2 layers, width 128, 8 experts, 2 a token | expert methods |

The tokenizer is byte-level BPE with 512 entries (any UTF-8 text round-trips); digits stand alone;
`<|bos|>` is added on encoding and `<|end|>` ends a text or a turn. Contexts were 128 to 1024
tokens in training; positions up to 2048 are allowed but were never trained.

Rebuild: `python benchmarks/tiny/train.py all`, `python benchmarks/tiny/corpus.py --write
compresskit/assets/text`, `python benchmarks/tiny/evaluate.py`. See `training.json` (recipe, data
digests, loss curves) and `evaluation.json` (all figures below, unrounded).

How far to trust these figures: the recipe was chosen among several with recall prompts from the
test index range, so recall is slightly selected. The three models were trained by one call each;
a rerun has not been compared bit for bit.
"""


def write_readme(folder: Path, results: dict[str, Any]) -> str:
    """Write `folder/README.md` from the results of `evaluate.py` and return its text."""
    models = results["models"]
    roles = ("target", "draft", "moe")
    parts = [INTRODUCTION, "\n## Measured on the test split\n\n"]
    rows = [["", *roles]]
    rows.append(["parameters", *(f"{models[role]['parameters']:,}" for role in roles)])
    for domain in models["target"]["likelihood"]:
        cells = [models[role]["likelihood"][domain] for role in roles]
        rows.append(
            [
                f"{domain}: nats a token (bits a byte)",
                *(f"{c['nats_per_token']:.4f} ({c['bits_per_byte']:.4f})" for c in cells),
            ]
        )
    for kind, buckets in models["target"]["recall"].items():
        for bucket in buckets:
            cells = [models[role]["recall"][kind][bucket] for role in roles]
            name = f"{kind} recalled at {bucket} tokens"
            rows.append([name, *(f"{c['whole']:.0%}" for c in cells)])
    parts += [_table(rows), "\nThe target's recall of words when the cache keeps the first "]
    window = results["cache_window"]
    parts.append(f"{window['sinks']} and the newest {window['recent']} tokens:\n\n")
    rows = [["distance", "whole cache", "cut from the start", "cut before the question"]]
    for bucket, cell in models["target"]["recall"]["word"].items():
        if cell["window"] is not None:
            shares = (cell["whole"], cell["window"], cell["cut_before_question"])
            rows.append([bucket, *(f"{share:.0%}" for share in shares)])
    parts += [_table(rows), "\nThe draft's first choice is the target's (share of positions):\n\n"]
    rows = [["domain", "on test documents", "on text the target wrote"]]
    for domain, cell in results["agreement"].items():
        rows.append(
            [domain, f"{cell['on_given_text']:.1%}", f"{cell['on_text_of_the_target']:.1%}"]
        )
    parts.append(_table(rows))
    text = "".join(parts)
    (folder / "README.md").write_text(text)
    return text


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"
