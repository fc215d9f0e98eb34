"""What ``onnxslim compare`` finds out: how far the outputs of two models are apart, and in which layer that begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from onnxslim import layers, metrics, runtime, verify
from onnxslim import model as model_io
from onnxslim.contract import Progress
from onnxslim.errors import UsageError
from onnxslim.pages import samples
from onnxslim.plots import Span, Spans
from onnxslim.report import fidelity_table, plain
from onnxslim.sheet import Column, Sheet

Shapes = Mapping[str, Sequence[int]]
# Samples that layers are compared on.
_LAYERED = 8


def compare(
    original: Path,
    other: Path,
    source: str | None,
    metric: str | None,
    shapes: Shapes,
    *,
    threads: int,
    seed: int,
    progress: Progress,
    by_layer: bool = False,
) -> dict[str, Any]:
    """Fidelity of ``other`` to ``original`` and, with ``metric``, its value for both; ``by_layer`` also that of layers.

    Raises:
        UsageError: the models have different inputs.
    """
    found = metrics.find(metric) if metric is not None else None
    data = samples(original, source, shapes, seed)
    left, right = runtime.load(original, threads=threads), runtime.load(other, threads=threads)
    if sorted(left.inputs) != sorted(right.inputs):
        raise UsageError(f"{other}: has the inputs {right.inputs}, {original} has {left.inputs}: nothing to compare")
    reference = verify.Reference(left, data, str(original))
    fidelity, value = verify.measure(reference, right, found, where=str(other), progress=progress, label="compare")
    facts: dict[str, Any] = {
        "files": [str(original), str(other)],
        "fidelity": {
            "samples": fidelity.samples,
            "data": fidelity.origin,
            "relative_l2": fidelity.relative_l2,
            "outputs": [plain(o) for o in fidelity.outputs],
        },
        "metric": None,
        "warnings": fidelity.warnings(),
        "notes": fidelity.notes(),
    }
    if found is not None:
        facts["metric"] = {"name": found.name, "original": verify.score(reference, found), "other": value}
    if by_layer:
        feeds = list(data.spread(_LAYERED).feeds())
        both = [model_io.load(path) for path in (original, other)]
        facts["layers"] = layers.errors(both[0], both[1], feeds, threads=threads)
        names = {row["layer"] for row in facts["layers"]}
        facts["unmatched"] = [name for name in layers.find(both[1]) if name not in names]
    return facts


def sheets(facts: Mapping[str, Any]) -> list[Sheet]:
    """Outputs, then layers where they were compared."""
    outputs = (
        Column("output", "output"),
        Column("relative L2", "relative_l2", ".1e"),
        Column("max abs", "max_abs", ".1e"),
        Column("cosine", "cosine", ".6f"),
        Column("same top-1", "top1_agreement", ".1%"),
    )
    found = [Sheet("outputs", outputs, facts["fidelity"]["outputs"])]
    if "layers" in facts:
        columns = (
            Column("layer", "layer"),
            Column("operator", "operator"),
            Column("error", "error", ".1e"),
            Column("added here", "added", ".1e"),
            Column("relative L2", "relative_l2", ".1e"),
            Column("compared with", "compared_with"),
        )
        found.append(Sheet("layers", columns, facts["layers"]))
    return found


def table(facts: Mapping[str, Any]) -> RenderableType:
    """`compare` for a terminal."""
    parts: list[RenderableType] = [fidelity_table(facts["fidelity"]), *map(Text, facts["notes"])]
    if facts["metric"] is not None:
        entry = facts["metric"]
        change = entry["other"] - entry["original"]
        parts.append(Text(f"{entry['name']}: {entry['original']:.4f} and {entry['other']:.4f} ({change:+.4f})"))
    if "layers" in facts:
        bars = [Span(row["layer"], 0.0, row["added"], f"{row['added']:.1e}") for row in facts["layers"]]
        parts += [Text(), sheets(facts)[1].table(), Spans("error added by each layer", bars), Text()]
        worst = max(facts["layers"], key=lambda row: row["added"], default=None)
        if worst is not None and worst["added"] > 0:
            parts.append(Text(f"most of the error comes in at {worst['layer']} ({worst['added']:.1e})"))
        if facts["unmatched"]:
            first = facts["unmatched"][0]
            parts.append(
                Text(
                    f"{len(facts['unmatched'])} layers have no counterpart of the same name and shape (first: {first})"
                )
            )
    return Group(*parts)
