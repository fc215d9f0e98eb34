"""Where a command puts what it found: checked before the work begins, written when it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from onnxslim.console import out
from onnxslim.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files that a command writes: JSON, CSV and Markdown (``-`` for stdout), an HTML page and a model."""

    json: str | None = None
    csv: str | None = None
    markdown: str | None = None
    page: Path | None = None
    model: Path | None = None

    def check(self, models: Sequence[Path], *data: str | None) -> None:
        """Find out before the work that a model is not there, or that a result could not be written or would hide one.

        ``data`` may be files too, which nothing is written over, or something else.

        Raises:
            UsageError: says which file, and why not.
        """
        try:
            self._check(models, [Path(text) for text in data if text is not None])
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error

    def _check(self, models: Sequence[Path], data: Sequence[Path]) -> None:
        for path in models:
            if not path.is_file():
                raise UsageError(f"{path}: {'is a folder, not an ONNX file' if path.is_dir() else 'no such file'}")
        views = (self.json, self.csv, self.markdown)
        if sum(place == "-" for place in views) > 1:
            raise UsageError("--json, --csv and --markdown: only one of them can go to stdout; give the others a file")
        files = [Path(place) for place in views if place is not None and place != "-"]
        files += [path for path in (self.page, self.model) if path is not None]
        given = [*models, *(path for path in data if path.is_file())]
        seen: set[Path] = set()
        for path in files:
            if path.absolute() in seen:
                raise UsageError(f"{path}: the model and every report need a file of their own")
            seen.add(path.absolute())
            if path.is_dir():
                raise UsageError(f"{path}: is a folder; give a file name")
            if not path.absolute().parent.is_dir():
                raise UsageError(f"{path}: the folder {path.parent} does not exist")
            if path.exists() and any(path.samefile(source) for source in given):
                raise UsageError(f"{path}: is the input, which is never touched; give another name")

    def show(self, json_text: str, table: Any, sheets: Any = ()) -> None:
        """Write each view where it was asked for; what goes to files leaves the table on stdout."""
        from onnxslim import sheet

        wanted: list[tuple[str | None, Callable[[], str]]] = [
            (self.json, lambda: json_text + "\n"),
            (self.csv, lambda: sheet.csv_text(sheets)),
            (self.markdown, lambda: sheet.markdown_text(sheets)),
        ]
        for place, text in wanted:
            if place is not None and place != "-":
                write(Path(place), text())
        for place, text in wanted:
            if place == "-":
                click.echo(text(), nl=False)
                return
        out().print(table)


def write(path: Path, text: str) -> None:
    """Write a report.

    Raises:
        UsageError: the system does not let us.
    """
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
