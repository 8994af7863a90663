"""Progress on stderr: a bar for a sweep, a bar for a download; plain lines without a terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress as Bars, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import TaskID

    from compresskit.hf.sources import Progress
    from compresskit.record import Record

console = Console(stderr=True)


class SweepProgress:
    """One bar for the sweep; the current phase beside it.

    The display is redrawn only when an event comes, so it takes no time from a measurement.
    """

    def __init__(self) -> None:
        """Nothing is drawn before `begin`."""
        self._progress = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> SweepProgress:
        """Start drawing, on a terminal."""
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Clear the bar."""
        if console.is_terminal:
            self._progress.stop()

    def begin(self, index: int, total: int, label: str) -> None:
        """A run starts."""
        self._label = label
        if self._task is None:
            self._task = self._progress.add_task("runs", total=total, phase="")
        self._progress.update(self._task, completed=index, phase=label)
        self._show(f"[{index + 1}/{total}] {label}")

    def phase(self, phase: str, detail: str = "") -> None:
        """The current run enters a phase; without a terminal this is not worth a line."""
        if self._task is not None:
            self._progress.update(self._task, phase=f"{self._label}: {phase} {detail}".rstrip())
            if console.is_terminal:
                self._progress.refresh()

    def end(self, record: Record, *, reused: bool) -> None:
        """A run ended; anything but a plain success is said at once."""
        if self._task is not None:
            self._progress.advance(self._task)
        if reused:
            self._show(f"      kept the record of {record.digest}")
        elif record.status != "ok":
            self._show(f"      {record.status}: {record.reason}", always=True)

    def _show(self, text: str, *, always: bool = False) -> None:
        if console.is_terminal:
            self._progress.refresh()
            if not always:
                return
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def source_progress() -> Iterator[Progress]:
    """A bar per label for downloads and conversions, drawn only once something is reported."""
    progress = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def report(label: str, done: int, total: int | None) -> None:
        if label not in tasks:
            if not tasks and console.is_terminal:
                progress.start()
            if not console.is_terminal:
                console.print(label, markup=False, highlight=False)
            tasks[label] = progress.add_task(label, total=total)
        progress.update(tasks[label], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks and console.is_terminal:
            progress.stop()
