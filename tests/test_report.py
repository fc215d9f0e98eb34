"""The report as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from reports import report

from onnxslim.report import Report, plain


def _text(made: Report) -> str:
    console = Console(width=160, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(made.table())
    return console.export_text()


def test_json_has_the_keys_of_the_contract() -> None:
    found = json.loads(report().to_json())
    assert list(found) == [
        "before",
        "after",
        "passes",
        "fidelity",
        "metric",
        "bench",
        "environment",
        "warnings",
    ]
    for side in ("before", "after"):
        assert set(found[side]) == {"nodes", "parameters", "macs", "bytes"}
    assert set(found["passes"][0]) == {"name", "options", "seconds", "stats", "skipped"}
    assert {"ep", "latency_ms", "speedup"} <= set(found["bench"][0])
    assert {"median", "p10", "p90"} <= set(found["bench"][0]["latency_ms"])


def test_json_is_strict_and_nothing_is_lost() -> None:
    found = json.loads(report().to_json(), parse_constant=lambda text: pytest.fail(text))
    assert found["passes"][0]["stats"] == {"removed": 16, "error": 0.01234567, "table": [1, 2]}
    assert found["fidelity"]["outputs"][0]["max_abs"] is None


@pytest.mark.parametrize(
    ("interval", "size", "expected"),
    [
        ([1.9, 2.1], 1000, []),
        ([0.8, 0.9], 1000, ["SLOWER"]),
        ([0.9, 1.1], 1000, ["not faster"]),
        ([1.9, 2.1], 4000, ["not smaller"]),
        ([1.9, 2.1], 4100, ["not smaller"]),
        ([0.8, 0.9], 5000, ["SLOWER", "LARGER"]),
    ],
)
def test_shortcomings_come_first(interval: list[float], size: int, expected: list[str]) -> None:
    found = report()
    found.bench[0]["interval"] = interval
    found.after["bytes"] = size
    warnings = found.to_dict()["warnings"]
    assert len(warnings) == len(expected) + 1
    assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=False))
    assert warnings[-1] == "synthetic inputs"
    lines = _text(found).splitlines()
    assert [line.strip() for line in lines[: len(warnings)]] == [f"! {line}" for line in warnings]


def test_table_shows_every_section() -> None:
    text = _text(report())
    for part in (
        "-75.0%",
        "2.00x (1.90 to 2.10)",
        "top1",
        "-0.0100",
        "1.0e-02",
        "not seen by calibration",
        "removed 16",
    ):
        assert part in text
    assert "3 x frozen by Loop" in text
    bare = _text(report(passes=[], fidelity=None, metric=None, bench=[], warnings=[]))
    assert "parameters" in bare


def test_plain_values() -> None:
    @dataclasses.dataclass
    class Point:
        x: Any

    assert plain(Point(np.float32(0.5))) == {"x": 0.5}
    assert plain({1: np.array([[1, 2]]), "s": {"b", "a"}}) == {"1": [[1, 2]], "s": ["a", "b"]}
    assert plain([float("nan"), float("inf"), True, None, np.bool_(True)]) == [None, None, True, None, True]
    assert plain(object).startswith("<class")
