"""All tasks: artefact, full cache and controls on the same prompts.

    reference   the model's own full cache, with the question in the prefill and behind it: the two ways
                differ by rounding alone, which is the noise floor
    removed     the full cache on the text without its needles: whoever still answers has guessed
    truncated   the full cache on the newest tokens only, as many as fit into the bytes of the artefact's
                cache: what forgetting the beginning would have cost

A judgement needs all of them: a loss against a reference that fails the task itself means nothing, and
neither does the lack of one where the text is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit import text as texts
from compresskit.errors import SpecError
from compresskit.quality.batches import silent
from compresskit.quality.long.answer import Answer, When, answer
from compresskit.quality.long.prompts import Prompt, build
from compresskit.quality.long.tasks import drafts
from compresskit.quality.tokens import alike
from compresskit.record import TaskAnswers, TaskQuality, TaskResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compresskit.quality.batches import Progress
    from compresskit.quality.long.tasks import Style
    from compresskit.spec import TaskName, TaskSpec
    from compresskit.system import System, Tokenizer

BOTH: tuple[When, ...] = ("aware", "agnostic")
_SHORT = 12


def judge(
    system: System,
    baseline: System | None,
    spec: TaskSpec,
    *,
    tiny: bool,
    seed: int,
    baseline_digest: str,
    progress: Progress = silent,
) -> TaskQuality:
    """Answer the tasks of `spec` with `system` and, unless it is the baseline itself, `baseline`.

    Args:
        system: the artefact.
        baseline: the uncompressed system with its own full cache, or None.
        spec: which tasks, how long, how many.
        tiny: the model is one of the shipped tiny ones, which know only their own language.
        seed: of the prompts.
        baseline_digest: the run that the reference is.
        progress: told after each prompt.

    Raises:
        SpecError: prompts do not fit the model's context, or needles not into a prompt.
        InputError: a chat template is asked for and there is none.
        RunError: logits are not finite.
    """
    style: Style = ("tiny" if tiny else "plain") if spec.style == "auto" else spec.style
    written = {
        task: write(system.tokenizer, task, spec, style=style, seed=seed)
        for task in dict.fromkeys(spec.names)
    }
    every = [prompt for prompts in written.values() for prompt in prompts]
    apart = baseline is not None and not all(
        alike(system.tokenizer, baseline.tokenizer, system.tokenizer.decode(list(one.context)))
        for one in every[:1]
    )
    longest = max(prompt.room for prompt in every)
    if longest > system.context:
        raise SpecError(
            f"quality.tasks: prompts of {spec.tokens} tokens with their answers take up to {longest}, "
            f"more than the model's context of {system.context}. Lower tokens."
        )
    done, results, notes = 0, list[TaskResult](), list[str]()
    for task, prompts in written.items():
        sheet = _Sheet(system, baseline, spec)
        # The same needles at the same depths, in as many tokens of the baseline's own.
        theirs = (
            write(baseline.tokenizer, task, spec, style=style, seed=seed)
            if baseline is not None and apart
            else prompts
        )
        for prompt, own in zip(prompts, theirs, strict=True):
            sheet.fill(prompt, own)
            done += 1
            progress("task prompts", done, len(every))
        results.append(sheet.result(task, prompts))
        if sheet.roomy:
            notes.append(
                f"{task}: no truncated control; the artefact's cache takes no fewer bytes than a "
                "full one"
            )
    if apart:
        notes.append(
            "the baseline has another tokenizer: its prompts have as many of its own tokens, so its texts "
            "are not equally long, and there is no truncated control"
        )
    return TaskQuality(
        protocol_id=_protocol(spec, style, seed, every),
        baseline_digest=None if baseline is None else baseline_digest,
        results=tuple(results),
        notes=tuple(notes),
    )


def write(
    tokenizer: Tokenizer, task: TaskName, spec: TaskSpec, *, style: Style, seed: int
) -> list[Prompt]:
    """The prompts of one task."""
    return [
        build(tokenizer, draft, spec.tokens, chat=spec.chat)
        for draft in drafts(
            task,
            style,
            samples=spec.samples,
            depths=spec.depths,
            needles=spec.needles,
            seed=seed,
        )
    ]


def truncated(prompt: Prompt, budget: int, when: When, bos: int | None) -> Prompt:
    """Leave the newest tokens of the text, so that `budget` tokens are there when it is compressed.

    The tokenizer's BOS stays in front and the question stays whole, whatever the budget.
    """
    front = prompt.context[:1] if prompt.context[:1] == (bos,) else ()
    question = len(prompt.questions[0].asked) if when == "aware" else 0
    room = max(0, budget - question - len(front))
    text = prompt.context[len(front) :]
    return prompt.over((*front, *text[max(0, len(text) - room) :]))


class _Sheet:
    """Answers to the prompts of one task, as they come in."""

    def __init__(self, system: System, baseline: System | None, spec: TaskSpec) -> None:
        self.system, self.baseline, self.spec = system, baseline, spec
        self.bos = texts.bos(system.tokenizer)
        self.answers: dict[str, list[Answer]] = {}
        self.reference: dict[str, list[Answer]] = {}
        self.controls: dict[str, list[Answer]] = {}
        self.left: dict[str, list[int]] = {}
        self.roomy = False
        """Some cache of the artefact was no smaller than a full one."""

    def fill(self, prompt: Prompt, theirs: Prompt) -> None:
        """Let everybody answer `prompt`; `theirs` is that prompt in the baseline's tokens."""
        full = self.system if self.baseline is None else self.baseline
        known = {when: answer(full, theirs, when) for when in BOTH}
        for when, found in known.items():
            self.reference.setdefault(when, []).append(found)
        bare = answer(full, theirs.over(theirs.without), "aware")
        self.controls.setdefault("removed", []).append(bare)
        for when in dict.fromkeys(self.spec.questions):
            if self.baseline is None:
                self.answers.setdefault(when, []).append(known[when])
                continue
            ours = answer(self.system, prompt, when)
            self.answers.setdefault(when, []).append(ours)
            if theirs is not prompt:
                continue
            if ours.held >= known[when].held:
                self.roomy = True
                continue
            budget = ours.seen * ours.held // known[when].held
            short = truncated(prompt, budget, when, self.bos)
            name = f"truncated_{when}"
            self.controls.setdefault(name, []).append(answer(full, short, "aware"))
            self.left.setdefault(name, []).append(len(short.context))

    def result(self, task: str, prompts: Sequence[Prompt]) -> TaskResult:
        """The task's entry in the record; a control that some prompts lack is left out."""
        whole = {name: found for name, found in self.controls.items() if len(found) == len(prompts)}
        return TaskResult(
            task=task,
            prompt_tokens=tuple(prompt.length for prompt in prompts),
            depths=tuple(prompt.depth for prompt in prompts),
            answers={when: _stored(found) for when, found in self.answers.items()},
            reference={when: _stored(found) for when, found in self.reference.items()},
            controls={
                name: _stored(found, self.left.get(name, ())) for name, found in whole.items()
            },
        )


def _stored(found: Sequence[Answer], left: Sequence[int] = ()) -> TaskAnswers:
    return TaskAnswers(
        scores=tuple(one.score for one in found),
        lengths=tuple(one.length for one in found),
        outputs_sha256=tuple(one.sha256 for one in found),
        context_tokens=tuple(left),
    )


def _protocol(spec: TaskSpec, style: Style, seed: int, prompts: Sequence[Prompt]) -> str:
    rows = [
        (*one.context, *(t for q in one.questions for t in (*q.asked, *q.lead))) for one in prompts
    ]
    return "/".join(
        (
            f"tasks-{style}",
            f"{spec.tokens}x{spec.samples}",
            f"needles={spec.needles}",
            "depths=" + ",".join(f"{depth:g}" for depth in spec.depths),
            f"seed={seed}",
            *(("chat",) if spec.chat else ()),
            f"ids=sha256:{texts.ids_sha256(rows)[:_SHORT]}",
        )
    )
