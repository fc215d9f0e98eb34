"""Plots of characters, for where a person looks at a terminal; a pipe and a file get the tables alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Share of the axis that a short bar takes at least, so that it is seen.
_THINNEST = 0.01
# Characters of a label, counted from its end: what tells names apart is there.
_LABEL = 40


@dataclasses.dataclass(frozen=True)
class Span:
    """One bar: its label, where it begins and ends, and what is written behind it."""

    label: str
    begin: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Spans:
    """Bars below each other on one axis from 0 to the largest end, as a renderable of rich.

    It prints nothing where the console is no terminal, cannot show the characters, or there is nothing to compare.
    """

    title: str
    rows: Sequence[Span]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.bar import Bar
        from rich.table import Table
        from rich.text import Text

        top = max((row.end for row in self.rows), default=0.0)
        if not console.is_terminal or options.ascii_only or len(self.rows) < 2 or top <= 0:
            return
        most = min(_LABEL, options.max_width // 3)
        table = Table(box=None, show_header=False, pad_edge=False, expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(justify="right", no_wrap=True)
        for row in self.rows:
            thinnest = _THINNEST * top if row.end > 0 else 0.0
            end = min(max(row.end, row.begin + thinnest), top)
            begin = min(row.begin, end - thinnest)
            label = row.label if len(row.label) <= most else "…" + row.label[1 - most :]
            # As `Text`: a name with brackets in it is no markup.
            table.add_row(Text(label), Bar(top, begin, end, color="cyan"), Text(row.text))
        yield Text()
        yield Text(self.title)
        yield table
