"""Which of several ways to run a model is worth having: single layers by their kernels' times, the whole by latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.contract import Context

# A layer is not worth changing when before, it took less than this share of the time after; a candidate is preferred to
# an earlier one when it is faster by this factor. Both are wider than the noise of timing.
_CLEAR, _FASTER = 0.9, 1.02
_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that is worth having, if any, and the speed of each over the model as it was."""

    name: str | None
    speeds: dict[str, float]

    @property
    def refusal(self) -> str:
        """Why none was chosen."""
        return f"the model is not faster on integers beyond noise ({max(self.speeds.values()):.2f}x at best)"


def fastest(
    model: ir.Model,
    candidates: Mapping[str, ir.Model],
    feeds: Sequence[Mapping[str, np.ndarray]],
    ctx: Context,
    *,
    ep: str = "cpu",
    least: float = 1.0,
) -> Choice:
    """Measure ``model`` and ``candidates``, the preferred one first, in turn; the fastest that is clearly so.

    ``least`` is the speed over ``model`` that one must have to be chosen; one whose weights take no less memory must
    also be faster beyond noise, because it has nothing else to offer. Where noise leaves open whether the best one has
    that speed, the two are measured once more, for longer, and that decides.
    """

    def measured(names: Sequence[str], seconds: float, seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
        """The speed of each, and its interval."""
        sources = [model, *(candidates[name] for name in names)]
        timed = runtime.compare_models(sources, feeds, ep=ep, threads=ctx.threads, seconds=seconds, seed=seed)
        return dict(zip(names, zip(timed.speedup[1:], timed.interval[1:], strict=True), strict=True))

    found = measured(list(candidates), _SECONDS, ctx.seed)
    best, *others = found
    for name in others:
        if found[name][0] > found[best][0] * _FASTER:
            best = name
    _, (low, high) = found[best]
    if low < least <= high:
        found |= measured([best], 2 * _SECONDS, ctx.seed + 1)
    speed, (low, _) = found[best]
    smaller = model_io.weight_bytes(candidates[best]) < model_io.weight_bytes(model)
    speeds = {name: speed for name, (speed, _) in found.items()}
    return Choice(best if speed >= least and (smaller or low > 1) else None, speeds)


def slower_layer(before: float, after: float) -> str | None:
    """Why a layer that took ``before`` ms in float and ``after`` ms on integers goes back, or None where it does not.

    0 says that the runtime merged the layer with something else: then only the whole model can tell.
    """
    if before == 0 or after == 0 or before >= after * _CLEAR:
        return None
    return f"slower on integers: {after:.3f} ms, {before:.3f} ms in float"
