"""Two results of ``onnxslim bench --json``: what became faster or slower between them, and what else changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxslim.errors import UsageError
from onnxslim.sheet import Column, Sheet, speed_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_KEY = ("file", "ep", "threads", "batch")


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Compare the newer result with the older one.

    Milliseconds of two runs are from two different hours: what is compared is each file's speed over the first file of
    its own run, and it became ``faster`` or ``slower`` only where the two intervals lie apart. Returns ``rows``,
    ``environment`` (what differs), and how many rows are ``slower``.

    Raises:
        UsageError: there are not two files, or one is no result of ``bench``.
    """
    if len(paths) != 2:
        raise UsageError("bench compare: give two results of 'onnxslim bench ... --json FILE', the older one first")
    old, new = (_read(path) for path in paths)
    before, after = ({tuple(row[k] for k in _KEY): row for row in run["bench"]} for run in (old, new))
    rows = []
    for key in dict.fromkeys((*before, *after)):
        a, b = before.get(key), after.get(key)
        row: dict[str, Any] = dict(zip(_KEY, key, strict=True))
        row["old"], row["new"] = (None if r is None else {k: r[k] for k in ("speedup", "interval")} for r in (a, b))
        row["old_ms"], row["new_ms"] = (None if r is None else r["latency_ms"]["median"] for r in (a, b))
        row["change"] = "new" if a is None else "gone" if b is None else _change(a["interval"], b["interval"])
        rows.append(row)
    names = dict.fromkeys((*old["environment"], *new["environment"]))
    differing = {
        name: [old["environment"].get(name), new["environment"].get(name)]
        for name in names
        if name != "load" and old["environment"].get(name) != new["environment"].get(name)
    }
    slower = sum(row["change"] == "slower" for row in rows)
    return {"files": [str(p) for p in paths], "rows": rows, "environment": differing, "slower": slower}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        for row in found["bench"]:
            _ = [row[k] for k in (*_KEY, "speedup", "interval", "latency_ms")]
        _ = found["environment"].items()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: is no result of 'onnxslim bench --json' ({type(error).__name__}: {error})"
        ) from error
    return dict(found)


def _change(old: Sequence[float], new: Sequence[float]) -> str:
    if new[0] > old[1]:
        return "faster"
    return "slower" if new[1] < old[0] else "same within noise"


def sheets(facts: Mapping[str, Any]) -> list[Sheet]:
    """One row per file, provider, number of threads and batch size."""

    def speed(which: str) -> Any:
        def text(row: Mapping[str, Any]) -> str | None:
            found = row[which]
            return found and speed_text(found["speedup"], found["interval"])

        return text

    columns = (
        Column("file", "file"),
        Column("on", "ep"),
        Column("threads", "threads", "d"),
        Column("batch", "batch", "d"),
        Column("old ms", "old_ms", ".3f"),
        Column("new ms", "new_ms", ".3f"),
        Column("old speed over its first", speed("old")),
        Column("new", speed("new")),
        Column("change", "change"),
    )
    return [Sheet("change", columns, facts["rows"])]


def table(facts: Mapping[str, Any]) -> RenderableType:
    """`compare` for a terminal."""
    from rich.console import Group
    from rich.text import Text

    lines = [f"! {name}: {old} before, {new} now" for name, (old, new) in facts["environment"].items()]
    return Group(*(Text(line, "yellow") for line in lines), sheets(facts)[0].table())
