"""Integers that grow evenly along the axes, followed through the operators that keep them so.

Position numbers, index grids of masks and tensors filled with one number come from Range, ConstantOfShape and weights,
and stay grids (`shape_rules.Grid`) under views, Transpose, Expand, Slice, sums, multiples, and as indices of one
another. Comparisons of grids whose bounds decide them are filled with 0 or 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim import symbolic
from onnxslim.atoms import Atoms
from onnxslim.shape_moves import slice_bounds
from onnxslim.shape_rules import Call, Fact, Grid, Shape, axis_of
from onnxslim.symbolic import Dim

TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
# Weights of more elements than this are not looked at.
MAX_WEIGHT = 1 << 16

Rule: TypeAlias = Callable[[Call, Shape], Grid | None]
_RULES: dict[str, Rule] = {}


def follow(call: Call, shape: Shape) -> Grid | None:
    """What the first output of a node, of this shape, is as a grid."""
    rule = _RULES.get(call.node.op_type)
    return None if rule is None or call.opset < 7 else rule(call, shape)  # before, operands meet in other ways


def grid_of(fact: Fact | None) -> Grid | None:
    """The grid of a tensor, also when it is known by its content."""
    if fact is None or fact.grid is not None or fact.content is None or not fact.content.size:
        return None if fact is None else fact.grid
    return _fit(fact.content)


def of_weight(array: np.ndarray) -> Grid | None:
    """The grid that the integers of a weight are."""
    return _fit(array) if 0 < array.size <= MAX_WEIGHT and array.dtype.kind in "iub" else None


def _fit(array: np.ndarray) -> Grid | None:
    """The grid through the first elements, if it gives all the others."""
    numbers = array.astype(np.int64) if array.dtype.kind in "iub" else array
    origin = (0,) * numbers.ndim
    start = numbers[origin] if numbers.dtype == object else int(numbers[origin])  # which does not wrap around
    steps = [
        0 if size == 1 else numbers.item(*origin[:axis], 1, *origin[axis + 1 :]) - start
        for axis, size in enumerate(numbers.shape)
    ]
    if numbers.dtype == object:  # sizes that are no numbers: few
        for index in np.ndindex(numbers.shape):
            if numbers[index] != sum((step * k for step, k in zip(steps, index, strict=True)), start):
                return None
        return Grid(start, tuple(steps))
    reach = sum((abs(int(step)) * (size - 1) for size, step in zip(numbers.shape, steps, strict=True)), abs(int(start)))
    if reach > np.iinfo(np.int64).max:
        return None
    expected = np.full(numbers.shape, start)
    for axis, (size, step) in enumerate(zip(numbers.shape, steps, strict=True)):
        expected += (np.arange(size) * step).reshape([-1 if k == axis else 1 for k in range(numbers.ndim)])
    return Grid(int(start), tuple(int(step) for step in steps)) if np.array_equal(expected, numbers) else None


def lowest(grid: Grid, shape: Shape) -> Dim | None:
    """A number that no element is below, or None."""
    total = grid.start
    for step, size in zip(grid.steps, shape, strict=True):
        if not symbolic.nonnegative(step):
            if not symbolic.nonnegative(-step):
                return None
            total = total + step * (size - 1)
    return total


def highest(grid: Grid, shape: Shape) -> Dim | None:
    """A number that no element is above, or None."""
    low = lowest(_times(grid, -1), shape)
    return None if low is None else -low


def _rule(*op_types: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def _given(call: Call, index: int) -> Grid | None:
    return grid_of(call.facts[index]) if index < len(call.facts) else None


def _filled(number: Dim, shape: Shape) -> Grid:
    return Grid(number, (0,) * len(shape))


def _times(grid: Grid, factor: Dim) -> Grid:
    return Grid(grid.start * factor, tuple(step * factor for step in grid.steps))


def _stretched(call: Call, index: int, shape: Shape) -> Grid | None:
    """An operand broadcast to ``shape``."""
    grid, own = _given(call, index), call.shape(index)
    if grid is None or own is None or len(own) > len(shape):
        return None
    fill = len(shape) - len(own)
    # A size that is neither 1 nor that of the result may turn out to be 1, and then the step is none.
    if not grid.uniform and any(d not in (1, shape[fill + k]) for k, d in enumerate(own)):
        return None
    return Grid(grid.start, (*[0] * fill, *grid.steps))


def _stretched_all(call: Call, shape: Shape) -> list[Grid] | None:
    grids = [_stretched(call, k, shape) for k in range(len(call.facts))]
    known = [grid for grid in grids if grid is not None]
    return known if len(known) == len(grids) else None


def _sum(a: Grid, b: Grid) -> Grid:
    return Grid(a.start + b.start, tuple(x + y for x, y in zip(a.steps, b.steps, strict=True)))


@_rule("Range")
def _range(call: Call, shape: Shape) -> Grid | None:
    start, delta = call.dims(0), call.dims(2)
    return None if start is None or delta is None else Grid(start[0], (0 if shape == (1,) else delta[0],))


@_rule("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Shape) -> Grid | None:
    tensor = call.attr("value")
    return None if tensor is None else _filled(int(tensor.numpy().reshape(-1)[0]), shape)


@_rule("Identity")
def _identity(call: Call, shape: Shape) -> Grid | None:
    return _given(call, 0)


@_rule("Cast")
def _cast(call: Call, shape: Shape) -> Grid | None:
    grid = _given(call, 0)
    if grid is None or ir.DataType(call.attr("to")) is not ir.DataType.BOOL:
        return grid
    known = grid.uniform and isinstance(grid.start, int)
    return _filled(int(grid.start != 0), shape) if known else None


@_rule("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def _view(call: Call, shape: Shape) -> Grid | None:
    grid, old = _given(call, 0), call.shape()
    if grid is None or old is None:
        return None
    if grid.uniform:
        return _filled(grid.start, shape)
    atoms = Atoms(old)
    if not atoms.view(shape):
        return None
    step_of: dict[int, Dim] = {}
    for axis, step in zip(atoms.source, grid.steps, strict=True):
        for atom in reversed(axis):
            step_of[atom] = step
            step = step * atoms.size[atom]
    steps: list[Dim] = []
    for axis in atoms.axes:
        # Axes grow together evenly when a step over the inner one's end is a step of the outer one.
        even = all(step_of[a] == step_of[b] * atoms.size[b] for a, b in itertools.pairwise(axis))
        if not even:
            return None
        steps.append(step_of[axis[-1]] if axis else 0)
    return Grid(grid.start, tuple(steps))


@_rule("Transpose")
def _transpose(call: Call, shape: Shape) -> Grid | None:
    grid = _given(call, 0)
    perm = call.attr("perm", list(range(len(shape)))[::-1])
    return None if grid is None else Grid(grid.start, tuple(grid.steps[p] for p in perm))


@_rule("Expand")
def _expand(call: Call, shape: Shape) -> Grid | None:
    return _stretched(call, 0, shape)


@_rule("Slice")
def _slice(call: Call, shape: Shape) -> Grid | None:
    grid, parts, old = _given(call, 0), slice_bounds(call), call.shape()
    if grid is None or old is None or parts is None:
        return _filled(grid.start, shape) if grid is not None and grid.uniform else None
    start, steps = grid.start, list(grid.steps)
    for axis, (first, _, step) in parts.items():
        if isinstance(first, int) and first < 0:
            first = first + old[axis]
        if step < 1 or not symbolic.nonnegative(first):
            return None
        # A start beyond the end leaves nothing, about which everything is true.
        start = start + steps[axis] * first
        steps[axis] = 0 if shape[axis] == 1 else steps[axis] * step
    return Grid(start, tuple(steps))


@_rule("Gather")
def _gather(call: Call, shape: Shape) -> Grid | None:
    data, own = _given(call, 0), call.shape()
    if data is None or own is None:
        return None
    if data.uniform:
        return _filled(data.start, shape)
    indices, index_shape = _given(call, 1), call.shape(1)
    low = None if indices is None or index_shape is None else lowest(indices, index_shape)
    if indices is None or low is None or not symbolic.nonnegative(low):
        return None  # an index below zero counts from the end
    axis = axis_of(call.attr("axis", 0), len(own))
    moved = _times(indices, data.steps[axis])
    return Grid(data.start + moved.start, (*data.steps[:axis], *moved.steps, *data.steps[axis + 1 :]))


@_rule("GatherElements", "GatherND", "Tile")
def _picked(call: Call, shape: Shape) -> Grid | None:
    grid = _given(call, 0)
    return _filled(grid.start, shape) if grid is not None and grid.uniform else None


@_rule("Add")
def _add(call: Call, shape: Shape) -> Grid | None:
    grids = _stretched_all(call, shape)
    return None if grids is None else _sum(*grids)


@_rule("Sub")
def _sub(call: Call, shape: Shape) -> Grid | None:
    grids = _stretched_all(call, shape)
    return None if grids is None else _sum(grids[0], _times(grids[1], -1))


@_rule("Neg")
def _neg(call: Call, shape: Shape) -> Grid | None:
    grid = _given(call, 0)
    return None if grid is None else _times(grid, -1)


@_rule("Mul")
def _mul(call: Call, shape: Shape) -> Grid | None:
    grids = _stretched_all(call, shape)
    if grids is None:
        return None
    a, b = grids
    return _times(b, a.start) if a.uniform else _times(a, b.start) if b.uniform else None


_TESTS: dict[str, Callable[[int], bool]] = {
    "Equal": lambda d: d == 0,
    "Less": lambda d: d < 0,
    "LessOrEqual": lambda d: d <= 0,
    "Greater": lambda d: d > 0,
    "GreaterOrEqual": lambda d: d >= 0,
}


@_rule(*_TESTS)
def _compare(call: Call, shape: Shape) -> Grid | None:
    grids = _stretched_all(call, shape)
    if grids is None:
        return None
    difference = _sum(grids[0], _times(grids[1], -1))
    bottom, top = lowest(difference, shape), highest(difference, shape)
    low = None if bottom is None else symbolic.bounds(bottom)[0]
    high = None if top is None else symbolic.bounds(top)[1]
    test = _TESTS[call.node.op_type]
    # Above a bound that is not below zero, and below one that is not above it, the tests change at most at zero.
    for bound, step in ((low, 1), (high, -1)):
        if bound is not None and bound * step >= 0 and test(bound) == test(bound + step):
            return _filled(int(test(bound)), shape)
    return _filled(int(test(0)), shape) if low == high == 0 else None


@_rule("Not")
def _not(call: Call, shape: Shape) -> Grid | None:
    grid = _given(call, 0)
    return None if grid is None or grid.start not in (0, 1) or not grid.uniform else _filled(int(not grid.start), shape)


def _logical(absorbing: int) -> Rule:
    def combine(call: Call, shape: Shape) -> Grid | None:
        numbers = [_number(_given(call, k)) for k in range(len(call.facts))]
        if absorbing in numbers:
            return _filled(absorbing, shape)
        return _filled(1 - absorbing, shape) if all(n is not None for n in numbers) else None

    return combine


_rule("And")(_logical(0))
_rule("Or")(_logical(1))


def _number(grid: Grid | None) -> int | None:
    """The number that all elements are, if it is known."""
    return grid.start if grid is not None and grid.uniform and isinstance(grid.start, int) else None


@_rule("Where")
def _where(call: Call, shape: Shape) -> Grid | None:
    condition = _number(_given(call, 0))
    if condition is not None:
        return _stretched(call, 1 if condition else 2, shape)
    yes, no = _stretched(call, 1, shape), _stretched(call, 2, shape)
    return yes if yes == no else None


@_rule("Concat")
def _concat(call: Call, shape: Shape) -> Grid | None:
    grids: Sequence[Grid | None] = [_given(call, k) for k in range(len(call.facts))]
    first = grids[0]
    return first if first is not None and first.uniform and all(grid == first for grid in grids) else None
