"""What the trainer asks of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from compresskit.distill.batch import Batch, Target
    from compresskit.distill.losses.term import Kind


class Teacher(Protocol):
    """Says of each place of a batch what comes next."""

    @property
    def kind(self) -> Kind:
        """The form of its targets, the same for every batch."""

    @property
    def tokens_read(self) -> int:
        """Tokens that a model has read for it so far, repeated ones as often as they were read."""

    def targets(self, batch: Batch) -> Target:
        """What the teacher says of the `N = B * (L - 1)` places of `batch`, on the batch's device.

        Raises:
            SpecError: it can say nothing of such a batch.
        """
