"""The quality pass: likelihood, fidelity to the baseline, greedy continuations, long-context tasks.

    text ──► plan ──► scores of the artefact (beside the baseline's) ──► Likelihood, Fidelity
      └────► prompts ──► greedy continuations of both ──────────────────► GreedyComparison
    tasks ──► long prompts with needles ──► answers of both, and of controls ──► TaskQuality

What could not be measured is null, with the reason in `notes`: a system with another tokenizer than
its baseline is not compared token by token (see `tokens`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import text as texts
from compresskit.quality import greedy, protocol, tokens
from compresskit.quality.batches import noise_floor, score_alone, score_pair, silent
from compresskit.quality.fidelity import fidelity
from compresskit.quality.likelihood import likelihood
from compresskit.quality.long.judge import judge
from compresskit.record import GreedyComparison, Quality

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.quality.batches import Progress
    from compresskit.quality.protocol import Plan
    from compresskit.spec import QualitySpec
    from compresskit.system import System


def evaluate(
    system: System,
    baseline: System | None,
    spec: QualitySpec,
    *,
    cache_changed: bool,
    batch_allowed: bool,
    baseline_digest: str,
    tiny: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Quality:
    """Score `system`, and its distance from `baseline` unless it is the baseline itself (None).

    Args:
        system: the artefact.
        baseline: the uncompressed system, with its own cache; it may share the model.
        spec: text and protocol.
        cache_changed: what the cache gives back differs from what was put in, so that only a walk
            through it shows the loss.
        batch_allowed: several windows or prompts may go through the artefact together.
        baseline_digest: the run that the fidelity is relative to.
        tiny: the model is one of the shipped tiny ones: tasks speak their language.
        seed: of the tasks' prompts.
        progress: told after each batch.

    Raises:
        InputError: the text cannot be used or is too short.
        SpecError: a window or a task's prompt is longer than the model's context.
        RunError: the logits are not finite.
    """
    text = texts.load(spec.text)
    plan = protocol.plan(
        system, text, spec, cache_changed=cache_changed, batch_allowed=batch_allowed
    )
    scored_bytes = plan.scored_bytes(system)
    notes = list(_notes(plan, spec, cache_changed=cache_changed))
    tasks = None
    if spec.tasks is not None:
        tasks = judge(
            system,
            baseline,
            spec.tasks,
            tiny=tiny,
            seed=seed,
            baseline_digest=baseline_digest,
            progress=progress,
        )
    if baseline is None:
        found = likelihood(score_alone(system, plan, progress), plan, scored_bytes)
        notes.append("no fidelity: this run is its own baseline")
        return Quality(likelihood=found, tasks=tasks, notes=tuple(notes))
    if not tokens.alike(system.tokenizer, baseline.tokenizer, text.content):
        found = likelihood(score_alone(system, plan, progress), plan, scored_bytes)
        notes.append(tokens.apart(plan, scored_bytes))
        return Quality(likelihood=found, tasks=tasks, notes=tuple(notes))
    if (ours := tokens.width(system)) != (theirs := tokens.width(baseline)):
        notes.append(
            f"fidelity: unavailable, the two heads have {ours} and {theirs} places for the same tokens"
        )
        return Quality(
            likelihood=likelihood(score_alone(system, plan, progress), plan, scored_bytes),
            greedy=_greedy(system, baseline, plan, spec, progress, batch_allowed=batch_allowed),
            tasks=tasks,
            notes=tuple(notes),
        )
    compared = score_pair(system, baseline, plan, progress)
    notes.append(noise_floor(baseline, plan))
    if cache_changed and not compared.kl.any():
        notes.append(
            f"the changed cache made no difference: windows of {plan.inputs} tokens may be shorter "
            "than what it keeps; raise prefill to see its cost"
        )
    return Quality(
        likelihood=likelihood(compared.nll, plan, scored_bytes),
        fidelity=fidelity(compared, plan, baseline_digest),
        greedy=_greedy(system, baseline, plan, spec, progress, batch_allowed=batch_allowed),
        tasks=tasks,
        notes=tuple(notes),
    )


def _notes(plan: Plan, spec: QualitySpec, *, cache_changed: bool) -> Iterator[str]:
    if spec.protocol == "window" and cache_changed:
        yield (
            "the window protocol scores one forward pass per window: a cache that compresses "
            "after it is not measured; use protocol split"
        )
    if plan.first and len(plan.rows) < spec.windows:
        yield f"the text gives {len(plan.rows)} windows instead of {spec.windows}"
    if not plan.first and plan.scored_tokens < spec.tokens:
        yield f"{plan.scored_tokens} tokens scored instead of {spec.tokens}: whole windows only"


def _greedy(
    system: System,
    baseline: System,
    plan: Plan,
    spec: QualitySpec,
    progress: Progress,
    *,
    batch_allowed: bool,
) -> GreedyComparison | None:
    prompts = protocol.openings(system, plan, spec)
    size = protocol.LARGEST_BATCH if batch_allowed else 1
    ours: list[list[int]] = []
    theirs: list[list[int]] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        ours += greedy.continue_greedily(system, batch, spec.greedy_tokens)
        theirs += greedy.continue_greedily(baseline, batch, spec.greedy_tokens)
        progress("greedy prompts", len(ours), len(prompts))
    return greedy.compare(ours, theirs, spec.greedy_tokens) if ours else None
