"""Whether two systems can be compared token by token.

KL, top-1 agreement, the difference of NLL and greedy continuations put the n-th token of one system
beside the n-th of the other. That takes one tokenizer. A student with a vocabulary of its own cuts
the same text elsewhere: bits per byte, and answers to tasks, are what is left to compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.hf.tokenizer import HFTokenizer

if TYPE_CHECKING:
    from compresskit.quality.protocol import Plan
    from compresskit.system import System, Tokenizer


def alike(one: Tokenizer, other: Tokenizer, text: str) -> bool:
    """Whether both mean the same by the same ids, and cut `text` into the same ones."""
    if one is other:
        return True
    if (
        isinstance(one, HFTokenizer)
        and isinstance(other, HFTokenizer)
        and one.inner.get_vocab() != other.inner.get_vocab()
    ):
        return False
    return all(
        one.encode(text, special=special) == other.encode(text, special=special)
        for special in (False, True)
    )


def width(system: System) -> int | None:
    """Tokens that the model's logits have a place for, by its config."""
    found = getattr(system.model.config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) else None


def apart(plan: Plan, scored_bytes: int) -> str:
    """What a reader has to know of the likelihood of a system with another tokenizer."""
    share = scored_bytes / max(1, len(plan.text.content.encode()))
    return (
        "fidelity and greedy continuations: unavailable, the baseline has another tokenizer; compare "
        "bits per byte and tasks. Windows are counted in tokens, so the two scored different stretches "
        f"of the text ({scored_bytes} bytes here, {share:.2%} of it); protocol window with as many "
        "tokens as the text has scores all of it under both"
    )
