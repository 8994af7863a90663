"""Formulae over the arrival times of one repetition; None where a repetition lacks the number."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compresskit.record import Sample


class Timed(NamedTuple):
    """One repetition with the shape of its batch."""

    sample: Sample
    batch: int
    prompt_tokens: float

    @property
    def tokens(self) -> int:
        """n: tokens delivered to each row."""
        return sum(arrival.tokens for arrival in self.sample.arrivals)

    @property
    def chunks(self) -> int:
        """c: how often tokens arrived."""
        return len(self.sample.arrivals)

    @property
    def first(self) -> float:
        """t1, in seconds."""
        return self.sample.arrivals[0].seconds

    @property
    def last(self) -> float:
        """tn, in seconds."""
        return self.sample.arrivals[-1].seconds


def ttft_s(one: Timed) -> float | None:
    """Time from request to first token: t1 - t0."""
    return one.first if one.chunks else None


def e2e_s(one: Timed) -> float | None:
    """Time from request to last token: tn - t0."""
    return one.last if one.chunks else None


def decode_s(one: Timed) -> float | None:
    """Time of decoding: tn - t1, where more than one token was delivered and time has passed."""
    return one.last - one.first if one.tokens > 1 and one.last > one.first else None


def tpot_s(one: Timed) -> float | None:
    """Time per output token after the first: (tn - t1) / (n - 1)."""
    span = decode_s(one)
    return None if span is None else span / (one.tokens - 1)


def gaps_s(one: Timed) -> list[float]:
    """Times between neighbouring chunks; the wait for the first chunk is not among them."""
    times = [arrival.seconds for arrival in one.sample.arrivals]
    return [after - before for before, after in pairwise(times)]


def step_s(one: Timed) -> float | None:
    """Time per decode step: (tn - t1) / (c - 1)."""
    span = decode_s(one)
    return None if span is None or one.chunks < 2 else span / (one.chunks - 1)


def decode_rate(one: Timed) -> float | None:
    """Decode rate of one row: (n - 1) / (tn - t1)."""
    span = decode_s(one)
    return None if span is None else (one.tokens - 1) / span


def decode_rate_of_batch(one: Timed) -> float | None:
    """Decode rate of all rows: b (n - 1) / (tn - t1)."""
    rate = decode_rate(one)
    return None if rate is None else one.batch * rate


def prefill_rate(one: Timed) -> float | None:
    """Prefill rate of all rows: b P / ttft."""
    return one.batch * one.prompt_tokens / one.first if one.chunks and one.first > 0 else None
