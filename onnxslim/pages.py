"""What the commands inspect, compare, bench, passes and doctor find out, as plain values and as tables."""

from __future__ import annotations

import dataclasses
import inspect as introspection
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxslim import cost, integer, metrics, pipeline, runtime, verify
from onnxslim import data as data_io
from onnxslim import doctor as diagnosis
from onnxslim import model as model_io
from onnxslim.checks import generated
from onnxslim.contract import Progress, literal
from onnxslim.data import Data
from onnxslim.errors import DataError, ModelError, UsageError
from onnxslim.report import fidelity_table, plain

Shapes = Mapping[str, Sequence[int]]
_GENERATED = 4


def to_json(facts: Mapping[str, Any]) -> str:
    """``facts`` as JSON text."""
    return json.dumps(plain(facts), indent=2, allow_nan=False)


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
        "integer": None if ep is None else integer.prove(model, feed, ep=ep).to_dict(),
        "warnings": notes,
    }


def _value(value: Any) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else str(d.value or "?") for d in value.shape]
    return {"name": value.name, "type": str(value.type), "shape": shape}


def inspect_table(facts: Mapping[str, Any], nodes: bool) -> RenderableType:
    """`inspect` for a terminal: one row per operator, or per node."""
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_row("file", facts["file"])
    head.add_row("opset", ", ".join(f"{domain} {version}" for domain, version in facts["opsets"].items()))
    for kind in ("inputs", "outputs"):
        head.add_row(kind, "\n".join(f"{v['name']}: {v['type']} {v['shape']}" for v in facts[kind]))
    for name in ("nodes", "parameters", "macs", "bytes"):
        head.add_row(name, f"{facts[name]:,}")
    for name, value in facts["metadata"].items():
        head.add_row(name, value if len(value) < 100 else f"{value[:100]}... ({len(value)} characters)")
    if nodes:
        table = Table("node", "operator", "output", "parameters", "MACs", box=None, pad_edge=False)
        for row in facts["table"]:
            shape = "?" if row["output"] is None else str(list(row["output"]))
            table.add_row(row["name"], row["op_type"], shape, f"{row['parameters']:,}", f"{row['macs']:,}")
    else:
        table = Table("operator", "count", "parameters", "MACs", box=None, pad_edge=False)
        for op, row in facts["operators"].items():
            table.add_row(op, str(row["count"]), f"{row['parameters']:,}", f"{row['macs']:,}")
    for column in table.columns[1:]:
        column.justify = "right"
    notes = [Text(f"! {line}", "yellow") for line in facts["warnings"]]
    if facts["unknown_macs"]:
        notes.append(Text(f"! MACs of {len(facts['unknown_macs'])} nodes could not be counted", "yellow"))
    proof = [] if facts["integer"] is None else [Text(), *_integer_tables(facts["integer"])]
    return Group(*notes, head, Text(), table, *proof)


def _integer_tables(proof: Mapping[str, Any]) -> list[RenderableType]:
    kernels = ", ".join(f"{count} {op}" for op, count in proof["integer_kernels"].items())
    title = (
        f"on {proof['ep']}, {proof['integer_layers']} of {proof['layers']} products and "
        f"{proof['integer_macs_fraction']:.1%} of their MACs run on integers{f': {kernels}' if kernels else ''}"
    )
    parts: list[RenderableType] = [Text(title)]
    parts += [
        Text(f"! {f['node']} computes something else than the file says: {f['reason']}", "yellow")
        for f in proof["wrong"]
    ]
    if proof["not_integer"]:
        table = Table("in float", "operator", "MACs", "because", box=None, pad_edge=False)
        for row in proof["not_integer"]:
            table.add_row(row["node"], row["op_type"], f"{row['macs']:,}", row["reason"])
        table.columns[2].justify = "right"
        parts.append(table)
    return parts


def _samples(path: Path, source: str | None, shapes: Shapes, seed: int) -> Data:
    model = model_io.load(path)
    if source is None:
        return generated(model, str(path), _GENERATED, seed=seed, shapes=shapes)[0]
    return data_io.open_data(source, data_io.input_specs(model), what="sample")


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
) -> dict[str, Any]:
    """Fidelity of ``other`` to ``original`` and, with ``metric``, its value for both."""
    found = metrics.find(metric) if metric is not None else None
    samples = _samples(original, source, shapes, seed)
    left, right = runtime.load(original, threads=threads), runtime.load(other, threads=threads)
    if sorted(left.inputs) != sorted(right.inputs):
        raise UsageError(f"{other}: has the inputs {right.inputs}, {original} has {left.inputs}: nothing to compare")
    reference = verify.Reference(left, samples, str(original))
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
    }
    if found is not None:
        facts["metric"] = {"name": found.name, "original": verify.score(reference, found), "other": value}
    return facts


def compare_table(facts: Mapping[str, Any]) -> RenderableType:
    """`compare` for a terminal."""
    parts: list[RenderableType] = [fidelity_table(facts["fidelity"])]
    if facts["metric"] is not None:
        entry = facts["metric"]
        change = entry["other"] - entry["original"]
        parts.append(Text(f"{entry['name']}: {entry['original']:.4f} and {entry['other']:.4f} ({change:+.4f})"))
    return Group(*parts)


def bench(
    paths: Sequence[Path],
    eps: Sequence[str],
    source: str | None,
    shapes: Shapes,
    *,
    seconds: float,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Interleaved latency of every model on every execution provider; each on the same samples."""
    rows = []
    samples = _samples(paths[0], source, shapes, seed)
    feeds = list(samples.spread(8).feeds())
    for ep in eps:
        runners = [runtime.load(path, ep=ep, threads=threads) for path in paths]
        for path, runner in zip(paths, runners, strict=True):
            for feed in feeds:
                if set(runner.inputs) - set(feed):
                    raise UsageError(f"{path}: has the inputs {runner.inputs}, the samples have {sorted(feed)}")
                runtime.run(runner, feed, str(path))
        compared = runtime.compare_latency(runners, [feeds] * len(runners), seconds=seconds, seed=seed)
        for path, latency, speedup, interval in zip(
            paths, compared.latency, compared.speedup, compared.interval, strict=True
        ):
            rows.append(
                {
                    "file": str(path),
                    "ep": ep,
                    "latency_ms": dataclasses.asdict(latency),
                    "speedup": speedup,
                    "interval": list(interval),
                }
            )
    return {
        "bench": rows,
        "data": samples.origin,
        "shapes": {name: list(array.shape) for name, array in feeds[0].items()},
        "threads": threads,
        "environment": diagnosis.environment(),
    }


def bench_table(facts: Mapping[str, Any]) -> RenderableType:
    """`bench` for a terminal."""
    table = Table("file", "on", "median ms", "p10", "p90", "speed over the first", box=None, pad_edge=False)
    for row in facts["bench"]:
        latency, (low, high) = row["latency_ms"], row["interval"]
        figures = (f"{latency[k]:.3f}" for k in ("median", "p10", "p90"))
        speed = f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})" if row["file"] != facts["bench"][0]["file"] else ""
        table.add_row(row["file"], row["ep"], *figures, speed)
    for column in table.columns[2:]:
        column.justify = "right"
    return Group(table, Text(f"{facts['data']}, shapes {facts['shapes']}"))


def pass_list() -> RenderableType:
    """Every installed pass with the first line of its docstring."""
    table = Table("pass", "promise", "what it does", box=None, pad_edge=False)
    for name in pipeline.registry():
        cls = pipeline.find(name)
        table.add_row(name, cls.effect.value, (introspection.getdoc(cls) or "").partition("\n")[0])
    return table


def pass_page(name: str) -> RenderableType:
    """The docstring of a pass, its options with types and defaults, and what runs before it."""
    cls = pipeline.find(name)
    options = Table("option", "type", "default", box=None, pad_edge=False)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "required" if default is dataclasses.MISSING else literal(default)
        options.add_row(field.name, pipeline.readable(hints[field.name]), shown)
    parts: list[RenderableType] = [Text(introspection.getdoc(cls) or ""), Text(), Text(f"promise: {cls.effect.value}")]
    if cls.wants:
        parts.append(Text(f"runs before it: {', '.join(cls.wants)}"))
    if dataclasses.fields(cls):
        parts += [Text(), options]
    return Group(*parts)


def doctor() -> dict[str, Any]:
    """The environment and the execution providers that run a test model here."""
    return {**diagnosis.environment(), "providers": diagnosis.providers()}


def doctor_table(facts: Mapping[str, Any]) -> RenderableType:
    """`doctor` for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("python", "system", "cpu", "cores"):
        table.add_row(name, str(facts[name]))
    table.add_row("instruction sets", " ".join(facts["instruction_sets"]) or "unknown")
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    for name, state in facts["providers"].items():
        table.add_row(f"runs on {name}", "yes" if state == "runs" else f"no: {state.removeprefix('does not run: ')}")
    return table
