"""Elementwise operators of ONNX as arithmetic on `Jet`: what a node does to a function of one variable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxslim.passes.fuse import intervals as iv
from onnxslim.passes.fuse.intervals import Jet

Operands = list[Jet | float | None]
Attributes = Mapping[str, Any]
Operator = Callable[[Jet, Operands, Attributes], Jet]


def relu(x: Jet) -> Jet:
    """max(x, 0)."""
    return x.maximum(x.constant(0.0))


def clip(x: Jet, low: float | None, high: float | None) -> Jet:
    """min(max(x, low), high); None or infinite: no bound."""
    if low is not None and np.isfinite(low):
        x = x.maximum(x.constant(low))
    return x.minimum(x.constant(high)) if high is not None and np.isfinite(high) else x


def leaky_relu(x: Jet, alpha: float) -> Jet:
    """x where positive, else alpha x."""
    return relu(x) - x.constant(alpha) * relu(-x)


def hard_sigmoid(x: Jet, alpha: float, beta: float) -> Jet:
    """alpha x + beta between 0 and 1."""
    return clip(x.constant(alpha) * x + x.constant(beta), 0.0, 1.0)


def hard_swish(x: Jet) -> Jet:
    """x times x / 6 + 1 / 2 between 0 and 1."""
    return x * hard_sigmoid(x, 1 / 6, 0.5)


def gelu(x: Jet, approximate: str) -> Jet:
    """x times the distribution function of the normal distribution, or its approximation by tanh."""
    half, one = x.constant(0.5), x.constant(1.0)
    if approximate == "tanh":
        inner = x.constant(np.sqrt(2 / np.pi)) * (x + x.constant(0.044715) * x.power(3))
        return half * x * (one + iv.tanh(inner))
    return half * x * (one + iv.erf(x / x.constant(np.sqrt(2.0))))


def swish(x: Jet, alpha: float) -> Jet:
    """x sigmoid(alpha x)."""
    return x * iv.sigmoid(x.constant(alpha) * x)


def mish(x: Jet) -> Jet:
    """x tanh(softplus(x))."""
    return x * iv.tanh(iv.softplus(x))


def unknown(x: Jet) -> Jet:
    """A function about which nothing is known: it agrees with none."""
    return x.unknown()


def _jets(x: Jet, operands: Operands) -> list[Jet]:
    return [x.constant(o) if isinstance(o, float) else o for o in operands if o is not None]


def _unary(f: Callable[[Jet], Jet]) -> Operator:
    return lambda x, operands, attributes: f(_jets(x, operands)[0])


def _with(f: Callable[..., Jet], **defaults: float | str) -> Operator:
    """``f`` with the attributes of these names, or their defaults."""
    return lambda x, operands, attributes: f(
        _jets(x, operands)[0], *(attributes.get(name, default) for name, default in defaults.items())
    )


def _folded(f: Callable[[Jet, Jet], Jet]) -> Operator:
    """``f`` of the first two operands, of that and the third, and so on."""

    def compute(x: Jet, operands: Operands, attributes: Attributes) -> Jet:
        first, *others = _jets(x, operands)
        for other in others:
            first = f(first, other)
        return first

    return compute


def _pow(x: Jet, operands: Operands, attributes: Attributes) -> Jet:
    base, exponent = operands
    if not isinstance(base, Jet) or not isinstance(exponent, float) or exponent not in (1.0, 2.0, 3.0, 4.0):
        return unknown(x)
    return base.power(int(exponent))


def _clip(x: Jet, operands: Operands, attributes: Attributes) -> Jet:
    value, low, high = (*operands, None, None)[:3]
    low, high = attributes.get("min", low), attributes.get("max", high)
    if not isinstance(value, Jet) or isinstance(low, Jet) or isinstance(high, Jet):
        return unknown(x)
    return clip(value, low, high)


OPERATORS: dict[str, Operator] = {
    "Add": _folded(lambda a, b: a + b),
    "Sub": _folded(lambda a, b: a - b),
    "Mul": _folded(lambda a, b: a * b),
    "Div": _folded(lambda a, b: a / b),
    "Max": _folded(lambda a, b: a.maximum(b)),
    "Min": _folded(lambda a, b: a.minimum(b)),
    "Pow": _pow,
    "Clip": _clip,
    "Neg": _unary(lambda a: -a),
    "Abs": _unary(lambda a: a.maximum(-a)),
    "Reciprocal": _unary(lambda a: a.reciprocal()),
    "Relu": _unary(relu),
    "Exp": _unary(iv.exp),
    "Log": _unary(iv.log),
    "Erf": _unary(iv.erf),
    "Tanh": _unary(iv.tanh),
    "Sigmoid": _unary(iv.sigmoid),
    "Softplus": _unary(iv.softplus),
    "HardSwish": _unary(hard_swish),
    "Mish": _unary(mish),
    "LeakyRelu": _with(leaky_relu, alpha=0.01),
    "HardSigmoid": _with(hard_sigmoid, alpha=0.2, beta=0.5),
    "Gelu": _with(gelu, approximate="none"),
    "Swish": _with(swish, alpha=1.0),
}
