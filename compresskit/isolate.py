"""One child process per run: a fresh allocator, no leftovers, and a crash stays its own.

    parent                                   child: python -m compresskit.isolate
      spec JSON ───────────── stdin ───────────►
      ◄──────── stdout: one JSON event a line ── {"phase": "latency", "detail": ""}
      ◄───────────────────────────────────────── {"record": {...}} or {"usage_error": "..."}

The parent blocks on the pipe and never polls, so waiting costs the measurement nothing. Whatever
a library prints in the child goes to a log that is only shown if the child dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

from compresskit import runner
from compresskit.artefact import silent
from compresskit.errors import UsageError
from compresskit.record import Record
from compresskit.spec import RunSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compresskit.artefact import Notify

_LOG_TAIL = 400


def run(spec: RunSpec, notify: Notify = silent) -> Record:
    """Run `spec` in a child process.

    A child that is killed or crashes becomes a `failed` record; Ctrl-C ends the child and is
    raised again.

    Raises:
        UsageError: the child found that the request cannot be honoured.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        with subprocess.Popen(
            [sys.executable, "-m", "compresskit.isolate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(spec),
        ) as child:
            try:
                record = _listen(child, spec, notify)
            except BaseException:
                child.kill()
                raise
        return record or runner.failed(spec, _death(child.returncode, log))


def _environment(spec: RunSpec) -> dict[str, str]:
    """Threads are pinned before any library starts its pool."""
    threads = str(spec.protocol.threads)
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def _listen(child: subprocess.Popen[str], spec: RunSpec, notify: Notify) -> Record | None:
    stdin, stdout = child.stdin, child.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the child process has no pipes")
    try:
        with stdin:
            stdin.write(spec.model_dump_json())
    except BrokenPipeError:
        return None
    for event in _events(stdout):
        if "record" in event:
            return Record.model_validate_json(json.dumps(event["record"]))
        if "usage_error" in event:
            raise UsageError(event["usage_error"])
        notify(event["phase"], event["detail"])
    return None


def _events(pipe: IO[str]) -> Iterator[dict[str, Any]]:
    for line in pipe:
        try:
            yield json.loads(line)
        except ValueError:
            # Half a line: the child died while writing.
            return


def _death(code: int, log: IO[str]) -> str:
    log.seek(0)
    tail = " ".join(log.read()[-_LOG_TAIL:].split())
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


def main() -> None:
    """Child side: read a spec, run it, write events."""
    # Libraries that print to stdout must not garble the protocol: file descriptor 1 becomes
    # stderr, and the events go to a private copy of the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: object) -> None:
        pipe.write(json.dumps(event) + "\n")
        pipe.flush()

    spec = RunSpec.model_validate_json(sys.stdin.read())
    try:
        record = runner.run(spec, lambda phase, detail="": tell(phase=phase, detail=detail))
    except UsageError as error:
        tell(usage_error=str(error))
        return
    except KeyboardInterrupt:
        # The parent got the same Ctrl-C and speaks for both.
        sys.exit(130)
    tell(record=record.model_dump(mode="json"))


if __name__ == "__main__":
    main()
