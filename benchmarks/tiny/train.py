"""Train the shipped tiny models: one command, one core, well under an hour, always resumable.

    python benchmarks/tiny/train.py all                    # target, moe, draft, into the package
    python benchmarks/tiny/train.py target --share 0.05    # a rough model within two minutes
    python benchmarks/tiny/train.py draft --no-resume      # forget the checkpoint, start again

The draft is a student of the target, taught by compresskit itself (see `draft`). The loop for the
others is plain: Muon and AdamW, warm-up and cosine, gradients clipped at 1, matrix products in
bfloat16 and everything else in float32. A curriculum lengthens the context (see `STAGES`). Checkpoints
are replaced atomically every `SAVE_EVERY` steps, and data and order follow from the step number alone,
so an interrupted run continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny.draft import teach as teach_draft
from benchmarks.tiny.models import ROLES, Role, build_model
from benchmarks.tiny.rows import Rows, Stage, load_or_pack
from benchmarks.tiny.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
SEED = 20
STAGES = (
    Stage("pairs", 0, 128, 16, 700, 270, 4, 20, stated_weight=0, drills=4, lesson="pairs"),
    Stage("drill", 2_000_000, 128, 16, 200, 270, 4, 12, stated_weight=0, drills=3),
    Stage("long", 4_000_000, 512, 4, 600, 1100, 3, 8, drills=1),
    Stage("longest", 5_000_000, 1024, 2, 60, 2100, 3, 8, drills=1),
    Stage("last", 6_000_000, 512, 4, 540, 1100, 2, 4),
)
SHARES: dict[Role, float] = {"target": 1.0, "moe": 0.8}
"""Part of each stage's steps that a role trains for."""
OTHERS_RATE = {"pairs": 0.2, "drill": 0.2}
"""Learning rate of AdamW (embedding, gains, feed-forward) as a part of Muon's, by stage; then 0.7.
Slow until recall is learned (see `optimizers_of`), faster for the ordinary text that follows."""
PEAK_RATE: dict[Role, float] = {"target": 3e-3, "moe": 3e-3}
WARMUP, FLOOR = 100, 0.03
"""Warm-up steps; the last learning rate as a part of the peak."""
SAVE_EVERY, PRINT_EVERY = 200, 50


def schedule(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then half a cosine down to `FLOOR`."""
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return float(peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + np.cos(np.pi * share))))


def plan(share: float) -> list[tuple[Stage, int]]:
    """Return the curriculum as (stage, step inside the stage), one entry a training step."""
    return [(stage, step) for stage in STAGES for step in range(max(1, round(stage.steps * share)))]


def batch(rows: Rows, stage: Stage, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and loss weights of one step, both [batch, context]."""
    window = slice(step * stage.batch, (step + 1) * stage.batch)
    return (
        torch.from_numpy(rows.tokens[window].astype(np.int64)),
        torch.from_numpy(rows.weights[window].astype(np.float32)),
    )


def loss_of(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Return the loss to descend and the plain weighted cross-entropy, in nats a token."""
    sparse = hasattr(model.config, "num_local_experts")
    extra = {"output_router_logits": True} if sparse else {}
    weight = weights[:, 1:].reshape(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=tokens, use_cache=False, **extra)
    logits = out.logits[:, :-1].float().flatten(0, 1)
    each = functional.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="none")
    plain = (each * weight).sum() / weight.sum()
    loss = plain
    if sparse:
        loss = loss + model.config.router_aux_loss_coef * out.aux_loss
    return loss, plain.item()


def optimizers_of(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the attention matrices and a slower AdamW for everything else.

    Recall is the work of attention heads that find a name and then the place beside it. In
    short trials Muon found them in far fewer steps than AdamW, and only when everything else moved
    slowly at first; with equal rates the models stayed at guessing among the values in sight.
    (The causes were not separated: embedding spread, rates and optimizer changed together.)
    """
    heads, others = [], []
    for name, parameter in model.named_parameters():
        (heads if "self_attn" in name else others).append(parameter)
    return [
        torch.optim.Muon(
            heads, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4
        ),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(role: Role, *, out: Path, work: Path, share: float, resume: bool) -> dict[str, Any]:
    """Train one model, save it under `out/<role>` and return the account of it."""
    tokenizer = train_tokenizer()
    model = build_model(role, SEED)
    optimizers = optimizers_of(model)
    steps = plan(share * SHARES[role])
    checkpoint = work / f"{role}-{share:g}.pt"
    done, seconds, curve, data = 0, 0.0, list[dict[str, float]](), dict[str, str]()
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        done, seconds, curve, data = state["done"], state["seconds"], state["curve"], state["data"]
        print(f"{role}: resuming at step {done} of {len(steps)}", flush=True)

    def store(done: int) -> float:
        elapsed = seconds + time.perf_counter() - started
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "done": done,
            "seconds": elapsed,
            "curve": curve,
            "data": data,
        }
        save(checkpoint, state)
        return elapsed

    model.train()
    tokens_seen = sum(stage.context * stage.batch for stage, _ in steps[:done])
    started, recent = time.perf_counter(), list[float]()
    for step, (stage, rows) in enumerate(_with_rows(steps, tokenizer, work / "rows", data)):
        if step < done:
            continue
        tokens, weights = batch(rows, stage, steps[step][1])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                slow = isinstance(optimizer, torch.optim.AdamW)
                part = OTHERS_RATE.get(stage.name, 0.7) if slow else 1.0
                group["lr"] = part * schedule(step, len(steps), PEAK_RATE[role])
        loss, plain = loss_of(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        recent.append(plain)
        tokens_seen += tokens.numel()
        last = step + 1 == len(steps)
        if (step + 1) % PRINT_EVERY == 0 or last:
            elapsed = seconds + time.perf_counter() - started
            mean = sum(recent) / len(recent)
            recent.clear()
            answers = answer_accuracy(model, tokens, weights)
            curve.append({"step": step + 1, "tokens": tokens_seen, "loss": round(mean, 4)})
            print(
                f"{role} {step + 1}/{len(steps)} {stage.name} loss {mean:.4f} "
                f"answers {answers:.2f} {elapsed:.0f} s",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or last:
            elapsed = store(step + 1)
            seconds, started = elapsed, time.perf_counter()
    model.eval().save_pretrained(out / role)
    # safetensors leaves the file readable by its owner alone; a package's data is for everyone.
    (out / role / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out / role)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(steps),
        "tokens": tokens_seen,
        "seconds": round(seconds, 1),
        "peak_learning_rate": PEAK_RATE[role],
        "rows_sha256": data,
        "loss_weighted_nats_per_token": curve[:: max(1, len(curve) // 60)],
    }


def _with_rows(
    steps: list[tuple[Stage, int]],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    data: dict[str, str],
) -> Iterator[tuple[Stage, Rows]]:
    """Return each step's stage with its rows, holding one stage in memory; fill in `data`."""
    current: Stage | None = None
    for stage, _ in steps:
        if stage is not current:
            current, rows = stage, load_or_pack(tokenizer, stage, folder)
            data[stage.name] = rows.digest
        yield stage, rows


@torch.no_grad()
def answer_accuracy(model: PreTrainedModel, tokens: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the share of answer tokens of this batch that the model puts first (1 if none)."""
    marked = weights[:, 1:] > 1
    if not marked.any():
        return 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        best = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    return (best == tokens[:, 1:])[marked].float().mean().item()


def machine() -> dict[str, Any]:
    """Describe the machine by what decides speed; no name that identifies it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "gpu": None, "threads": torch.get_num_threads()}


def note(out: Path, role: Role, account: dict[str, Any], share: float) -> None:
    """Add `account` to `training.json` beside the weights."""
    path = out / "training.json"
    stored = json.loads(path.read_text()) if path.exists() else {"models": {}}
    stored["recipe"] = {
        "command": "python benchmarks/tiny/train.py all",
        "seed": SEED,
        "share": share,
        "optimizer": "Muon on attention, AdamW on the rest; gradient norm clipped at 1",
        "precision": "float32 weights, bfloat16 autocast",
        "stages": [vars(stage) for stage in STAGES],
    }
    stored["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine(),
    }
    stored["models"][role] = account
    path.write_text(json.dumps(stored, indent=1, sort_keys=True, allow_nan=False) + "\n")


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("role", choices=(*ROLES, "all"))
    parser.add_argument("--out", type=Path, default=ROOT / "compresskit" / "assets" / "tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny", help="checkpoints")
    parser.add_argument("--share", type=float, default=1.0, help="part of the full training")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for role in ROLES if args.role == "all" else (args.role,):
        made = teach_draft if role == "draft" else partial(train, role)
        account = made(out=args.out, work=args.work, share=args.share, resume=args.resume)
        note(args.out, role, account, args.share)
        print(f"{role}: saved to {args.out / role}, {account['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
