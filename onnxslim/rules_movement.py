"""The rules of operators that move data, for `onnxslim.coupling`: one for all, and what each needs changed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim import movement
from onnxslim.channels import Labels
from onnxslim.coupling import Axes, Coupling, reason, unknown
from onnxslim.graph import add_constant, add_node, attribute, constant, is_constant, is_op, opset, set_attribute
from onnxslim.movement import Axis
from onnxslim.rules import data, optional, passed, python_slice, rule


@rule("Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather Expand Tile Pad DepthToSpace SpaceToDepth")
def data_movement(c: Coupling, node: ir.Node) -> None:
    """Ask `onnxslim.movement` which slices of the outputs the slices of the inputs become; say the same of the ids."""
    count = len(node.inputs) if node.op_type == "Concat" else 1
    tensors = [data(node, k) for k in range(count)]
    shapes = [c.shape(v) for v in tensors]
    arguments = [c.argument(v) for v in node.inputs[count:]]
    unseen = [v for v, a in zip(node.inputs[count:], arguments, strict=True) if v is not None and a is None]
    axes = {Axis(k, a): x for k, v in enumerate(tensors) for a, x in enumerate(c.axes(v))}
    if all(x is None for x in axes.values()) and not unseen:
        for output in node.outputs:
            c.labels[output] = [None] * len(c.shape(output))
        return
    if unseen and not (node.op_type == "Pad" and unseen == [optional(node, 2)]):
        unknown(c, node)
        return
    if node.op_type == "Concat":  # a part that cannot be cut does not hold back the others
        axis = attribute(node, "axis") % len(shapes[0])
        if any(axes[Axis(k, axis)] is not None for k in range(count)):
            for k in range(count):
                if axes[Axis(k, axis)] is None and shapes[k][axis] > 1:
                    axes[Axis(k, axis)] = c.ids.new(shapes[k][axis])
                    c.freeze(axes[Axis(k, axis)], reason(node, "joined from a tensor that cannot be cut"))
    for value in node.inputs[count:]:
        if not is_constant(value):
            c.freeze_value(value, reason(node, "its values decide where the data goes"))
    for blocked, why in _blocked(c, node, [axes[Axis(0, k)] for k in range(len(shapes[0]))]):
        c.freeze(axes[Axis(0, blocked)], reason(node, why))
        axes[Axis(0, blocked)] = None
    fixed = {axis for axis, x in axes.items() if x is None}
    elastic = {a for a, x in axes.items() if c.is_elastic(tensors[a.tensor], a.axis, x)}
    for output, indices in zip(node.outputs, movement.copies(node, shapes, arguments, opset(c.model)), strict=True):
        found, uncut, stuck = movement.blocks(indices, shapes, fixed)
        for axis, used in stuck.items():
            labels = axes[axis]
            assert labels is not None
            c.freeze(labels[used], reason(node, "picks slices of an axis that it drops"))
        out: Axes = [None] * indices.ndim
        for block in found:
            for axis_out, labels in _label(c, node, block, axes, indices.shape).items():
                out[axis_out] = labels
                if block.origins[axis_out] & elastic:
                    c.mark_elastic(labels)
        if node.op_type in ("DepthToSpace", "SpaceToDepth"):
            for labels in filter(None.__ne__, out[2:]):
                c.freeze(labels, reason(node, "its blocks are whole"))
        linked = {b for block in found for b in block.outputs} | uncut
        if node.op_type == "Expand":  # axes along which one slice is repeated: copies can leave
            for b in range(indices.ndim):
                if b not in linked and indices.shape[b] > 1 and not _varies_outside(c, node, b, indices.ndim):
                    out[b] = c.ids.new(indices.shape[b])
        c.set(output, out)
    _rewrite(c, node, axes)


def _varies_outside(c: Coupling, node: ir.Node, axis: int, rank: int) -> bool:
    """True when the size of an output axis is that of an input axis, which can be symbolic."""
    shape = c.shape(data(node))
    own = axis - rank + len(shape)
    return own >= 0 and shape[own] != 1


def _blocked(c: Coupling, node: ir.Node, axes: Axes) -> list[tuple[int, str]]:
    """Input axes that must stay whole for what the operator does along them, each with the reason."""
    rank = len(axes)
    kind = node.op_type
    found = [(axis, "indexed by values that are computed at run time") for axis in _run_time_axes(c, node, rank)]
    if kind == "Pad" and not found:
        pads = attribute(node, "pads", c.argument(optional(node, 1)))
        chosen = c.argument(optional(node, 3))
        where = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen]
        copied = attribute(node, "mode", "constant") != "constant"
        for k, axis in enumerate(where):
            ends = [int(pads[k]), int(pads[k + len(where)])]
            if min(ends) < 0 or (copied and max(ends) > 0):
                found.append((axis, "padded or cropped by a number of its own slices"))
    if kind in ("Gather", "Split"):
        indexed = [attribute(node, "axis", 0) % rank]
    elif kind == "Slice":
        starts, order = c.argument(optional(node, 1)), c.argument(optional(node, 3))
        indexed = [] if starts is None else [int(a) % rank for a in (range(starts.size) if order is None else order)]
    else:
        indexed = []
    found.extend(
        (axis, "cut by positions on an axis whose length depends on the input")
        for axis in indexed
        if c.is_elastic(None, axis, axes[axis])
    )
    return found


def _run_time_axes(c: Coupling, node: ir.Node, rank: int) -> list[int]:
    """Input axes whose indexing is computed at run time, so that another sample could index them otherwise."""
    if node.op_type == "Gather" and not is_constant(optional(node, 1)):
        return [attribute(node, "axis", 0) % rank]
    if node.op_type == "Slice" and "starts" in node.attributes:  # before opset 10: not rewritten
        return [a % rank for a in attribute(node, "axes", list(range(len(attribute(node, "starts")))))]
    if node.op_type == "Slice" and any(v is not None and not is_constant(v) for v in node.inputs[1:]):
        chosen = c.argument(optional(node, 3))
        fixed = is_constant(optional(node, 3)) and chosen is not None
        return [int(a) % rank for a in chosen.ravel()] if fixed and chosen is not None else list(range(rank))
    if node.op_type == "Split" and optional(node, 1) is not None and not is_constant(optional(node, 1)):
        return [attribute(node, "axis", 0) % rank]
    if node.op_type in ("Tile", "Pad") and not is_constant(optional(node, 1)) and "pads" not in node.attributes:
        # Repeated by the size of the batch, an axis says nothing about the others.
        known = _known_entries(c, data(node, 1)) if node.op_type == "Tile" else set()
        return [a for a in range(rank) if a not in known]
    return []


def _label(
    c: Coupling, node: ir.Node, block: movement.Block, axes: dict[Axis, Labels | None], shape: tuple[int, ...]
) -> dict[int, Labels]:
    """Labels for the output axes of a block, and the statements that bind them to the inputs'."""
    single = len(block.outputs) == 1 and all(
        sum(a.tensor == tensor for a in block.sources) == 1 for tensor in block.rows
    )
    out = {b: c.ids.new(shape[b]) for b in block.outputs}
    seen = {b: np.zeros(shape[b], bool) for b in block.outputs}
    for tensor, rows in block.rows.items():
        sources = [a for a in block.sources if a.tensor == tensor]
        left = [_ids(axes, a)[rows[:, k]] for k, a in enumerate(sources)]
        right = [out[b][rows[:, len(sources) + k]] for k, b in enumerate(block.outputs)]
        for k, b in enumerate(block.outputs):
            seen[b][rows[:, len(sources) + k]] = True
        if single:
            c.ids.tie(left[0], right[0])
        elif len(left) == 1:
            c.ids.define(left[0], right)
        elif len(right) == 1:
            c.ids.define(right[0], left)
        else:
            both = c.ids.new(len(rows))
            c.ids.define(both, left)
            c.ids.define(both, right)
    for b, present in seen.items():
        c.freeze(out[b][~present], reason(node, "filled with a constant, or of a tensor that cannot be cut"))
    return out


def _ids(axes: dict[Axis, Labels | None], axis: Axis) -> Labels:
    labels = axes[axis]
    assert labels is not None
    return labels


def _rewrite(c: Coupling, node: ir.Node, axes: dict[Axis, Labels | None]) -> None:
    """Register the change of the constants that say how large the pieces are, or freeze what cannot be changed."""
    if node.op_type in ("Reshape", "Expand"):
        output = c.axes(node.outputs[0])
        target = c.argument(optional(node, 1))
        shift = 0 if target is None else len(output) - target.size  # Expand aligns from the right
        _sizes_argument(c, node, 1, {a - shift: x for a, x in enumerate(output) if a >= shift})
    elif node.op_type == "Squeeze" and optional(node, 1) is None and "axes" not in node.attributes:
        c.edit(
            functools.partial(_squeeze, c, node, [x for _, x in sorted(axes.items(), key=lambda item: item[0].axis)])
        )
    elif node.op_type == "Split":
        axis = attribute(node, "axis", 0) % len(c.shape(data(node)))
        parts = [c.axes(v)[axis] for v in node.outputs]
        sizes = [c.shape(v)[axis] for v in node.outputs]
        if any(x is not None for x in parts):
            c.edit(functools.partial(_split, c, node, parts, sizes))
    elif node.op_type == "Gather":
        labels = axes[Axis(0, attribute(node, "axis", 0) % len(axes))]
        if labels is not None:
            c.edit(functools.partial(_gather, c, node, labels))
    elif node.op_type == "Slice":
        for axis in range(len(axes)):
            labels = axes[Axis(0, axis)]
            # Where a bound is computed at run time, the axes that it cuts are whole.
            if labels is not None and all(is_constant(optional(node, k)) for k in (1, 2)):
                c.edit(functools.partial(_slice, c, node, axis, labels))


def _sizes_argument(c: Coupling, node: ir.Node, index: int, entries: dict[int, Labels | None]) -> None:
    """Entry k of the sizes in input ``index`` is the size of an axis with these labels: keep it true, or freeze."""
    value = optional(node, index)
    if value is None:
        return
    sizes = constant(value)
    if sizes is not None:
        c.labels.setdefault(value, [None] * sizes.ndim)

        def change(kept: Callable[[Labels], np.ndarray]) -> None:
            new = sizes.copy()
            for k, labels in entries.items():
                if labels is not None and sizes[k] == len(labels):  # not 0, -1, or the 1 of an Expand
                    new[k] = kept(labels).sum()
            if (new != sizes).any():
                node.replace_input_with(index, add_constant(c.model.graph, f"{value.name}_cut", new))

        c.edit(change)
        return
    pieces, targets = _pieces(c, value), c.targets.get(node, {})
    for k, labels in entries.items():
        if k in targets:
            read, _ = targets.pop(k)
            c.tie(labels, read, reason(node, "has the size of an axis that cannot be cut"))
        elif labels is None:
            continue
        elif k not in pieces:
            c.freeze(labels, reason(node, "its size is computed at run time"))
        else:
            c.edit(functools.partial(_piece, c, node, index, pieces[k], labels))


def _pieces(c: Coupling, value: ir.Value) -> dict[int, tuple[int, int]]:
    """For sizes joined by a Concat: entry -> (input of the Concat, position in it), where that input is constant."""
    producer = value.producer()
    if producer is None or not is_op(producer, "Concat"):
        return {}
    result: dict[int, tuple[int, int]] = {}
    start = 0
    for k, part in enumerate(producer.inputs):
        assert part is not None
        size = c.shape(part)[0]
        if is_constant(part):
            result.update((start + j, (k, j)) for j in range(size))
        start += size
    return result


def _known_entries(c: Coupling, value: ir.Value) -> set[int]:
    """Which entries of sizes that a Concat joins, or that are read from a value, are the same for every input."""
    producer = value.producer()
    read = producer.inputs[0] if is_op(producer, "Shape") and producer is not None else None
    if producer is None or read is None or read.shape is None:
        return set(_pieces(c, value))
    span = range(len(read.shape))[attribute(producer, "start", 0) : attribute(producer, "end", None)]
    return {k for k, axis in enumerate(span) if isinstance(read.shape[axis], int)}


def _piece(
    c: Coupling,
    node: ir.Node,
    index: int,
    piece: tuple[int, int],
    labels: Labels,
    kept: Callable[[Labels], np.ndarray],
) -> None:
    """Change one entry of sizes that a Concat joins; its other readers keep the old sizes."""
    value = node.inputs[index]
    if kept(labels).all() or value is None:
        return
    concat = value.producer()
    assert concat is not None
    part, position = piece
    sizes = constant(concat.inputs[part])
    assert sizes is not None
    if sizes[position] != len(labels):  # 0, -1, or the 1 of an Expand
        return
    if len(value.uses()) > 1 or value.is_graph_output():
        concat = add_node(c.model.graph, "Concat", list(concat.inputs), before=node, attributes={"axis": 0}, like=value)
        node.replace_input_with(index, concat.outputs[0])
    new = sizes.copy()
    new[position] = kept(labels).sum()
    concat.replace_input_with(part, add_constant(c.model.graph, f"{value.name}_cut", new))


def _squeeze(c: Coupling, node: ir.Node, axes: Axes, kept: Callable[[Labels], np.ndarray]) -> None:
    """Name the axes of a Squeeze that drops whatever has size 1, when another axis comes down to that."""
    if not any(x is not None and kept(x).sum() == 1 for x in axes):
        return
    dropped = [a for a, n in enumerate(c.shape(data(node))) if n == 1]
    if opset(c.model) < 13:
        set_attribute(node, "axes", dropped)
        return
    node.resize_inputs(2)
    chosen = add_constant(c.model.graph, f"{node.outputs[0].name}_axes", np.array(dropped, np.int64))
    node.replace_input_with(1, chosen)


def _split(
    c: Coupling,
    node: ir.Node,
    parts: list[Labels | None],
    sizes: list[int],
    kept: Callable[[Labels], np.ndarray],
) -> None:
    new = [n if x is None else int(kept(x).sum()) for x, n in zip(parts, sizes, strict=True)]
    if new == sizes:
        return
    if opset(c.model) < 13:
        set_attribute(node, "split", new)
        return
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) < 2:
        node.resize_inputs(2)
    node.replace_input_with(1, add_constant(c.model.graph, f"{node.outputs[0].name}_split", np.array(new, np.int64)))


def _gather(c: Coupling, node: ir.Node, labels: Labels, kept: Callable[[Labels], np.ndarray]) -> None:
    """Point a Gather at the new positions of what it selects, without what has left."""
    output = c.axes(node.outputs[0])
    indices = constant(node.inputs[1])
    assert indices is not None
    axis = attribute(node, "axis", 0) % len(c.shape(data(node)))
    new = indices % len(labels)
    for k in range(indices.ndim):
        own = output[axis + k]
        if own is not None:
            new = np.compress(kept(own), new, axis=k)
    new = (np.cumsum(kept(labels)) - 1)[new].astype(indices.dtype)
    if new.shape != indices.shape or (new != indices).any():
        node.replace_input_with(1, add_constant(c.model.graph, f"{node.outputs[0].name}_indices", new))


def _slice(c: Coupling, node: ir.Node, axis: int, labels: Labels, kept: Callable[[Labels], np.ndarray]) -> None:
    """Point a Slice at the new positions of what it selects on one axis; a Gather does it where they are uneven."""
    keep = kept(labels)
    starts, ends, order, steps = (constant(optional(node, k)) for k in (1, 2, 3, 4))
    assert starts is not None and ends is not None
    rank = len(c.shape(data(node)))
    where = [int(a) % rank for a in (range(len(starts)) if order is None else order)]
    if axis not in where or keep.all():
        return
    k = where.index(axis)
    chosen = np.arange(len(labels))[python_slice(int(starts[k]), int(ends[k]), 1 if steps is None else int(steps[k]))]
    position = (np.cumsum(keep) - 1)[chosen[keep[chosen]]]
    name = node.outputs[0].name or node.op_type
    begin, end, step = int(position[0]), int(position[-1]) + 1, 1
    if (np.diff(position) != 1).any():
        chosen_first = add_constant(c.model.graph, f"{name}_indices", position)
        gather = add_node(
            c.model.graph, "Gather", [node.inputs[0], chosen_first], before=node, attributes={"axis": axis}
        )
        node.replace_input_with(0, gather.outputs[0])
        begin, end = 0, len(position)
    for index, old, new in ((1, starts, begin), (2, ends, end), (4, steps, step)):
        if old is not None and old[k] != new:
            array = old.copy()
            array[k] = new
            node.replace_input_with(index, add_constant(c.model.graph, f"{name}_bounds", array))


@rule("ConstantOfShape")
def constant_of_shape(c: Coupling, node: ir.Node) -> None:
    """Every slice is the same: any can leave of an axis whose size is a constant."""
    output = node.outputs[0]
    axes: Axes = [c.ids.new(n) if n > 1 else None for n in c.shape(output)]
    c.set(output, axes)
    if is_constant(data(node)):
        c.labels[data(node)] = [None]
    _sizes_argument(c, node, 0, dict(enumerate(axes)))


@rule("Resize Upsample")
def resize(c: Coupling, node: ir.Node) -> None:
    """Axes that are interpolated stay, all spatial ones among them; the others pass."""
    shape, resized = c.shape(data(node)), c.shape(node.outputs[0])
    rank = len(shape)
    changed = [a for a in range(rank) if shape[a] != resized[a] or a >= 2]
    axes = passed(c, node, changed, "resized along this axis")
    c.set(node.outputs[0], axes)
    if node.op_type == "Resize" and optional(node, 3) is not None:
        order = attribute(node, "axes", list(range(rank)))
        _sizes_argument(c, node, 3, {k: axes[a] for k, a in enumerate(order)})


@rule("GridSample")
def grid_sample(c: Coupling, node: ir.Node) -> None:
    """(N, C, ...) sampled where a grid (N, ..., axes) says: the channels pass, what is interpolated stays."""
    x, grid = c.axes(data(node)), c.axes(data(node, 1))
    for labels in (*x[2:], *grid[1:]):
        c.freeze(labels, reason(node, "interpolated along this axis"))
    batch = c.tie(x[0], grid[0], reason(node, "combined with a tensor that cannot be cut"))
    c.set(node.outputs[0], [batch, x[1], *[None] * (len(x) - 2)])
