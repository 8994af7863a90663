"""One child process per run: a fresh allocator, no leftovers, and a crash stays its own.

    parent                                   child: python -m compresskit.isolate
      {"spec": ..., "pair": ...} ── stdin ────►
      ◄──── stdout: one JSON event a line ───── {"phase": "load", "detail": ""}
      ◄──────────────────────────────────────── {"ready": true}       asks for a turn
      {"round": 0, "position": 1} ────────────►
      ◄──────────────────────────────────────── {"ready": true}       that turn is over
      {"end": true} ──────────────────────────►
      ◄──────────────────────────────────────── {"record": {...}} or {"usage_error": "..."}

Between its turns a child sleeps in a read, so several of them can alternate on one machine. The
parent blocks on the pipe and never polls, so waiting costs the measurement nothing. Whatever a
library prints in the child goes to a log that is only shown if the child dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from compresskit import runner
from compresskit.artefact import silent
from compresskit.errors import UsageError
from compresskit.record import Record
from compresskit.runner import Go
from compresskit.spec import RunSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compresskit.artefact import Notify

_LOG_TAIL = 400
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_SECONDS = 2.0


class Child:
    """A run in a process of its own, which takes its turns when it is told to."""

    def __init__(
        self,
        spec: RunSpec,
        notify: Notify = silent,
        *,
        pair: str | None = None,
        speed_only: bool = False,
    ) -> None:
        """Say what to run; the process starts on entering the context."""
        self.spec = spec
        self._notify = notify
        self._order = {
            "spec": spec.model_dump(mode="json"),
            "pair": pair,
            "speed_only": speed_only,
        }
        self._record: Record | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        """Start the process; it begins to load at once."""
        with ExitStack() as opening:
            self._log = opening.enter_context(
                tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            )
            self._process = opening.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "compresskit.isolate"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                    env=_environment(self.spec),
                )
            )
            # From here on the process is ended whatever happens, Ctrl-C in this very line included.
            opening.callback(self._end)
            self._tell(self._order)
            self._resources = opening.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process, whatever it is doing."""
        self.close()

    def close(self) -> None:
        """End the process; one that has given its record is let go. May be called twice."""
        self._resources.close()

    def _end(self) -> None:
        if self._record is None:
            self._process.kill()

    def ready(self) -> bool:
        """Wait until the child asks for a turn; False if its run is over already.

        Raises:
            UsageError: the child found that the request cannot be honoured.
        """
        if self._record is not None:
            return False
        for event in self._events():
            if "ready" in event:
                return True
            if "usage_error" in event:
                raise UsageError(event["usage_error"])
            if "record" in event:
                self._record = Record.model_validate_json(json.dumps(event["record"]))
                return False
            self._notify(event["phase"], event["detail"])
        self._record = runner.failed(self.spec, self._death())
        return False

    def turn(self, go: Go) -> bool:
        """Let the child take one turn and wait until it is over; False if the run ended by it."""
        self._tell(go._asdict())
        return self.ready()

    def finish(self) -> Record:
        """Tell the child that there are no more turns, and wait for its record."""
        if self._record is None:
            self._tell({"end": True})
            while self.ready():
                self._tell({"end": True})
        if self._record is None:
            raise RuntimeError("a run ended without a record")
        return self._record

    def _tell(self, order: dict[str, Any]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError("the child process has no pipes")
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
        except BrokenPipeError:
            # It died; reading its events will find out how.
            return

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in self._process.stdout or ():
            try:
                yield json.loads(line)
            except ValueError:
                # Half a line: the child died while writing.
                return

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            # It talks nonsense but lives on.
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        tail = " ".join(self._log.read()[-_LOG_TAIL:].split())
        said = f" Its last words: {tail}" if tail else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = (
                " (usually the kernel's out-of-memory killer: use a smaller batch or dtype)"
                if name == "SIGKILL"
                else ""
            )
            return f"the run's process was ended by {name}{hint}.{said}"
        return f"the run's process ended with exit code {code} before it had a record.{said}"


def run(spec: RunSpec, notify: Notify = silent) -> Record:
    """Run `spec` alone in a child process.

    A child that is killed or crashes becomes a `failed` record; Ctrl-C ends the child and is
    raised again.

    Raises:
        UsageError: the child found that the request cannot be honoured.
    """
    with Child(spec, notify) as child:
        going = child.ready()
        for go in runner.alone(spec.protocol.repeats):
            going = going and child.turn(go)
        return child.finish()


def _environment(spec: RunSpec) -> dict[str, str]:
    """Threads are pinned before any library starts its pool."""
    threads = str(spec.protocol.threads)
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def main() -> None:
    """Child side: read an order, run it turn by turn, write events."""
    _die_with_parent()
    # Libraries that print to stdout must not garble the protocol: file descriptor 1 becomes
    # stderr, and the events go to a private copy of the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: object) -> None:
        pipe.write(json.dumps(event) + "\n")
        pipe.flush()

    order = json.loads(sys.stdin.readline())
    spec = RunSpec.model_validate_json(json.dumps(order["spec"]))
    try:
        record = runner.run(
            spec,
            lambda phase, detail="": tell(phase=phase, detail=detail),
            turns=lambda samples: _turns(tell),
            pair=order["pair"],
            speed_only=order["speed_only"],
        )
    except UsageError as error:
        tell(usage_error=str(error))
        return
    except KeyboardInterrupt:
        # The parent got the same Ctrl-C and speaks for both.
        sys.exit(130)
    tell(record=record.model_dump(mode="json"))


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone: nobody could read what it measures."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _turns(tell: Callable[..., None]) -> Iterator[Go]:
    """Ask for a turn, wait, take it, and so on; how many there are is the parent's to know."""
    while True:
        tell(ready=True)
        order = json.loads(sys.stdin.readline() or '{"end": true}')
        if "end" in order:
            return
        yield Go(**order)


if __name__ == "__main__":
    main()
