"""What ``onnxslim inspect`` finds out about one model: interface, totals, operators, layers, and what they weigh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxslim import cost, integer
from onnxslim import model as model_io
from onnxslim.checks import generated
from onnxslim.errors import DataError, ModelError
from onnxslim.plots import Span, Spans
from onnxslim.sheet import Column, Sheet

Shapes = Mapping[str, Sequence[int]]
# Bars of a plot of nodes.
_PLOTTED = 16


def inspect(source: Any, shapes: Shapes, ep: str | None = None) -> dict[str, Any]:
    """Interface, totals and per-node figures of a model in any form; with ``ep``, what runs there on integers."""
    model = model_io.load(source)
    notes = list(model.meta[model_io.WARNINGS])
    try:
        feed = generated(model, model, 1, seed=0, shapes=shapes)[0][0]
    except (DataError, ModelError) as error:
        notes.append(
            f"the model does not run on generated inputs, so shapes known only at run time stay open ({error})"
        )
        feed = {}
    counted = cost.analyze(model, feed)
    return {
        "file": str(source) if isinstance(source, str | os.PathLike) else model.graph.name or "model",
        "nodes": model.meta[model_io.NODES],
        "parameters": counted.parameters,
        "macs": counted.macs,
        "bytes": model_io.size(source, model),
        "opsets": {domain or "ai.onnx": version for domain, version in model.graph.opset_imports.items()},
        "ir_version": model.ir_version,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "metadata": dict(model.metadata_props),
        "inputs": [_value(v) for v in model.graph.inputs],
        "outputs": [_value(v) for v in model.graph.outputs],
        "counted_at": {name: list(array.shape) for name, array in feed.items()},
        "operators": {
            op: {"count": count, "parameters": parameters, "macs": macs}
            for op, (count, parameters, macs) in counted.by_op().items()
        },
        "table": [dataclasses.asdict(row) for row in counted.table],
        "unknown_macs": list(counted.unknown),
        "activation_bytes": counted.activations,
        "types": _types(model),
        "integer": None if ep is None else integer.prove(model, feed, ep=ep).to_dict(),
        "warnings": notes,
    }


def _value(value: Any) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else str(d.value or "?") for d in value.shape]
    return {"name": value.name, "type": str(value.type), "shape": shape}


def table(facts: Mapping[str, Any], nodes: bool) -> RenderableType:
    """`inspect` for a terminal: one row per operator, or per node, dearest first."""
    head = Table(box=None, show_header=False, pad_edge=False)

    def say(name: str, text: str) -> None:
        head.add_row(Text(name), Text(text))  # names in brackets would pass for markup

    say("file", facts["file"])
    say("opset", ", ".join(f"{domain} {version}" for domain, version in facts["opsets"].items()))
    for kind in ("inputs", "outputs"):
        say(kind, "\n".join(f"{v['name']}: {v['type']} {v['shape']}" for v in facts[kind]))
    for name in ("nodes", "parameters", "macs", "bytes"):
        say(name, f"{facts[name]:,}")
    for name, value in facts["metadata"].items():
        say(name, value if len(value) < 100 else f"{value[:100]}... ({len(value)} characters)")
    if facts["activation_bytes"] is not None:
        say("activations", f"{facts['activation_bytes']:,} bytes at most at a time")
    say("weights", ", ".join(f"{row['bytes']:,} bytes of {name}" for name, row in facts["types"].items()))
    notes = [Text(f"! {line}", "yellow") for line in facts["warnings"]]
    if facts["unknown_macs"]:
        notes.append(Text(f"! MACs of {len(facts['unknown_macs'])} nodes could not be counted", "yellow"))
    proof = [] if facts["integer"] is None else [Text(), *_integer_tables(facts["integer"])]
    bars = [Span(op, 0.0, row["macs"], f"{row['macs']:,}") for op, row in facts["operators"].items() if row["macs"]]
    if nodes:
        dearest = sorted(facts["table"], key=lambda row: -row["macs"])[:_PLOTTED]
        bars = [Span(row["name"], 0.0, row["macs"], f"{row['macs']:,}") for row in dearest if row["macs"]]
    return Group(*notes, head, Text(), sheets(facts, nodes)[0].table(), *proof, Spans("MACs", bars))


def _integer_tables(proof: Mapping[str, Any]) -> list[RenderableType]:
    kernels = ", ".join(f"{count} {op}" for op, count in proof["integer_kernels"].items())
    title = (
        f"on {proof['ep']}, {proof['integer_layers']} of {proof['layers']} products and "
        f"{proof['integer_macs_fraction']:.1%} of their MACs run on integers{f': {kernels}' if kernels else ''}"
    )
    wrong = [f"! {f['node']} computes something else than the file says: {f['reason']}" for f in proof["wrong"]]
    parts: list[RenderableType] = [Text(title), *(Text(line, "yellow") for line in wrong)]
    if proof["not_integer"]:
        table = Table("in float", "operator", "MACs", "because", box=None, pad_edge=False)
        for row in proof["not_integer"]:
            table.add_row(*map(Text, (row["node"], row["op_type"], f"{row['macs']:,}", row["reason"])))
        table.columns[2].justify = "right"
        parts.append(table)
    return parts


def _types(model: Any) -> dict[str, dict[str, int]]:
    """Weights by element type, the heaviest first: ``tensors``, ``elements``, ``bytes``."""
    found: dict[str, dict[str, int]] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                row = found.setdefault(tensor.dtype.name.lower(), {"tensors": 0, "elements": 0, "bytes": 0})
                row["tensors"] += 1
                row["elements"] += tensor.size
                row["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def sheets(facts: Mapping[str, Any], nodes: bool) -> list[Sheet]:
    """The rows of `table`: operators, or with ``nodes`` every node; the dearest first."""
    if nodes:
        rows = sorted(facts["table"], key=lambda row: (-row["macs"], -row["bytes"]))
        columns = [
            Column("node", "name"),
            Column("operator", "op_type"),
            Column("output", lambda r: "?" if r["output"] is None else str(list(r["output"]))),
            Column("parameters", "parameters", ","),
            Column("MACs", "macs", ","),
            Column("share", lambda r: r["macs"] / facts["macs"] if facts["macs"] else 0.0, ".1%"),
            Column("bytes", "bytes", ","),
        ]
        return [Sheet("nodes", columns, rows)]
    columns = [
        Column("operator", "operator"),
        Column("count", "count", ","),
        Column("parameters", "parameters", ","),
        Column("MACs", "macs", ","),
    ]
    return [Sheet("operators", columns, [{"operator": op, **row} for op, row in facts["operators"].items()])]
