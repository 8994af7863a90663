"""Five seeds of what distillation claims, on the shipped tiny target.

    python benchmarks/distill_seeds.py --out build/distill-seeds.json        # minutes on one core
    python benchmarks/distill_seeds.py --out ... --only finish --seeds 0 1

    teaching   a small student from random weights: forward KL from the teacher against
               cross-entropy on the same rows, at equal steps
    dropping   three of the teacher's four blocks: those of most influence against drawn ones,
               untouched, and after equal steps of recovery
    finish     a student packed in three bits: the last part of its training with that rounding
               in the forward pass against without, at equal steps

A seed decides the student's first weights, the order of the rows and the blocks that are drawn. All
figures are nats per token of text that no arm has learned from; the same text for all. Every pair is
written as soon as it is measured, and is not measured again, so a run that was stopped goes on; a file
that other settings have made is refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks.tiny.corpus import TEST, TRAIN
from benchmarks.tiny.rows import Stage, pack
from compresskit import catalogue
from compresskit.assets import tiny_path
from compresskit.device import resolve
from compresskit.distill.recipe import Recipe
from compresskit.distill.train import train
from compresskit.hf.load import load_model
from compresskit.hf.student.layers import pick
from compresskit.measure.environment import describe
from compresskit.method import Context
from compresskit.spec import ModelSpec, spec_digest
from compresskit.system import System

if TYPE_CHECKING:
    from collections.abc import Callable

    from compresskit.card import Card

SEEDS = (0, 1, 2, 3, 4)
ROWS, HELD_OUT, LENGTH = 2400, 48, 128
COMMON: dict[str, Any] = {
    "teacher": {"name": "tiny"},
    "length": LENGTH,
    "batch": 8,
    "held_out_rows": HELD_OUT,
    "check_every": 1.0,
    "optimizer": "adamw",
}
SMALL = "scratch:hidden_size=64,num_hidden_layers=2,intermediate_size=256"
INT3 = "quant/intn:bits=3"
TAUGHT = {"student": SMALL, "budget": "150 steps", "rate": 3e-3}
RECOVERED = {"budget": "60 steps", "rate": 3e-4, "loss": "forward_kl"}
FINISHED = {
    "student": "layers:keep=3",
    "budget": "60 steps",
    "rate": 3e-4,
    "loss": "forward_kl",
    "finish_share": 0.5,
}
KEPT, BLOCKS = 3, 4
SETTINGS = {
    "common": COMMON, "teaching": TAUGHT, "dropping": RECOVERED, "finish": FINISHED,
    "method": INT3, "kept": KEPT, "rows": ROWS,
}  # fmt: skip


class Bench:
    """Trains arms on one file of rows and judges them on another."""

    def __init__(self, folder: Path) -> None:
        """Write the rows into `folder`: documents of the tiny corpus, none in both files."""
        self.folder = folder
        for name, first, count in (("train", TRAIN[0], ROWS), ("held_out", TEST[0], HELD_OUT)):
            stage = Stage(name, first, LENGTH, 1, count, 270, 1, 1)
            rows = pack(_tokenizer(), stage, count)
            save_file(
                {
                    "tokens": torch.from_numpy(rows.tokens.astype("int32")),
                    "weights": torch.from_numpy(rows.weights.astype("float32")),
                },
                folder / f"{name}.safetensors",
            )

    def train(self, seed: int, **fields: Any) -> tuple[Card, Path]:
        """The card and the folder of a student."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        recipe = Recipe.decode(
            {
                **COMMON,
                "data": f"rows:{self.folder / 'train.safetensors'}",
                "held_out": f"rows:{self.folder / 'held_out.safetensors'}",
                "seed": seed,
                **fields,
            },
            where="distill_seeds",
        )
        return train(recipe, out / "student", device="cpu").card, out / "student"

    def packed(self, folder: Path, method: str) -> float:
        """Nats per token of the student in `folder` once `method` has packed it."""
        loaded = load_model(folder, ModelSpec(dtype="float32"), resolve("cpu"))
        spec = catalogue.parse_method(method)
        nothing: dict[str, Any] = dict.fromkeys(("tokenizer", "step", "new_cache", "decode"))
        system = System(model=loaded.model, device=resolve("cpu"), context=LENGTH, **nothing)
        context: Any = Context(load=None, calibration=None, seed=0, dtype="float32")  # type: ignore[arg-type]
        model = catalogue.decode(spec.name, spec.params).apply(system, context).model
        rows = load_file(self.folder / "held_out.safetensors")
        tokens, weights = rows["tokens"].long(), rows["weights"][:, 1:].flatten()
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, :-1].float()
        each = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return float((each * weights).sum() / weights.sum())


def teaching(bench: Bench, seed: int) -> dict[str, Any]:
    """Forward KL against cross-entropy."""
    taught, _ = bench.train(seed, **TAUGHT, loss="forward_kl")
    alone, _ = bench.train(seed, **TAUGHT, loss="ce")
    return {
        "better": taught.checks[-1].nll,
        "worse": alone.checks[-1].nll,
        "kl_better": taught.checks[-1].kl,
        "kl_worse": alone.checks[-1].kl,
        "start": taught.checks[0].nll,
        "tokens": taught.training.tokens,
        "seconds": taught.training.seconds + alone.training.seconds,
    }


def dropping(bench: Bench, seed: int) -> dict[str, Any]:
    """Blocks of most influence against the first drawn ones that are others."""
    chosen, _ = bench.train(seed, **RECOVERED, student=f"layers:keep={KEPT},choose=influence")
    kept: Any = chosen.facts["layers"]
    best = tuple(kept["kept"])
    # A draw that happens to be the very choice says nothing about it.
    draws = (pick("random", BLOCKS, KEPT, seed=seed + 1000 * turn) for turn in itertools.count())
    drawn = next(blocks for blocks in draws if blocks != best)
    other, _ = bench.train(seed, **RECOVERED, student=f"layers:blocks={list(drawn)}")
    return {
        "better": chosen.checks[-1].nll,
        "worse": other.checks[-1].nll,
        "better_untouched": chosen.checks[0].nll,
        "worse_untouched": other.checks[0].nll,
        "influence": list(kept["influence"]),
        "chosen": list(best),
        "drawn": list(drawn),
        "seconds": chosen.training.seconds + other.training.seconds,
    }


def finish(bench: Bench, seed: int) -> dict[str, Any]:
    """Rounding in the forward pass of the last part, against none; both packed afterwards."""
    plain = {name: value for name, value in FINISHED.items() if name != "finish_share"}
    used, folder = bench.train(seed, **FINISHED, finish=INT3)
    not_used, other = bench.train(seed, **plain)
    return {
        "better": bench.packed(folder, INT3),
        "worse": bench.packed(other, INT3),
        "better_dense": used.checks[-1].nll,
        "worse_dense": not_used.checks[-1].nll,
        "seconds": used.training.seconds + not_used.training.seconds,
    }


CLAIMS: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "teaching": teaching,
    "dropping": dropping,
    "finish": finish,
}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each claim and state: in how many seeds it holds, and the figures."""
    lines = [f"{'claim':24} {'holds':>7}   nats per token, better against worse, by seed"]
    for claim, seeds in results.items():
        states = [""] + (["_untouched"] if claim == "dropping" else [])
        for state in states:
            pairs = [(s[f"better{state}"], s[f"worse{state}"]) for s in seeds.values()]
            holds = f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
            figures = "  ".join(
                f"{a:.3f} < {b:.3f}" if a < b else f"{a:.3f} ! {b:.3f}" for a, b in pairs
            )
            lines.append(f"{claim + state.replace('_', ', '):24} {holds:>7}   {figures}")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """What is there already, or the beginning of it."""
    digest = spec_digest(SETTINGS)
    fresh = {"settings": SETTINGS, "settings_digest": digest, "environment": None, "results": {}}
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else fresh
    if stored["settings_digest"] != digest:
        raise SystemExit(f"{path}: made with other settings; name another file.")
    return stored


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path("target"))


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", choices=tuple(CLAIMS), nargs="+", default=tuple(CLAIMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    document = read(args.out)
    document["environment"] = describe().model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for claim, seed in itertools.product(args.only, args.seeds):
            found = document["results"].setdefault(claim, {})
            if str(seed) in found:
                continue
            found[str(seed)] = CLAIMS[claim](bench, seed)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
            partial.replace(args.out)
            print(table(document["results"]), flush=True)
    print(table(document["results"]))


if __name__ == "__main__":
    main()
