"""A table of facts that is shown on a terminal, as CSV, and as Markdown: one description, several views."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its heading, the key of the rows it shows or a function of them, and how a value is written."""

    title: str
    value: str | Callable[[Row], Any]
    form: str = ""

    def raw(self, row: Row) -> Any:
        """The value itself, None where the row has none."""
        return row.get(self.value) if isinstance(self.value, str) else self.value(row)

    def text(self, row: Row) -> str:
        """The value for a person."""
        value = self.raw(row)
        if value is None:
            return ""
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return format(value, self.form) if self.form else str(value)

    @property
    def numeric(self) -> bool:
        """Numbers stand to the right."""
        return bool(self.form)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Rows under columns, with a name for where several are written one after the other."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in self.columns:
            table.add_column(column.title, justify="right" if column.numeric else "left")
        for row in self.rows:
            # As `Text`: a name with brackets in it is no markup.
            table.add_row(*(Text(column.text(row)) for column in self.columns))
        return table

    def csv(self) -> str:
        """RFC 4180, with full precision."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow([column.title for column in self.columns])
        for row in self.rows:
            values = (column.raw(row) for column in self.columns)
            writer.writerow([" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in values])
        return out.getvalue()

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        lines = [
            [column.title for column in self.columns],
            ["---:" if column.numeric else "---" for column in self.columns],
            *([column.text(row) for column in self.columns] for row in self.rows),
        ]
        return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def tables(sheets: Sequence[Sheet]) -> list[RenderableType]:
    """Several sheets for a terminal, with an empty line behind each."""
    from rich.text import Text

    return [part for sheet in sheets for part in (sheet.table(), Text())]


def speed_text(speedup: float, interval: Sequence[float]) -> str:
    """A ratio of times with its interval."""
    return f"{speedup:.2f}x ({interval[0]:.2f} to {interval[1]:.2f})"


def csv_text(sheets: Sequence[Sheet]) -> str:
    """Several sheets: each below its name, with an empty line between; one alone without its name."""
    if len(sheets) == 1:
        return sheets[0].csv()
    return "\r\n".join(f"{sheet.name}\r\n{sheet.csv()}" for sheet in sheets)


def markdown_text(sheets: Sequence[Sheet]) -> str:
    """Several sheets, each below a heading."""
    return "\n".join(f"### {sheet.name}\n\n{sheet.markdown()}" for sheet in sheets)
