"""Golden records, and ways to change one thing in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit import store
from compresskit.compare import compare
from compresskit.record import Record

GOLDEN = Path(__file__).parents[2] / "golden" / "records"
WINDOWS = 8
TOKENS = 64
# Differences between windows and between repetitions: small, without a trend.
WAVES = (0.00, 0.04, -0.03, 0.02, -0.05, 0.01, 0.03, -0.02)


class Bench:
    """Builds records of a new session that differ from the golden one as a test wants."""

    def golden(self, name: str, schema: str = "v2") -> Record:
        """A stored record, with as many quality windows as a real run has."""
        record = store.load(GOLDEN / schema / f"synthetic-{name}.json")
        if schema == "v1" or record.quality is None:
            return record
        return self.windows(record)

    def windows(
        self, record: Record, *, nll: float = 0.0, kl: float = 0.0, top1: int = 0
    ) -> Record:
        """Give every window another likelihood, divergence or number of agreements."""
        quality, tokens = record.quality, (TOKENS,) * WINDOWS
        likelihood = quality.likelihood.model_copy(
            update={"window_nll": tuple(3 + wave + nll for wave in WAVES), "window_tokens": tokens}
        )
        fidelity = quality.fidelity and quality.fidelity.model_copy(
            update={
                "window_kl": tuple(0.002 * (1 + wave) + kl for wave in WAVES),
                "window_top1": tuple(60 + top1 for _ in WAVES),
                "window_tokens": tokens,
            }
        )
        update = {"likelihood": likelihood, "fidelity": fidelity}
        return record.model_copy(update={"quality": quality.model_copy(update=update)})

    def block(self, record: Record, **changes: object) -> Record:
        """Change fields of the only block."""
        block = record.blocks[0].model_copy(update=changes)
        return record.model_copy(update={"blocks": (block,)})

    def passes(self, record: Record, **changes: object) -> Record:
        """Change passes of the only block."""
        return self.block(record, passes=record.blocks[0].passes.model_copy(update=changes))

    def memory(self, record: Record, **changes: object) -> Record:
        """Change the memory pass."""
        memory = record.blocks[0].passes.memory.model_copy(update=changes)
        return self.passes(record, memory=memory)

    def samples(self, record: Record, change, *, keep: int | None = None) -> Record:
        """Apply `change(sample, index)` to every repetition of both speed passes."""

        def changed(one):
            found = tuple(change(sample, i) for i, sample in enumerate(one.samples[:keep]))
            return one.model_copy(update={"samples": found})

        passes = record.blocks[0].passes
        return self.passes(
            record,
            latency=changed(passes.latency),
            throughput=tuple(changed(one) if one.samples else one for one in passes.throughput),
        )

    def slower(self, record: Record, factor: float, *, waited: float = 0.0, keep=None) -> Record:
        """Scale all times; `waited` is the share of the result that was spent in a run queue."""

        def change(sample, index):
            arrivals = tuple(a._replace(seconds=a.seconds * factor) for a in sample.arrivals)
            update = {"arrivals": arrivals, "waited": arrivals[-1].seconds * waited}
            return sample.model_copy(update=update)

        return self.samples(record, change, keep=keep)

    def later(self, record: Record, *, pace: float = 1.0) -> Record:
        """The record as of another session, on a machine whose yardstick took `pace` times as long."""
        turns = tuple(
            turn.model_copy(update={"yardstick": turn.yardstick * pace})
            for turn in record.blocks[0].turns
        )
        return self.block(record, pair="another-session", turns=turns)

    def judge(self, base: Record, new: Record, **options):
        """Compare two records; outcomes by metric."""
        found = compare([base], [new], **options)
        assert not found.refused, found.refused
        return {outcome.metric: outcome for outcome in found.rows[0].outcomes}

    def refusal(self, base: Record, new: Record) -> str:
        """Compare two records that must not be compared; the reason."""
        found = compare([base], [new])
        assert not found.rows
        return found.refused[0].reason


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()
