"""Ctrl-C and SIGTERM as a wish: heard at the end of a step, when the state can be saved whole."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Listens while it is entered; the second Ctrl-C does what it always does."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Begin to listen; only the main thread is asked at all."""
        if threading.current_thread() is threading.main_thread():
            # What is ignored (a job in the background, nohup) stays so, and what is not Python's too.
            heard = [one for one in _SIGNALS if signal.getsignal(one) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._heard) for number in heard}
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave signals as they were."""
        self._restore()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
