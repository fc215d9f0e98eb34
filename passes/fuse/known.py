"""The activation functions that have an operator of their own, and how to read their parameters off values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from onnxslim.passes.fuse import arithmetic as ar
from onnxslim.passes.fuse import intervals as iv
from onnxslim.passes.fuse.intervals import Array, Jet

# Where functions are compared before anything is proven, and their parameters read off.
_POSITIVE = np.array([0.01, 0.3, 0.7, 1.0, 1.3, 2.0, 2.9, 3.01, 4.0, 5.5, 9.0, 20.0, 60.0])
PROBES: Array = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])

Parameters = Mapping[str, float | str]


@dataclasses.dataclass(frozen=True)
class Known:
    """An activation function.

    Attributes:
        since: version of the operator set that has the operator.
        evaluate: the function, given its parameters by name.
        fit: the parameters that a function with these values at `PROBES` would have, or None.
        scalable: a constant times the function is worth recognizing too.
    """

    op_type: str
    since: int
    evaluate: Callable[..., Jet]
    fit: Callable[[Array], Parameters | None] = lambda values: {}
    scalable: bool = False


def short(number: float) -> float:
    """The nearest number that float32 holds: attributes have no more."""
    return float(np.float32(number))


def _at(values: Array, x: float) -> float:
    return float(values[x == PROBES][0])


def _line(values: Array) -> Parameters | None:
    """Slope and offset of the middle part of a function that goes from 0 to 1 along a line."""
    inside = np.flatnonzero((values > 0.02) & (values < 0.98))
    if len(inside) < 2:
        return None
    a, b = inside[0], inside[-1]
    alpha = float((values[b] - values[a]) / (PROBES[b] - PROBES[a]))
    return {"alpha": short(alpha), "beta": short(float(values[a] - alpha * PROBES[a]))}


def _slope(values: Array) -> Parameters | None:
    """alpha of a function that is alpha x below zero, unless it is x."""
    slope = -_at(values, -1.0)
    return {"alpha": short(slope)} if abs(slope - 1) > 1e-4 else None


def _bounds(values: Array) -> Parameters | None:
    low, high = float(values[0]), float(values[-1])
    return {"low": low, "high": high} if low < high else None


# A function that fits several is the first of them. Not here: Swish, which ONNX Runtime runs as four kernels, while it
# finds x sigmoid(alpha x) by itself and runs that as one.
KNOWN = (
    Known("Relu", 6, ar.relu),
    Known("Clip", 12, ar.clip, _bounds),
    Known("Sigmoid", 6, iv.sigmoid),
    Known("Tanh", 6, iv.tanh),
    Known("Softplus", 1, iv.softplus),
    Known("HardSwish", 14, ar.hard_swish, scalable=True),
    Known("HardSigmoid", 6, ar.hard_sigmoid, _line),
    Known("Gelu", 20, ar.gelu, lambda values: {"approximate": "none"}, scalable=True),
    Known("Gelu", 20, ar.gelu, lambda values: {"approximate": "tanh"}, scalable=True),
    Known("Mish", 18, ar.mish),
    Known("LeakyRelu", 6, ar.leaky_relu, _slope),
)
