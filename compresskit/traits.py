"""Facts about a system, and how a method changes them.

A stack of methods is legal when every method finds the traits that it requires. The algebra is
`traits = (traits - removes) | adds`, one method after the other (a trait may also stay on a
condition, `only_with`); `compresskit.stack` does it and
`compresskit explain` prints it. The vocabulary is closed: a new trait is a design decision.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Trait(StrEnum):
    """One fact about a system."""

    MODULES = "modules"
    """The weights are reachable as torch modules."""
    FLOAT_WEIGHTS = "float_weights"
    """The linear layers still hold floating-point weights."""
    TRAINED = "trained"
    """The weights were trained, so what the model says depends on the text as a model's answers do."""
    MOE = "moe"
    """The model has routed experts."""
    OWN_CACHE = "own_cache"
    """The key/value cache can be replaced by layers of ours."""
    DENSE_CACHE = "dense_cache"
    """The cache holds floats, one slot per token."""
    FULL_CONTEXT = "full_context"
    """No token has been dropped from the cache."""
    ROLLBACK = "rollback"
    """The cache crops exactly, so rejected tokens can be taken back."""
    SLOT_MASKS = "slot_masks"
    """Attention goes by mask and position alone, so any slot of the cache may be masked out: no
    sliding window, no recurrent state, nothing that takes a slot's number for a position."""
    STATIC_SHAPES = "static_shapes"
    """Shapes stay the same from step to step, so a step can be compiled or captured."""
    ATTENTION_HOOK = "attention_hook"
    """An attention function of ours can be registered."""
    OWN_LOOP = "own_loop"
    """Decoding runs in our loop."""
    LOGITS = "logits"
    """The next-token logits are visible."""
    BATCH = "batch"
    """More than one sequence at a time."""
    PADDED_BATCH = "padded_batch"
    """Sequences of different lengths, left-padded, give the same tokens as alone."""
    VERBATIM_PROMPT = "verbatim_prompt"
    """The model sees the prompt as the user wrote it."""
    SINGLE_MODEL = "single_model"
    """One model answers every request."""
    FRESH = "fresh"
    """The answer is computed now, not taken from a store."""
    LOSSLESS = "lossless"
    """Greedy tokens equal those of the empty stack (float32)."""
    CUDA = "cuda"
    BF16 = "bf16"
    """The device multiplies bfloat16 in hardware."""
    FP8 = "fp8"
    TRITON = "triton"


class Effects(BaseModel):
    """What a method needs of the system before it, and what it leaves to the one after it.

    Sets have no stable order, so `Effects` never enters a digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requires: frozenset[Trait] = frozenset()
    excludes: frozenset[Trait] = frozenset()
    removes: frozenset[Trait] = frozenset()
    adds: frozenset[Trait] = frozenset()
    only_with: tuple[tuple[Trait, Trait], ...] = ()
    """Pairs: the first trait stays only where the second one holds."""

    def after(self, before: frozenset[Trait]) -> frozenset[Trait]:
        """Return the traits that hold once the method has been applied to `before`."""
        lost = {trait for trait, needed in self.only_with if needed not in before}
        return (before - self.removes - lost) | self.adds


INITIAL = frozenset({Trait.LOSSLESS, Trait.FRESH, Trait.SINGLE_MODEL, Trait.VERBATIM_PROMPT})
"""What holds of every empty stack, whatever the engine and the device."""
