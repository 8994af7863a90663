"""Refuse draft models that cannot work for a target, from their folders alone.

What a draft says is checked by the target, so a wrong one would not spoil the output; it would be
slow for a reason that no figure names. Hence the refusals before any weight is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.errors import Conflict
from compresskit.hf import modules
from compresskit.hf.load import has_recurrent_state
from compresskit.hf.tokenizer import vocabulary
from compresskit.traits import Trait

if TYPE_CHECKING:
    from pydantic import JsonValue

    from compresskit.method import Outline
    from compresskit.system import System


NEEDED = frozenset({Trait.ROLLBACK, Trait.LOGITS, Trait.OWN_LOOP})
"""What the draft's own stack has to leave it."""


def refuse_unable(target: Outline, draft: Outline) -> None:
    """Raise `Conflict` if `draft` is larger than `target` or cannot take tokens back."""
    if draft.bytes > target.bytes:
        raise Conflict(
            f"the draft {draft.name} is larger than {target.name}, which it should save work "
            f"({draft.bytes} against {target.bytes} bytes of weights). Take a smaller draft."
        )
    if has_recurrent_state(dict(draft.config)):
        raise Conflict(
            f"the draft {draft.name} keeps a recurrent state, which cannot take rejected tokens back. "
            "Take a draft whose layers are all attention."
        )


def refuse_other_tokens(target: Outline, draft: Outline) -> None:
    """Raise `Conflict` if the two models do not mean the same by the same token id."""
    ours, theirs = vocabulary(target.path), vocabulary(draft.path)
    if ours != theirs:
        differing = {token for token, _ in ours.items() ^ theirs.items()}
        raise Conflict(
            f"the draft {draft.name} has another vocabulary than {target.name} ({len(theirs)} and "
            f"{len(ours)} tokens, {len(differing)} of them with different ids). Take a draft of the "
            "same tokenizer, or speculative/reencoded, which goes by text."
        )


def named(name: str, draft: System) -> dict[str, JsonValue]:
    """What a record says about a draft that was loaded: facts to be added to the target's."""
    return {
        "draft_model": {
            "name": name,
            "parameters": modules.parameter_count(draft.model),
            "weight_bytes": modules.weight_bytes(draft.model),
        }
    }
