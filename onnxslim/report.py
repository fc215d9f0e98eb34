"""What changed, measured: a dataclass whose JSON is the product and whose table is a view of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

FIGURES = ("nodes", "parameters", "macs", "bytes")
# Bytes by which a file may grow because it says what made it.
METADATA = 256


@dataclasses.dataclass
class Report:
    """The report of one run.

    Attributes:
        before, after: ``nodes``, ``parameters``, ``macs`` (for one sample), ``bytes`` (of the file with its data).
        passes: one entry per pass that ran: ``name``, ``options``, ``seconds``, ``stats``, ``skipped``.
        fidelity: ``samples``, ``data``, ``held_out`` and per output the errors of the result against the original;
            None when the models could not be run.
        metric: ``name``, ``before``, ``after``, ``drop``, ``max_drop``, ``samples``; None without a metric.
        bench: one entry per execution provider: ``ep``, ``latency_ms`` of the result and ``original_latency_ms``
            (``median``, ``p10``, ``p90``), ``speedup`` and its 99 % ``interval``; empty when nothing was measured.
        environment: versions, processor, seed, threads, input shapes, and the pipeline that ran.
        warnings: what the user has to know, most important first.
        details: layers before and after, where the error comes in, histograms, the model after each pass (see
            `onnxslim.details`); None where they were not asked for.
        integer: with ``require_int8``, which products run as integer kernels and why the others do not, see
            `onnxslim.integer.Proof`.
    """

    before: dict[str, int]
    after: dict[str, int]
    passes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    metric: dict[str, Any] | None = None
    bench: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] | None = None
    integer: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with the shortcomings of the result first among the warnings."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["warnings"] = [*self.shortcomings(), *self.warnings]
        for name in ("details", "integer"):
            if fields[name] is None:
                del fields[name]
        return {name: plain(value) for name, value in fields.items()}

    def to_json(self) -> str:
        """`to_dict` as JSON text; a number that JSON cannot hold is null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self, title: str = "onnxslim report") -> str:
        """The report as one HTML page that needs nothing but itself; with the most in it after ``details=True``."""
        from onnxslim import html

        return html.page(self.to_dict(), title)

    def _repr_html_(self) -> str:
        from onnxslim import html

        return html.fragment(self.to_dict())

    def shortcomings(self) -> list[str]:
        """Where the result is not faster or not smaller than the original."""
        lines = []
        for entry in self.bench:
            low, high = entry["interval"]
            measured = f"{entry['speedup']:.2f}x of the original's speed ({low:.2f} to {high:.2f}) on {entry['ep']}"
            if high < 1:
                lines.append(f"SLOWER than the original: {measured}")
            elif low <= 1:
                lines.append(f"not faster than the original beyond noise: {measured}")
        before, after = self.before["bytes"], self.after["bytes"]
        if after > before + METADATA:
            lines.append(f"LARGER than the original: {after:,} bytes after {before:,}")
        elif after >= before:
            lines.append(f"not smaller than the original: {after:,} bytes after {before:,}")
        return lines

    def table(self) -> RenderableType:
        """The report for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from onnxslim.plots import Span, Spans
        from onnxslim.sheet import speed_text

        parts: list[RenderableType] = [Text(f"! {line}", "yellow") for line in self.to_dict()["warnings"]]
        bars: list[Span] = []
        sizes = Table("", "before", "after", "", box=None, pad_edge=False)
        for column in sizes.columns[1:]:
            column.justify = "right"
        for name in FIGURES:
            before, after = self.before[name], self.after[name]
            sizes.add_row(name, f"{before:,}", f"{after:,}", _change(before, after))
        for entry in self.bench:
            old, new = entry["original_latency_ms"]["median"], entry["latency_ms"]["median"]
            speed = speed_text(entry["speedup"], entry["interval"])
            sizes.add_row(f"ms on {entry['ep']}", f"{old:.3f}", f"{new:.3f}", speed)
            for which, key in (("original", "original_latency_ms"), ("result", "latency_ms")):
                ms = entry[key]
                bars.append(Span(f"{which} on {entry['ep']}", ms["p10"], ms["p90"], f"{ms['median']:.3f} ms"))
        if self.metric is not None:
            old, new = self.metric["before"], self.metric["after"]
            sizes.add_row(str(self.metric["name"]), f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
        parts += [sizes, Spans("milliseconds of a pass, 10th to 90th percentile, and the median", bars)]
        if self.fidelity is not None:
            parts += [Text(), fidelity_table(self.fidelity)]
        ran = Table("pass", "seconds", "did", "left alone", box=None, pad_edge=False)
        for entry in self.passes:
            # As `Text`: a name with brackets in it is no markup.
            told = (Text(_stats(entry["stats"])), Text(_reasons(entry)))
            ran.add_row(str(entry["name"]), f"{entry['seconds']:.1f}", *told)
        if self.passes:
            parts += [Text(), ran]
        return Group(*parts)


def fidelity_table(fidelity: Mapping[str, Any]) -> RenderableType:
    """Errors of every output; the title says on what data."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    held = ", not seen by calibration" if fidelity.get("held_out") else ""
    title = Text(f"against the original, {fidelity['samples']} samples ({fidelity['data']}{held}):")
    table = Table("output", "relative L2", "max abs", "cosine", "same top-1", box=None, pad_edge=False)
    for entry in fidelity["outputs"]:
        agreement = entry["top1_agreement"]
        table.add_row(
            Text(entry["output"]),
            _figure(entry["relative_l2"], ".1e"),
            _figure(entry["max_abs"], ".1e"),
            _figure(entry["cosine"], ".6f"),
            "" if agreement is None else f"{agreement:.1%}",
        )
    return Group(title, table)


def _figure(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def plain(value: Any) -> Any:
    """``value`` in the types of JSON: arrays become lists, numbers that are not finite None, other objects text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _change(before: int, after: int) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _stats(stats: Mapping[str, Any]) -> str:
    """The counts and figures of a pass; its tables and lists are for the JSON."""
    shown = {k: v for k, v in plain(stats).items() if isinstance(v, int | float | str) and v}
    return ", ".join(
        f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
        for k, v in shown.items()
    )


def _reasons(entry: Mapping[str, Any]) -> str:
    """How often each reason was given for leaving something alone, the most frequent first."""
    counts: dict[str, int] = {}
    for skip in entry["skipped"]:
        counts[skip["reason"]] = counts.get(skip["reason"], 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count} x {reason}" if count > 1 else reason for reason, count in ranked[:4]]
    return "\n".join([*lines, f"and {len(ranked) - 4} other reasons"] if len(ranked) > 4 else lines)
