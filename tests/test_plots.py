"""Plots on a terminal: bars lie where their figures say, and nothing is printed where nobody looks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from onnxslim import bench, comparison, eps, inspection
from onnxslim.contract import NoProgress
from onnxslim.plots import Span, Spans


def _shown(renderable: Any, *, width: int = 80, encoding: str = "utf-8", terminal: bool = True) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=terminal, width=width, no_color=True, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=2, max_size=6), st.integers(60, 200))
def test_bars_lie_where_their_figures_say(pairs: list[tuple[float, float]], width: int) -> None:
    rows = [Span(f"row {k}", low, low + length, "text") for k, (low, length) in enumerate(pairs)]
    lines = _shown(Spans("title", rows), width=width)
    assert lines[1] == "title"
    top = max(row.end for row in rows)
    first, last = len("row 0 "), width - len(" text")
    for line, row in zip(lines[2:], rows, strict=True):
        assert len(line) <= width and line.endswith("text")
        filled = [k for k, char in enumerate(line[first:last]) if char != " "]
        scale = (last - first) / top
        assert filled[0] == pytest.approx(row.begin * scale, abs=3)
        assert filled[-1] == pytest.approx(row.end * scale, abs=3)


def test_nothing_is_drawn_where_nobody_looks_or_nothing_compares() -> None:
    two = [Span("a", 0, 1, ""), Span("b", 0, 2, "")]
    assert _shown(Spans("t", two))
    assert _shown(Spans("t", two), terminal=False) == []
    assert _shown(Spans("t", two), encoding="ascii") == []
    assert _shown(Spans("t", two[:1])) == _shown(Spans("t", [Span("a", 0, 0, "")] * 2)) == []


def test_a_long_name_keeps_its_end_and_brackets() -> None:
    lines = _shown(Spans("t", [Span("/a" * 40 + "[bold]x", 0, 1, ""), Span("b", 0, 0, "")]))
    assert lines[2].startswith("…") and "[bold]x " in lines[2]
    assert lines[3].strip() == "b", "what is zero has no bar"


def test_commands_plot_what_their_tables_say(tiny: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)
    found = bench.measure([tiny, tiny], eps.parse("cpu"), {1: [{"x": x}]}, threads=[1], seconds=0.05, starts=False)
    medians = [f"{row['latency_ms']['median']:.3f} ms" for row in found["bench"]]
    lines = [line for plot in bench.plots(found) for line in _shown(plot, width=120)]
    assert [line.split("  ")[-1].strip() for line in lines if line.endswith(" ms")] == medians
    assert any("1.00x (1.00 to 1.00)" in line for line in lines)
    shown = _shown(inspection.table(inspection.inspect(tiny, {}), nodes=True), width=120)
    assert [line.split()[0] for line in shown[-2:]] == ["conv", "gemm"] and all("█" in line for line in shown[-2:])
    facts = comparison.compare(tiny, tiny, None, None, {}, threads=1, seed=0, progress=NoProgress(), by_layer=True)
    facts["layers"][0]["added"] = 0.5
    assert any("█" in line and line.endswith("5.0e-01") for line in _shown(comparison.table(facts), width=120))
