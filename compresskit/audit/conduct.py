"""One audit from beginning to end.

plain system ──► prompts ──► cells ─┐
                                    ├──► checks ──► verdict
answer, the loop under test ────────┘
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.audit import cells as exactly, prompts as pieces, rule as rules
from compresskit.audit.answer import loop
from compresskit.audit.document import DEEP, SHALLOW, Audit
from compresskit.audit.greedy import greedy
from compresskit.audit.sampled import AGAIN, enough, sampled
from compresskit.audit.stops import stops
from compresskit.audit.verdict import convincing, idle, suspicious, verdict
from compresskit.decode import autoregressive
from compresskit.hf.load import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from compresskit.audit.answer import Answer
    from compresskit.audit.cells import Cells
    from compresskit.audit.document import Asked, SampledCheck
    from compresskit.method import Progress
    from compresskit.system import System


def plainly(system: System) -> System:
    """The same model, step and cache, decoding one token at a time."""
    return replace(system, decode=autoregressive)


def laws(plain: System, asked: Asked, prompts: Sequence[Sequence[int]] = ()) -> list[Cells]:
    """The exact cells that answers are tested against; none at temperature 0.

    prompts: what to draw from, instead of the most uncertain pieces of the embedded text. Cells
    depend on the model, the sampling, the batch, the depth and the seed alone, so several loops can share them.
    """
    if asked.sampling.temperature == 0:
        return []
    count = min(asked.batch, pieces.SAMPLED)
    if not prompts:
        many = pieces.candidates(plain, asked, pieces.CANDIDATES)
        prompts = pieces.uncertain(plain, many, asked, count)
        prompts = pieces.ragged(prompts) if asked.batch > 1 else prompts
    return [exactly.exact(plain, prompt, asked.sampling, asked.window) for prompt in prompts]


def conduct(
    answer: Answer,
    plain: System,
    asked: Asked,
    *,
    label: str,
    model: str,
    mode: str = "eager",
    digest: str | None = None,
    law: Callable[[Asked], Sequence[Cells]] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    rule: bool = True,
    identity: bool = True,
    progress: Progress | None = None,
) -> Audit:
    """Audit `answer` against `plain`.

    law: gives the cells, instead of `laws`; prompts: of the greedy part, instead of pieces of the
    embedded text. rule: whether the loop goes by our rule of acceptance; identity: whether to
    compare greedy answers and stops.
    """
    tell = progress or (lambda label, done, total: None)
    notes: list[str] = []
    if not rule:
        notes.append("rule: not looked at, the loop has its own")
    checked = rules.check() if rule else None
    reference = loop(plain)
    dtype = dtype_name(plain.model)
    same = ends = None
    if identity:
        rows = list(prompts) or pieces.candidates(plain, asked, asked.prompts)
        rows = pieces.ragged(rows) if asked.batch > 1 and not prompts else rows
        tell("greedy", 0, 2)
        same, busiest = greedy(
            answer, plain, reference, rows, new=asked.greedy_tokens, batch=asked.batch
        )
        tell("greedy", 1, 2)
        few = [rows[busiest[row % len(rows)]] for row in range(asked.batch)]
        ends = stops(
            answer, plain, reference, few, new=asked.greedy_tokens, exact=dtype == "float32"
        )
    else:
        notes.append("greedy and stops: not asked for")
    test = again = None
    if asked.sampling.temperature > 0:
        give = law or (lambda asked: laws(plain, asked))
        test, again = _drawn(answer, plain, asked, give, dtype, tell)
        odd = convincing(test, asked, dtype) or (again is not None and suspicious(again, asked))
        if asked.depth is None and idle(test) and not odd:
            notes.append(
                f"sampled: {SHALLOW} tokens met a draft in {test.touched} of {test.draws} answers, so "
                f"{DEEP} were taken together"
            )
            deeper = asked.model_copy(update={"depth": DEEP})
            test, again = _drawn(answer, plain, deeper, give, dtype, tell)
    else:
        notes.append("sampled: temperature 0 draws nothing")
    word, reasons = verdict(checked, same, ends, test, again, asked, dtype)
    return Audit(
        label=label,
        model=model,
        device=plain.device.name,
        mode=mode,
        dtype=dtype,
        digest=digest,
        asked=asked,
        rule=checked,
        greedy=same,
        stops=ends,
        sampled=test,
        again=again,
        notes=tuple(notes),
        verdict=word,
        reasons=tuple(reasons),
    )


def _drawn(
    answer: Answer,
    plain: System,
    asked: Asked,
    law: Callable[[Asked], Sequence[Cells]],
    dtype: str,
    tell: Progress,
) -> tuple[SampledCheck, SampledCheck | None]:
    """The test, and the second one that an inconclusive suspicion asks for."""
    cells = law(asked)
    draws = asked.draws or enough(cells, asked)
    device: torch.device = plain.device.torch
    first = 1 + asked.seed * 10_000_000
    tell("sampled", 0, draws)
    test = sampled(answer, cells, asked, draws, device, first_seed=first)
    if not suspicious(test, asked) or convincing(test, asked, dtype):
        return test, None
    tell("sampled again", 0, AGAIN * draws)
    return test, sampled(answer, cells, asked, AGAIN * draws, device, first_seed=first + draws)
