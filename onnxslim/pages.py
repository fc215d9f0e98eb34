"""What the commands inspect, compare, bench, passes and doctor find out, as plain values and as tables."""

from __future__ import annotations

import dataclasses
import inspect as introspection
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxslim import data as data_io
from onnxslim import doctor as diagnosis
from onnxslim import model as model_io
from onnxslim import pipeline
from onnxslim.checks import generated
from onnxslim.contract import literal
from onnxslim.data import Data
from onnxslim.report import plain

Shapes = Mapping[str, Sequence[int]]
_GENERATED = 4


def to_json(facts: Mapping[str, Any]) -> str:
    """``facts`` as JSON text."""
    return json.dumps(plain(facts), indent=2, allow_nan=False)


def samples(path: Path, source: str | None, shapes: Shapes, seed: int) -> Data:
    """The user's samples, else generated ones."""
    model = model_io.load(path)
    if source is None:
        return generated(model, str(path), _GENERATED, seed=seed, shapes=shapes)[0]
    return data_io.open_data(source, data_io.input_specs(model), what="sample")


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
    if cls.then:
        parts.append(Text(f"runs behind it: {cls.then}"))
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
        shown = "yes" if state == "runs" else f"yes, {state[5:]}" if state.startswith("runs in ") else f"no: {state}"
        table.add_row(f"runs on {name}", Text(shown.replace("no: does not run: ", "no: ")))
    return table
