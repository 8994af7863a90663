"""Measure the tiny models on documents that training never saw.

    python benchmarks/tiny/evaluate.py            # writes evaluation.json and README.md beside them

    likelihood   nats a token and bits a byte, by domain, test split
    recall       share of values that greedy decoding gives back exactly, by distance: words (one
                 of four noted, chance 25 %) and four-digit codes
    window       the same with a cache of 4 first and 64 newest tokens: must collapse
    agreement    how often the draft's first choice is the target's, on given text and on text
                 that the target wrote itself
    experts      each expert's share of the tokens it was chosen for, by domain

Greedy decoding reproduces a value exactly if and only if every one of its tokens is the first
choice after the true tokens before it; so one forward pass a prompt decides recall.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny import domains
from benchmarks.tiny.corpus import MIX, TEST, digest, documents
from benchmarks.tiny.dice import Dice
from benchmarks.tiny.models import ROLES
from benchmarks.tiny.report import write_readme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TINY = Path(__file__).resolve().parents[2] / "compresskit" / "assets" / "tiny"
TEXTS = 40
"""Documents a domain."""
PROBES = 40
"""Recall prompts a bucket and kind."""
KINDS = {"word": ("pet", "box"), "code": ("code",)}
BUCKETS = ((10, 50), (50, 100), (100, 200), (200, 300), (300, 400), (400, 500))
"""Tokens between the statement of a value and its answer."""
SINKS, RECENT = 4, 64


class Probe(NamedTuple):
    """A prompt with its answer at the end."""

    tokens: torch.Tensor
    """[1, S]; the last `length` tokens are the answer (the name, then the value)."""
    length: int
    question: int
    """Index of the first token of the question."""
    distance: int
    """Tokens from the statement of the value to its answer."""


def probe(tokenizer: PreTrainedTokenizerFast, index: int, size: int, what: str) -> Probe:
    """Build the recall prompt of `index` with about `size` characters of other text."""
    text, (answer,) = domains.probe(Dice(index), size, what)
    found = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([found["input_ids"]])

    def token_at(character: int) -> int:
        return next(i for i, (_, stop) in enumerate(found["offset_mapping"]) if stop > character)

    value, stated = token_at(answer.start), token_at(answer.stated)
    question, mark = token_at(text.rindex("What is")), token_at(text.rindex("?"))
    return Probe(ids, ids.shape[1] - mark - 1, question, value - stated)


def probes(
    tokenizer: PreTrainedTokenizerFast, bucket: tuple[int, int], kind: str, count: int = PROBES
) -> list[Probe]:
    """Return `count` prompts whose distance lies in the bucket [low, high)."""
    low, high = bucket
    found: list[Probe] = []
    index = TEST[0]
    while len(found) < count:
        size = Dice(index).number(low // 2, round(high * 3))
        made = probe(tokenizer, index, size, KINDS[kind][index % len(KINDS[kind])])
        if low <= made.distance < high:
            found.append(made)
        index += 1
    return found


def window_mask(length: int, evicted_from: int) -> torch.Tensor:
    """Return an additive mask [1, 1, S, S]: from `evicted_from` on, only sinks and recent keys.

    `evicted_from=0` is a cache that never held more; a later row is a cache that is cut once the
    text before the question has been read in full.
    """
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    kept = (key < SINKS) | (query - key < RECENT) | (query < evicted_from)
    return torch.where(kept & (key <= query), 0.0, torch.finfo(torch.float32).min)[None, None]


def recalls(model: PreTrainedModel, prompt: Probe, mask: torch.Tensor | None = None) -> bool:
    """Return whether greedy decoding gives the whole value back."""
    logits = model(input_ids=prompt.tokens, attention_mask=mask, use_cache=False).logits[0]
    best = logits[-prompt.length - 1 : -1].argmax(-1)
    return bool((best == prompt.tokens[0, -prompt.length :]).all())


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: str) -> dict[str, Any]:
    """Return exact recall by distance, with the whole context and with two cut ones."""
    table: dict[str, Any] = {}
    for bucket in BUCKETS:
        prompts = probes(tokenizer, bucket, kind)
        cut = [p for p in prompts if p.distance > RECENT]
        table[f"{bucket[0]}-{bucket[1] - 1}"] = {
            "prompts": len(prompts),
            "whole": sum(recalls(model, p) for p in prompts) / len(prompts),
            "window": _share(model, cut, from_question=False),
            "cut_before_question": _share(model, cut, from_question=True),
        }
    return table


def _share(model: PreTrainedModel, prompts: list[Probe], *, from_question: bool) -> float | None:
    if len(prompts) < PROBES // 2:
        return None
    hits = sum(
        recalls(model, p, window_mask(p.tokens.shape[1], p.question if from_question else 0))
        for p in prompts
    )
    return hits / len(prompts)


def likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return nats a token and bits a byte for each domain; `<|bos|>` is given, not scored."""
    table = {}
    for domain in MIX:
        nats, tokens, size = 0.0, 0, 0
        for text in documents(TEST[:TEXTS], domain=domain):
            ids = tokenizer(text.text, return_tensors="pt")["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nats += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
            size += len(text.text.encode())
        table[domain] = {
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size,
            "tokens": tokens,
            "bytes": size,
        }
    return table


def agreement(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Return the share of positions where draft and target put the same token first."""
    table = {}
    for domain in MIX:
        given, written = [0, 0], [0, 0]
        for number, text in enumerate(documents(TEST[:TEXTS], domain=domain)):
            ids = tokenizer(text.text, return_tensors="pt")["input_ids"]
            _count(given, target, draft, ids, 1)
            if number < 20:
                start = min(48, ids.shape[1] // 2)
                grown = target.generate(
                    ids[:, :start],
                    attention_mask=torch.ones_like(ids[:, :start]),
                    max_new_tokens=96,
                    do_sample=False,
                )
                _count(written, target, draft, grown, start)
        table[domain] = {
            "on_given_text": given[0] / given[1],
            "on_text_of_the_target": written[0] / written[1],
            "positions": given[1],
            "positions_written": written[1],
        }
    return table


def _count(
    tally: list[int],
    target: PreTrainedModel,
    draft: PreTrainedModel,
    ids: torch.Tensor,
    start: int,
) -> None:
    first, second = (
        m(input_ids=ids, use_cache=False).logits[0, start - 1 : -1] for m in (target, draft)
    )
    tally[0] += int((first.argmax(-1) == second.argmax(-1)).sum())
    tally[1] += first.shape[0]


def expert_load(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return each expert's share of the choices, by domain and layer."""
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    table = {}
    for domain in MIX:
        load = torch.zeros(model.config.num_hidden_layers, experts)
        for text in documents(TEST[:20], domain=domain):
            ids = tokenizer(text.text, return_tensors="pt")["input_ids"]
            routed = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            for layer, logits in enumerate(routed):
                best = logits.reshape(-1, experts).topk(chosen).indices
                load[layer] += torch.bincount(best.flatten(), minlength=experts)
        shares = load / load.sum(-1, keepdim=True)
        table[domain] = [[round(share, 4) for share in layer] for layer in shares.tolist()]
    return table


@torch.inference_mode()
def evaluate(folder: Path) -> dict[str, Any]:
    """Measure the three models under `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    models = {
        role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval()
        for role in ROLES
    }
    results: dict[str, Any] = {
        "documents_sha256": digest(
            text for domain in MIX for text in documents(TEST[:TEXTS], domain=domain)
        ),
        "cache_window": {"sinks": SINKS, "recent": RECENT},
        "models": {},
    }
    for role, model in models.items():
        weights = (folder / role / "model.safetensors").read_bytes()
        results["models"][role] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_file_bytes": len(weights),
            "weight_file_sha256": hashlib.sha256(weights).hexdigest(),
            "likelihood": likelihood(model, tokenizer),
            "recall": {kind: recall(model, tokenizer, kind) for kind in KINDS},
        }
        print(f"{role} measured", flush=True)
    results["agreement"] = agreement(models["target"], models["draft"], tokenizer)
    results["expert_load"] = expert_load(models["moe"], tokenizer)
    return results


def main() -> None:
    """Evaluate, then write `evaluation.json` and `README.md`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = evaluate(args.folder)
    path = args.folder / "evaluation.json"
    path.write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n")
    text = write_readme(args.folder, results)
    print(text)


if __name__ == "__main__":
    main()
