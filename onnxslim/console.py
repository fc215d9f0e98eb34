"""What the command line shows: results on stdout, messages and progress on stderr, colours only where wanted."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

T = TypeVar("T")
# Shorter loops need no progress bar.
PATIENCE = 2.0


@functools.cache
def out() -> Console:
    """Results. NO_COLOR and redirection are honoured; a pipe gets lines that are not cut at 80 columns."""
    from rich.console import Console

    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160)


def message(text: str) -> None:
    """One line for the user on stderr."""
    print(text, file=sys.stderr)


class Bars:
    """Progress bars on a terminal, one below the other for loops within loops, each after two seconds."""

    def __init__(self) -> None:
        self._display: Progress | None = None

    def track(self, items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
        """Yield ``items``; after two seconds a bar shows how many of ``total`` have passed."""
        start, done, task = time.monotonic(), 0, None
        try:
            for item in items:
                yield item
                done += 1
                if task is not None and self._display is not None:
                    self._display.update(task, completed=done)
                elif time.monotonic() - start > PATIENCE and sys.stderr.isatty():
                    task = self._begin(label, total, done)
        finally:
            if task is not None:
                self._end(task)

    def _begin(self, label: str, total: int | None, done: int) -> TaskID:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._display is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._display = Progress(*columns, console=Console(stderr=True), transient=True)
            self._display.start()
        return self._display.add_task(label, total=total, completed=done)

    def _end(self, task: TaskID) -> None:
        assert self._display is not None
        self._display.remove_task(task)
        if not self._display.tasks:
            self._display.stop()
            self._display = None
