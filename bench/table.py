"""The results of bench/zoo.py: rows, their table, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass
class Row:
    """One recipe on one model.

    Attributes:
        status: ``ok``, or what went wrong: ``check failed``, ``pass undone`` (there is a result to judge all the
            same), ``refused``, ``failed``, ``killed by SIGSEGV``, ``timed out``; ``detail`` says more.
        metric: (before, after) by name.
        fidelity: ``relative_l2``, ``cosine``, ``top1`` agreement of the worst output; ``broken`` says by how much it
            is further off than a lossless result may be, None when it is not.
        before, after: ``nodes``, ``parameters``, ``macs``, ``bytes``.
        latency: ``before`` and ``after`` in ms, ``speedup`` and its 99 % ``interval``.
        seconds: of the whole command that made the file.
    """

    model: str
    recipe: str
    lossless: bool
    command: str = ""
    status: str = "ok"
    detail: str = ""
    seconds: float = 0.0
    metric: dict[str, tuple[float, float]] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)

    def findings(self) -> list[str]:
        """What a reader must not overlook: a crash, and where the result is not what it should be."""
        found = [] if self.status == "ok" else [f"{self.status}: {self.detail}" if self.detail else self.status]
        if self.latency and self.latency["interval"][1] < 1:
            found.append("slower than the input")
        if self.after and self.after["bytes"] > self.before["bytes"]:
            found.append("larger than the input")
        if self.lossless:
            if self.fidelity.get("broken"):
                found.append(f"not equal: {self.fidelity['broken']}")
            if self.after and self.after["nodes"] > self.before["nodes"]:
                found.append("more nodes than the input")
        return found


def short(number: float) -> str:
    """Three digits and a unit: 436554 is 437k."""
    for size, unit in UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:g}"


def _change(row: Row, name: str) -> str:
    return f"{short(row.before[name])} → {short(row.after[name])}" if row.after else ""


def _speed(latency: Mapping[str, Any]) -> str:
    if not latency:
        return ""
    low, high = latency["interval"]
    return f"{latency['speedup']:.2f}x ({low:.2f}–{high:.2f})"


def _fidelity(row: Row) -> str:
    if not row.fidelity:
        return ""
    agreement = row.fidelity["top1"]
    return f"{row.fidelity['relative_l2']:.1e}" + ("" if agreement is None else f", {agreement:.1%}")


def render(rows: list[Row]) -> Table:
    """One line per row; a model's name stands at its first line only."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    table.add_column("recipe")
    table.add_column("metric")
    table.add_column("relative L2,\nsame top-1")
    for name in ("bytes", "parameters", "MACs", "nodes", "ms", "speed over input", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("findings", ratio=1)
    previous = ""
    for row in rows:
        before, after = (row.latency.get(when, {}).get("median") for when in ("before", "after"))
        table.add_row(
            "" if row.model == previous else row.model,
            row.recipe,
            "\n".join(f"{name} {old:.4f} → {new:.4f}" for name, (old, new) in row.metric.items()),
            _fidelity(row),
            *(_change(row, name) for name in ("bytes", "parameters", "macs", "nodes")),
            f"{before:.2f} → {after:.2f}" if row.latency else "",
            _speed(row.latency),
            f"{row.seconds:.0f}",
            "\n".join(row.findings()),
        )
        previous = row.model
    return table


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where the environments of two runs differ: a change of figures may come from there."""
    return [
        f"{name}: {old.get(name)} → {new.get(name)}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _ratio(old: Row, new: Row, name: str) -> str:
    if not (old.after and new.after):
        return ""
    change = new.after[name] / old.after[name] - 1 if old.after[name] else 0.0
    return f"{short(new.after[name])} ({change:+.1%})" if change else short(new.after[name])


def _speeds(old: Row, new: Row) -> str:
    if not (old.latency and new.latency):
        return ""
    (low_a, high_a), (low_b, high_b) = old.latency["interval"], new.latency["interval"]
    # Intervals that overlap say nothing about which is faster.
    verdict = "faster" if low_b > high_a else "slower" if high_b < low_a else "same within noise"
    return f"{old.latency['speedup']:.2f}x → {new.latency['speedup']:.2f}x, {verdict}"


def compare(old: list[Row], new: list[Row]) -> Table:
    """One line for each cell that is in both runs, and one for each that is in one only."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("model", "recipe", "metric", "relative L2", "bytes", "parameters", "MACs", "nodes", "speed", "status"):
        table.add_column(name)
    first = {(row.model, row.recipe): row for row in old}
    second = {(row.model, row.recipe): row for row in new}
    for key in dict.fromkeys((*first, *second)):
        a, b = first.get(key), second.get(key)
        if a is None or b is None:
            table.add_row(*key, *[""] * 7, "new" if a is None else "gone")
            continue
        table.add_row(
            *key,
            "\n".join(
                f"{name} {value[1]:.4f} → {b.metric[name][1]:.4f}"
                for name, value in a.metric.items()
                if name in b.metric
            ),
            " → ".join(f"{row.fidelity['relative_l2']:.1e}" for row in (a, b) if row.fidelity),
            *(_ratio(a, b, name) for name in ("bytes", "parameters", "macs", "nodes")),
            _speeds(a, b),
            a.status if a.status == b.status else f"{a.status} → {b.status}",
        )
    return table
