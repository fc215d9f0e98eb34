"""Which channels of a model can be removed, what they carry, and what stays for which reason: `inspect --prunable`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from onnxslim import budget, coupling
from onnxslim import model as model_io
from onnxslim.checks import generated
from onnxslim.sheet import Column, Sheet, tables


def facts(source: Any, shapes: Mapping[str, list[int]], *, threads: int = 0) -> dict[str, Any]:
    """Groups of interchangeable channels in the order of the graph, and the weights of which nothing can leave.

    A group has its ``units`` (what leaves one by one: channels, heads, pairs), the share of the model's parameters and
    MACs that it takes part in, the weights that shrink with it and the operators that sum over it.

    Raises:
        ModelError: the model does not run on generated inputs; shapes are then not known.
    """
    model = model_io.load(source)
    feed = generated(model, model, 1, seed=0, shapes=shapes)[0][0]
    coupled = coupling.analyze(model, feed, threads=threads)
    families = coupled.families
    parts = budget.Shapes(coupled, families)
    whole = {
        "parameters": budget.parameters(coupled, families, parts),
        "macs": budget.macs(coupled, families, parts, feed),
    }
    rows = []
    for k, family in enumerate(families):
        half = [len(f.atoms) / 2 if j == k else 0 for j, f in enumerate(families)]
        shares = {name: 2 * (1 - b(half) / b.total) if b.total else 0.0 for name, b in whole.items()}
        rows.append(
            {
                "name": family.name,
                "units": len(family.atoms),
                **shares,
                "weights": [v.name for v, _ in family.weights],
                "readers": list(dict.fromkeys(site.name for site in family.sites)),
            }
        )
    return {"groups": rows, "frozen": coupled.frozen(), "counted_at": {n: list(a.shape) for n, a in feed.items()}}


def sheets(found: Mapping[str, Any]) -> list[Sheet]:
    """The groups, and what stays whole."""
    groups = (
        Column("group", "name"),
        Column("units", "units", ","),
        Column("parameters", "parameters", ".1%"),
        Column("MACs", "macs", ".1%"),
        Column("read by", lambda row: [*row["readers"][:3], *(["..."] if len(row["readers"]) > 3 else [])]),
    )
    frozen = (Column("stays whole", "name"), Column("because", "reason"))
    stays = [{"name": name, "reason": why} for name, why in found["frozen"].items()]
    return [Sheet("groups", groups, found["groups"]), *([Sheet("frozen", frozen, stays)] if stays else [])]


def table(found: Mapping[str, Any]) -> RenderableType:
    """`facts` for a terminal."""
    return Group(*tables(sheets(found)))
