"""The report as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from onnxslim.report import Report, plain


def _report(**changes: Any) -> Report:
    figures = {"nodes": 10, "parameters": 1000, "macs": 5000, "bytes": 4000}
    latency = {"median": 2.0, "p10": 1.9, "p90": 2.2, "runs": 9}
    values: dict[str, Any] = {
        "before": figures,
        "after": {**figures, "nodes": 8, "bytes": 1000},
        "passes": [
            {
                "name": "prune",
                "options": {"ratio": 0.5},
                "seconds": 1.5,
                "stats": {"removed": np.int64(16), "table": [1, 2]},
                "skipped": [{"node": f"conv{k}", "reason": "frozen by Loop"} for k in range(3)],
            }
        ],
        "fidelity": {
            "samples": 4,
            "data": "x.npz",
            "held_out": True,
            "outputs": [
                {"output": "y", "relative_l2": 0.01, "max_abs": np.inf, "cosine": 0.999, "top1_agreement": None}
            ],
        },
        "metric": {"name": "top1", "before": 0.9, "after": 0.89, "drop": 0.01, "max_drop": None, "samples": 4},
        "bench": [
            {
                "ep": "cpu",
                "latency_ms": latency,
                "original_latency_ms": {**latency, "median": 4.0},
                "speedup": 2.0,
                "interval": [1.9, 2.1],
            }
        ],
        "environment": {"cpu": "some"},
        "warnings": ["synthetic inputs"],
    }
    return Report(**{**values, **changes})


def _text(report: Report) -> str:
    console = Console(width=160, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.table())
    return console.export_text()


def test_json_has_the_keys_of_the_contract() -> None:
    report = json.loads(_report().to_json())
    assert list(report) == [
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
        assert set(report[side]) == {"nodes", "parameters", "macs", "bytes"}
    assert set(report["passes"][0]) == {"name", "options", "seconds", "stats", "skipped"}
    assert {"ep", "latency_ms", "speedup"} <= set(report["bench"][0])
    assert {"median", "p10", "p90"} <= set(report["bench"][0]["latency_ms"])


def test_json_is_strict_and_nothing_is_lost() -> None:
    report = json.loads(_report().to_json(), parse_constant=lambda text: pytest.fail(text))
    assert report["passes"][0]["stats"] == {"removed": 16, "table": [1, 2]}
    assert report["fidelity"]["outputs"][0]["max_abs"] is None


@pytest.mark.parametrize(
    ("interval", "size", "expected"),
    [
        ([1.9, 2.1], 1000, []),
        ([0.8, 0.9], 1000, ["SLOWER"]),
        ([0.9, 1.1], 1000, ["not faster"]),
        ([1.9, 2.1], 4000, ["not smaller"]),
        ([0.8, 0.9], 5000, ["SLOWER", "LARGER"]),
    ],
)
def test_shortcomings_come_first(interval: list[float], size: int, expected: list[str]) -> None:
    report = _report()
    report.bench[0]["interval"] = interval
    report.after["bytes"] = size
    warnings = report.to_dict()["warnings"]
    assert len(warnings) == len(expected) + 1
    assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=False))
    assert warnings[-1] == "synthetic inputs"
    lines = _text(report).splitlines()
    assert [line.strip() for line in lines[: len(warnings)]] == [f"! {line}" for line in warnings]


def test_table_shows_every_section() -> None:
    text = _text(_report())
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
    bare = _text(_report(passes=[], fidelity=None, metric=None, bench=[], warnings=[]))
    assert "parameters" in bare


def test_plain_values() -> None:
    @dataclasses.dataclass
    class Point:
        x: Any

    assert plain(Point(np.float32(0.5))) == {"x": 0.5}
    assert plain({1: np.array([[1, 2]]), "s": {"b", "a"}}) == {"1": [[1, 2]], "s": ["a", "b"]}
    assert plain([float("nan"), float("inf"), True, None, np.bool_(True)]) == [None, None, True, None, True]
    assert plain(object).startswith("<class")
