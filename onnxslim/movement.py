"""Data movement, answered by executing the operator on an index tensor.

Reshape, Transpose, Split, Slice, Concat, Gather, DepthToSpace, Tile, Expand, Pad and their kin only copy elements. Run
on a tensor that holds its own flat indices, such an operator says for every output element which input element it is a
copy of; from that follows, without a rule per operator, which slices of the output a slice of the input becomes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime


@dataclasses.dataclass(frozen=True)
class Axis:
    """Axis ``axis`` of data input number ``tensor``."""

    tensor: int
    axis: int


@dataclasses.dataclass
class Block:
    """Axes of the inputs and of one output that move together, apart from all the others.

    Attributes:
        sources: input axes, ordered.
        outputs: output axes along which they vary, ordered.
        rows: per data input, (n, sources of that input + outputs): the coordinates that occur together.
        origins: per output axis, all input axes that vary along it, those that cannot be cut among them.
    """

    sources: list[Axis]
    outputs: list[int]
    rows: dict[int, np.ndarray]
    origins: dict[int, set[Axis]]


def copies(
    node: ir.Node, shapes: Sequence[tuple[int, ...]], arguments: Sequence[np.ndarray | None], opset: int
) -> list[np.ndarray]:
    """For each output of ``node``: the flat index of the input element that every output element copies, or -1.

    ``shapes`` are those of the leading data inputs, numbered through (the second starts where the first ends);
    ``arguments`` are the values of the inputs after them (shapes, indices, pads), None where absent.
    """
    inputs: list[ir.Value | None] = []
    feeds: dict[str, np.ndarray] = {}
    start = 0
    for k, shape in enumerate(shapes):
        size = int(np.prod(shape, dtype=np.int64))
        # float64 holds every index below 2**53 and is the one type that all these operators accept.
        feeds[f"x{k}"] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        inputs.append(_value(f"x{k}", ir.DataType.DOUBLE, shape))
        start += size
    initializers = []
    if node.op_type == "Pad" and "pads" not in node.attributes:
        # The constant, 0 where none is given, would pass for the first element.
        arguments = [arguments[0], np.array(-1.0), *arguments[2:]]
    for k, argument in enumerate(arguments):
        if argument is None:
            inputs.append(None)
            continue
        value = _value(f"a{k}", ir.DataType.from_numpy(argument.dtype), argument.shape)
        value.const_value = ir.tensor(argument, name=value.name)
        initializers.append(value)
        inputs.append(value)
    outputs = [ir.Value(name=f"y{k}", type=ir.TensorType(ir.DataType.DOUBLE)) for k in range(len(node.outputs))]
    attributes = list(node.attributes.values())
    if node.op_type == "Pad" and "pads" in node.attributes:
        attributes = [a for a in attributes if a.name != "value"] + [ir.AttrFloat32("value", -1.0)]
    copy = ir.Node("", node.op_type, inputs, attributes, outputs=outputs)
    graph = ir.Graph(
        [v for v in inputs if v is not None and v.name in feeds],
        outputs,
        nodes=[copy],
        initializers=initializers,
        opset_imports={"": opset},
        name="movement",
    )
    results = runtime.run(runtime.load(ir.Model(graph, ir_version=8), threads=1, optimize=False), feeds)
    return [np.asarray(results[v.name]).astype(np.int64) for v in outputs if v.name]


def blocks(
    indices: np.ndarray, shapes: Sequence[tuple[int, ...]], fixed: set[Axis]
) -> tuple[list[Block], set[int], dict[Axis, np.ndarray]]:
    """Split the axes of an output into independent blocks.

    An input axis that cannot be cut never removes anything, so it has no part in what a slice of the output depends on:
    of (channels, height) flattened into one axis, the elements of a channel leave with the channel.

    Args:
        indices: one result of `copies`.
        shapes: of the data inputs.
        fixed: input axes that cannot be cut.

    Returns:
        The blocks; the output axes along which only fixed axes vary, which cannot be cut either; and for each other
        input axis along which no output axis varies, the coordinates of it that the output uses (they must stay).
    """
    starts = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
    coordinates: dict[Axis, np.ndarray] = {}
    varies: dict[Axis, set[int]] = {}
    for k, shape in enumerate(shapes):
        inside = (indices >= starts[k]) & (indices < starts[k + 1])
        if not inside.any():
            continue
        for axis, size in enumerate(shape):
            if size < 2:
                continue
            stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
            where = np.where(inside, (indices - starts[k]) // stride % size, -1)
            coordinates[Axis(k, axis)] = where
            varies[Axis(k, axis)] = {b for b in range(indices.ndim) if _varies(where, b)}
    # Connected components of the graph "input axis - output axis along which its coordinate varies".
    result: list[Block] = []
    stuck: dict[Axis, np.ndarray] = {}
    pending = [axis for axis in varies if axis not in fixed]
    free = {b for axis in pending for b in varies[axis]}
    while pending:
        sources = {pending.pop(0)}
        while True:
            reach = {b for axis in sources for b in varies[axis]}
            more = {axis for axis in pending if varies[axis] & reach}
            if not more:
                break
            sources |= more
            pending = [axis for axis in pending if axis not in more]
        if not reach:
            for source in sources:
                stuck[source] = np.setdiff1d(coordinates[source], [-1])
            continue
        ordered, outputs = sorted(sources, key=lambda a: (a.tensor, a.axis)), sorted(reach)
        origins = {b: {axis for axis, out in varies.items() if b in out} for b in outputs}
        result.append(Block(ordered, outputs, _rows(ordered, outputs, coordinates, indices.shape), origins))
    uncut = {b for axis, out in varies.items() if axis in fixed for b in out} - free
    return result, uncut, stuck


def _varies(where: np.ndarray, axis: int) -> bool:
    if where.shape[axis] < 2:
        return False
    low = np.where(where < 0, np.iinfo(np.int64).max, where).min(axis=axis)
    return bool((where.max(axis=axis) > low).any())


def _rows(
    sources: list[Axis], outputs: list[int], coordinates: dict[Axis, np.ndarray], shape: tuple[int, ...]
) -> dict[int, np.ndarray]:
    """Per data input: the combinations of source and output coordinates that occur, without repetition."""
    # Along an axis that has no part in this block nothing changes, except which input an element comes from (Concat).
    rows: dict[int, np.ndarray] = {}
    for tensor in sorted({axis.tensor for axis in sources}):
        own = [axis for axis in sources if axis.tensor == tensor]
        cut = tuple(slice(None) if b in outputs else _first_valid(coordinates[own[0]], b) for b in range(len(shape)))
        grids = [coordinates[axis][cut] for axis in own]
        positions = np.indices(grids[0].shape)
        columns = [grid.ravel() for grid in grids] + [positions[b].ravel() for b in outputs]
        valid = columns[0] >= 0
        sizes = [int(c.max()) + 1 for c in columns]
        key = np.ravel_multi_index([c[valid] for c in columns], sizes)
        rows[tensor] = np.stack(np.unravel_index(np.unique(key), sizes), axis=1)
    return rows


def _first_valid(where: np.ndarray, axis: int) -> slice:
    """The first position on ``axis`` at which the tensor appears at all."""
    others = tuple(b for b in range(where.ndim) if b != axis)
    first = int(np.argmax((where >= 0).any(axis=others)))
    return slice(first, first + 1)


def _value(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
