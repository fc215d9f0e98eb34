"""What a report shows beyond its tables of totals: layers, where the error comes in, distributions, and the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import layers, runtime
from onnxslim.verify import Fidelity

# Layers whose weights and outputs are shown as histograms.
_SHOWN = 6

Measure = Callable[[ir.Model], tuple[Fidelity, float | None]]


def collect(
    original: ir.Model,
    result: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
) -> dict[str, Any]:
    """``layers`` (cost before and after), ``errors`` and ``histograms`` of the two models on the samples ``feeds``."""
    before, after = (layers.costs(model, feeds, threads=threads) for model in (original, result))
    dearest = sorted(after, key=lambda name: -(after[name]["ms"] or after[name]["macs"] or 0))[:_SHOWN]
    return {
        "layers": layers.joined(before, after),
        "errors": layers.errors(original, result, feeds, threads=threads) if feeds else [],
        "histograms": layers.histograms(original, result, dearest, feeds, threads=threads),
    }


def stages(
    original: ir.Model | bytes | str,
    kept: Sequence[tuple[str, ir.Model]],
    measure: Measure,
    metric: str | None,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Quality and latency of the model after each kept pass: ``models`` (``name``, ``ms``, ``quality``), ``quality``.

    The quality is the ``metric``, else the cosine of the worst output to the original's.
    """
    models = [model for _, model in kept]
    timed = runtime.compare_models([original, *models], feeds, threads=threads, seconds=seconds * (1 + len(models)))
    rows = []
    for (name, model), latency in zip(kept, timed.latency[1:], strict=True):
        fidelity, value = measure(model)
        quality = value if value is not None else min((o.cosine for o in fidelity.outputs), default=1.0)
        rows.append({"name": name or "original", "ms": latency.median, "quality": quality})
    return {"models": rows, "quality": metric or "cosine to the original's outputs"}
