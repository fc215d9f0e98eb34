"""What the command line shows: results on stdout, messages and progress on stderr, colours only where wanted."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

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
    """Progress bars on a terminal, for loops that take longer than two seconds."""

    def __init__(self) -> None:
        self._depth = 0

    def track(self, items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
        """Yield ``items``; after two seconds a bar shows how many of ``total`` have passed."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        start, done, bar, task = time.monotonic(), 0, None, None
        try:
            for item in items:
                yield item
                done += 1
                if bar is None and self._depth == 0 and console.is_terminal and time.monotonic() - start > PATIENCE:
                    columns = (
                        TextColumn("{task.description}"),
                        BarColumn(),
                        MofNCompleteColumn(),
                        TimeRemainingColumn(),
                    )
                    bar = Progress(*columns, console=console, transient=True)
                    bar.start()
                    self._depth += 1
                    task = bar.add_task(label, total=total, completed=done)
                elif bar is not None and task is not None:
                    bar.update(task, completed=done)
        finally:
            if bar is not None:
                bar.stop()
                self._depth -= 1
