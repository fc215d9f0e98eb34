"""`intervals`: what a jet claims about a function holds, and two functions agree only when they are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxslim.passes.fuse import arithmetic as ar
from onnxslim.passes.fuse import intervals as iv
from onnxslim.passes.fuse import points
from onnxslim.passes.fuse.intervals import Jet

EPS, MOST = 2.0**-24, 3.4e38
FUNCTIONS: dict[str, Callable[[Jet], Jet]] = {
    "sum": lambda x: x + x.constant(0.3) * x - x.constant(2.0),
    "product": lambda x: (x - x.constant(1.0)) * (x + x.constant(2.0)),
    "power": lambda x: x.power(3),
    "quotient": lambda x: x / (x * x + x.constant(1.0)),
    "extrema": lambda x: x.maximum(-x).minimum(x * x),
    "exp": iv.exp,
    "log": lambda x: iv.log(x * x + x.constant(0.5)),
    "erf": iv.erf,
    "tanh": iv.tanh,
    "sigmoid": iv.sigmoid,
    "softplus": iv.softplus,
    "gelu": lambda x: ar.gelu(x, "none"),
    "gelu_tanh": lambda x: ar.gelu(x, "tanh"),
    "hard_swish": ar.hard_swish,
    "mish": ar.mish,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_slopes_stay_in_their_intervals(name: str) -> None:
    function = FUNCTIONS[name]
    edges = np.linspace(-8, 8, 97)
    cells = function(Jet.variable(edges[:-1], edges[1:], EPS, MOST))
    for share in np.linspace(0, 1, 41):
        x = edges[:-1] + share * (edges[1:] - edges[:-1])
        value = function(Jet.variable(x, x, EPS, MOST)).mid
        assert np.all(value >= cells.low - 1e-9 * np.abs(cells.low))
        assert np.all(value <= cells.high + 1e-9 * np.abs(cells.high))
        ahead = function(Jet.variable(x + 1e-6, x + 1e-6, EPS, MOST)).mid
        slope = (ahead - value) / 1e-6
        inside = share < 0.99
        assert not inside or np.all(slope >= cells.slope_low - 1e-4 * (1 + np.abs(cells.slope_low)))
        assert not inside or np.all(slope <= cells.slope_high + 1e-4 * (1 + np.abs(cells.slope_high)))


@pytest.mark.parametrize("most", [MOST, 65504.0, 3.0])
@pytest.mark.parametrize(
    "function",
    [
        *FUNCTIONS.values(),
        lambda x: x.reciprocal() + x.constant(1.0),  # not defined at 0
        iv.log,
        lambda x: x * x.constant(np.inf),  # 0 times infinity
        lambda x: x.unknown() + x,
    ],
)
def test_points_are_cells_without_width(function: Callable[[Jet], Jet], most: float) -> None:
    x = np.array([-60.0, -3.0, -0.5, 0.0, 0.25, 1.0, 7.0, 60.0])
    with np.errstate(all="ignore"):
        point, cell = points.at(x, function, EPS, most), function(Jet.variable(x, x, EPS, most))
    assert np.array_equal(point.mid, cell.mid)
    assert np.array_equal(point.lost, cell.lost)


def agree(f: Callable[[Jet], Jet], g: Callable[[Jet], Jet]) -> bool:
    return iv.agree(f, g, eps=EPS, most=MOST)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_agrees_with_itself_and_with_no_other(name: str) -> None:
    function = FUNCTIONS[name]
    assert agree(function, function)
    assert not any(agree(function, other) for key, other in FUNCTIONS.items() if key != name)
    assert not agree(function, lambda x: function(x) * x.constant(1.0001))
    assert not agree(function, lambda x: function(x) + x.constant(0.001))


@pytest.mark.parametrize("place", [1.2345, -7.7, 1e5, -3e20])
def test_a_difference_anywhere_is_found(place: float) -> None:
    """Of relative width 2e-7: no grid would hit it."""

    def bump(x: Jet) -> Jet:
        width = 1e-7 * abs(place)
        distance = x - x.constant(place)
        height = x.constant(0.01 * abs(place))
        hill = height - x.constant(0.01 * abs(place) / width) * distance.maximum(-distance)
        return ar.hard_swish(x) + ar.relu(hill)

    assert not agree(bump, ar.hard_swish)


def test_what_overflows_has_no_value_to_agree_with() -> None:
    """log(1 + exp(x)) is infinite in float32 from x = 89 on; where it is finite, it is softplus."""
    naive = lambda x: iv.log(iv.exp(x) + x.constant(1.0))  # noqa: E731
    assert agree(naive, iv.softplus)
    assert not agree(naive, lambda x: iv.softplus(x).minimum(x.constant(80.0)))


def test_infinite_constants() -> None:
    assert agree(lambda x: x.maximum(x.constant(-np.inf)), lambda x: x)
    assert not agree(lambda x: x.maximum(x.constant(-np.inf)), ar.relu)


def test_nothing_is_known_around_a_pole() -> None:
    assert not agree(lambda x: x.reciprocal() * x, lambda x: x.constant(1.0))
