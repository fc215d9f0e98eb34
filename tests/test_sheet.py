"""One description of a table, seen on a terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

from rich.console import Console

from onnxslim.sheet import Column, Sheet, csv_text, markdown_text

SHEET = Sheet(
    "things",
    (
        Column("name", "name"),
        Column("share", lambda r: r["n"] / 3, ".1%"),
        Column("list", "list"),
        Column("none", "no"),
    ),
    [{"name": "a|b, \"c\"\nd", "n": 1, "list": [1, 2]}, {"name": "e", "n": 3, "list": None}],
)  # fmt: skip


def test_csv_keeps_every_character_and_digit() -> None:
    rows = list(csv.reader(io.StringIO(SHEET.csv(), newline="")))
    assert rows[0] == ["name", "share", "list", "none"]
    assert rows[1] == ['a|b, "c"\nd', repr(1 / 3), "1 2", ""]


def test_markdown_is_one_line_per_row() -> None:
    lines = SHEET.markdown().splitlines()
    assert lines[1] == "| --- | ---: | --- | --- |"
    assert lines[2] == '| a\\|b, "c"<br>d | 33.3% | 1, 2 |  |'
    assert lines[3] == "| e | 100.0% |  |  |"


def test_several_sheets_bear_their_names() -> None:
    assert csv_text([SHEET]) == SHEET.csv()
    assert csv_text([SHEET, SHEET]).count("things\r\n") == 2
    assert markdown_text([SHEET, SHEET]).count("### things\n\n| name") == 2
    assert SHEET.table().row_count == 2


def test_a_name_with_brackets_is_shown_whole() -> None:
    console = Console(width=80, no_color=True)
    with console.capture() as shown:
        console.print(Sheet("s", (Column("name", "name"),), [{"name": "[bold]x[/bold]"}]).table())
    assert "[bold]x[/bold]" in shown.get()
