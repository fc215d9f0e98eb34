"""Run-time safety: a pruned model must give what the masked one gives, or the families at fault stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, runtime
from onnxslim.contract import Context
from onnxslim.errors import CheckError, OnnxslimError

ORACLE = 1e-3  # relative difference allowed between the masked and the pruned model (float32 rounding)
SAMPLES = 2


class UnsoundError(CheckError):
    """Removing some families does not give the masked model's outputs; ``families`` are their names."""

    def __init__(self, message: str, families: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.families = tuple(families)


def check(masked: ir.Model, pruned: ir.Model, ctx: Context) -> float:
    """The largest relative difference between the masked and the pruned model on a few samples.

    Raises:
        UnsoundError: it is more than rounding, or an output has another shape.
    """
    runners: list[Any] = [runtime.load(m, threads=ctx.threads) for m in (masked, pruned)]
    largest = 0.0
    for feed in ctx.calibration.spread(SAMPLES).feeds():
        expected, got = (runtime.run(r, feed) for r in runners)
        for name, array in expected.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
                continue
            if array.shape != got[name].shape:
                raise UnsoundError(f"prune: output {name} has shape {got[name].shape} instead of {array.shape}")
            size = float(np.abs(array).max())
            worst = float(np.abs(array.astype(np.float64) - got[name]).max())
            if not worst <= ORACLE * size + 1e-6:
                raise UnsoundError(f"prune: output {name} differs by {worst:.3g} from the masked model's")
            largest = max(largest, worst / max(size, 1e-3))
    return largest


def at_fault(
    model: ir.Model, feed: Mapping[str, np.ndarray], removals: Mapping[str, np.ndarray], ctx: Context
) -> list[str]:
    """The families whose removal alone breaks ``model``: {name: atoms}, each tried on a clone."""
    found = []
    for name, atoms in removals.items():
        masked, pruned = model.clone(), model.clone()
        try:
            coupled = coupling.analyze(pruned, feed, threads=ctx.threads)
            coupling.mask(masked, coupled.sites, coupled.removed(atoms))
            coupled.remove(atoms)
            check(masked, pruned, ctx)
        except OnnxslimError:
            found.append(name)
    return found
