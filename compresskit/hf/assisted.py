"""transformers' own assisted generation, one step at a time: a second opinion on our loop.

    our decode loop (asks for a chunk) ◄── handover ──► thread with model.generate(streamer=...)

`generate` pushes tokens into a streamer; a loop that is timed from outside has to pull them. So
`generate` runs in a thread of its own, which waits inside the streamer until the next chunk is asked
for: at no time do both work.

What was drafted is read from the candidate generator that `generate` makes, what was accepted from
the tokens that it streams: its own count of matches is taken after a step was cut at a stop token,
and is then one short.
"""

from __future__ import annotations

import copy
import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compresskit.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from compresskit.system import Request

HOOK = "_get_candidate_generator"
"""What `generate` calls to get its drafter (transformers 5.17 to 5.23)."""


class Burst(NamedTuple):
    """What one step of `generate` delivered."""

    tokens: list[int]
    drafted: int
    accepted: int


class _Ended(Exception):
    """Whoever asked for chunks does not want any more."""


class _Streamer:
    """Hands tokens over to the asking thread, and waits until more are wanted."""

    def __init__(self) -> None:
        """Nothing is wanted yet."""
        self.wanted: queue.Queue[bool] = queue.Queue()
        self.chunks: queue.Queue[list[int] | None] = queue.Queue()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of a step; the first call brings the prompt."""
        if self.prompt:
            self.prompt = False
            return
        self.chunks.put(value.reshape(-1).tolist())
        self.wait()

    def end(self) -> None:
        """`generate` calls this last; the thread says so itself."""

    def wait(self) -> None:
        """Wait until a chunk is wanted; raise `_Ended` if none will be."""
        if not self.wanted.get():
            raise _Ended


def bursts(
    model: Any, request: Request, settings: Mapping[str, Any], **helpers: Any
) -> Generator[Burst]:
    """Generate greedily for the one row of `request`.

    settings: of the generation config, such as `prompt_lookup_num_tokens`. helpers: what else
    `generate` takes, such as `assistant_model`.

    Raises:
        Conflict: this version of transformers makes its drafters in another way.
    """
    if not hasattr(model, HOOK):
        import transformers

        raise Conflict(
            f"transformers {transformers.__version__} has no {HOOK}, from which drafts are read. Use "
            "a version from 5.17 to 5.23."
        )
    drafts: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    streamer = _Streamer()
    threads = torch.get_num_threads()

    def run() -> None:
        # OpenMP keeps this number for each thread.
        torch.set_num_threads(threads)
        streamer.wait()
        with _noting(model, drafts):
            _generate(model, request, settings, streamer, helpers)

    with ThreadPoolExecutor(1, "transformers-generate") as pool:
        job = pool.submit(run)
        job.add_done_callback(lambda _: streamer.chunks.put(None))
        try:
            while True:
                streamer.wanted.put(True)
                found = streamer.chunks.get()
                if found is None:
                    job.result()
                    return
                draft = drafts.get()
                yield Burst(found, len(draft), _common(found, draft))
        finally:
            streamer.wanted.put(False)


def _generate(
    model: Any,
    request: Request,
    settings: Mapping[str, Any],
    streamer: _Streamer,
    helpers: Mapping[str, Any],
) -> None:
    from transformers import GenerationConfig

    mask = torch.ones_like(request.tokens) if request.mask is None else request.mask
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.stop) or None,
        pad_token_id=0,
        **settings,
    )
    with _own_config(model, config):
        model.generate(
            request.tokens,
            attention_mask=mask.long(),
            generation_config=config,
            streamer=streamer,
            **helpers,
        )


@contextmanager
def drafting(model: Any, tokens: int) -> Iterator[None]:
    """Let `model`, as an assistant, draft exactly so many tokens a step."""
    config = copy.deepcopy(model.generation_config)
    config.num_assistant_tokens = tokens
    config.num_assistant_tokens_schedule = "constant"
    # transformers would end a draft at the first unsure token, and shift what is unsure as it goes.
    config.assistant_confidence_threshold = 0.0
    with _own_config(model, config):
        yield


@contextmanager
def _own_config(model: Any, config: Any) -> Iterator[None]:
    """Give `model` another generation config; afterwards it has its own, as it was."""
    own = model.generation_config
    before = own.to_dict()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        for name, value in before.items():
            if getattr(own, name, None) != value:
                setattr(own, name, value)


@contextmanager
def _noting(model: Any, drafts: queue.SimpleQueue[list[int]]) -> Iterator[None]:
    """Note every draft of the candidate generators that `model` makes meanwhile."""
    make = getattr(model, HOOK)

    def noting(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose = generator.get_candidates

        def get_candidates(ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
            proposed, scores = propose(ids, *rest, **options)
            drafts.put(proposed[0, ids.shape[1] :].tolist())
            return proposed, scores

        generator.get_candidates = get_candidates
        return generator

    setattr(model, HOOK, noting)
    try:
        yield
    finally:
        delattr(model, HOOK)


def _common(tokens: list[int], draft: list[int]) -> int:
    """Draft tokens that were emitted: what the target puts in place of a rejected one differs."""
    for place, (said, guessed) in enumerate(zip(tokens, draft, strict=False)):
        if said != guessed:
            return place
    return min(len(tokens), len(draft))
