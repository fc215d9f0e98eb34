"""A report that tests of its views share."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim.report import Report


def report(*, skipped: int = 3, **changes: Any) -> Report:
    """A report with something in every section but the details; ``changes`` replace its attributes."""
    figures = {"nodes": 10, "parameters": 1000, "macs": 5000, "bytes": 4000}
    latency = {"median": 2.0, "p10": 1.9, "p90": 2.2, "runs": 9}
    slow = {**latency, "median": 4.0, "p10": 3.8, "p90": 4.5}
    output = {"output": "y", "relative_l2": 0.01, "max_abs": np.inf, "cosine": 0.999, "top1_agreement": None}
    values: dict[str, Any] = {
        "before": figures,
        "after": {**figures, "nodes": 8, "bytes": 1000},
        "passes": [
            {
                "name": "prune",
                "options": {"ratio": 0.5},
                "seconds": 1.5,
                "stats": {"removed": np.int64(16), "error": 0.01234567, "table": [1, 2]},
                "skipped": [{"node": f"conv{k}", "reason": "frozen by Loop"} for k in range(skipped)],
            }
        ],
        "fidelity": {"samples": 4, "data": "x.npz", "held_out": True, "outputs": [output]},
        "metric": {"name": "top1", "before": 0.9, "after": 0.89, "drop": 0.01, "max_drop": None, "samples": 4},
        "bench": [
            {"ep": "cpu", "latency_ms": latency, "original_latency_ms": slow, "speedup": 2.0, "interval": [1.9, 2.1]}
        ],
        "environment": {"cpu": "some", "versions": {"onnx": "1"}, "command": "onnxslim a b"},
        "warnings": ["synthetic inputs"],
    }
    return Report(**{**values, **changes})
