"""Rules of the operators that only move data: where sizes go, and what happens to a known content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim import symbolic
from onnxslim.shape_rules import FAR, MAX_CONTENT, NOTHING, Call, Fact, Shape, anything, axis_of, moved, rule
from onnxslim.symbolic import Dim


def reshape_target(shape: Shape | None, target: Sequence[Dim], allow_zero: bool) -> Shape:
    """Shape of Reshape's result: 0 copies a size (unless ``allow_zero``), -1 takes what remains."""
    result: list[Dim] = []
    for k, dim in enumerate(target):
        if dim == 0 and not allow_zero:
            dim = symbolic.unknown(0) if shape is None or k >= len(shape) else shape[k]
        elif dim != -1 and not symbolic.nonnegative(dim):
            dim = symbolic.unknown(0)  # may turn out to be -1
        result.append(dim)
    if -1 in result:
        free = result.index(-1)
        rest = None if shape is None else symbolic.quotient(shape, result[:free] + result[free + 1 :])
        result[free] = symbolic.unknown(0) if rest is None else rest
    return tuple(result)


def reordered(call: Call, shape: Shape | None) -> list[Fact]:
    """A new shape over the same elements in the same order."""
    content = call.content()
    if content is None or shape is None or not all(isinstance(d, int) for d in shape):
        return [NOTHING if shape is None else Fact(shape)]
    return [Fact(shape, content.reshape(shape))]  # type: ignore[arg-type]


@rule("Reshape")
def reshape(call: Call) -> list[Fact]:
    """0 copies, -1 infers."""
    target = call.dims(1) if call.opset >= 5 else call.attr("shape")
    if target is None:
        length = call.shape(1)
        return [Fact(anything(length[0])) if length and isinstance(length[0], int) else NOTHING]
    return reordered(call, reshape_target(call.shape(), target, bool(call.attr("allowzero", 0))))


@rule("Flatten")
def flatten(call: Call) -> list[Fact]:
    """Two axes."""
    shape = call.shape()
    if shape is None:
        return [Fact(anything(2))]
    axis = axis_of(call.attr("axis", 1), len(shape))
    return reordered(call, (symbolic.product(shape[:axis]), symbolic.product(shape[axis:])))


@rule("Squeeze")
def squeeze(call: Call) -> list[Fact]:
    """The given axes go; without axes, every axis of size 1."""
    shape, axes = call.shape(), call.param("axes", 1)
    if shape is None or (axes is None and call.has(1)):
        return [NOTHING]
    if axes is not None and not len(axes):  # no axes, or all of size 1: runtimes and the specification differ
        return [NOTHING]
    if axes is None:
        if not all(isinstance(d, int) for d in shape):
            return [NOTHING]
        return reordered(call, tuple(d for d in shape if d != 1))
    gone = {axis_of(a, len(shape)) for a in axes}
    return reordered(call, tuple(d for k, d in enumerate(shape) if k not in gone))


@rule("Unsqueeze")
def unsqueeze(call: Call) -> list[Fact]:
    """New axes of size 1, counted in the result."""
    shape, axes = call.shape(), call.param("axes", 1)
    if shape is None or axes is None:
        return [NOTHING]
    rank = len(shape) + len(axes)
    new, old = {axis_of(a, rank) for a in axes}, iter(shape)
    return reordered(call, tuple(1 if k in new else next(old) for k in range(rank)))


@rule("Transpose")
def transpose(call: Call) -> list[Fact]:
    """numpy.transpose."""
    shape = call.shape()
    if shape is None:
        return [NOTHING]
    perm = call.attr("perm", list(range(len(shape)))[::-1])
    return moved(call, tuple(shape[p] for p in perm), lambda c: c.transpose(perm))


@rule("Concat")
def concat(call: Call) -> list[Fact]:
    """numpy.concatenate."""
    shapes = [fact.shape for fact in call.facts if fact is not None]
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return [NOTHING]
    rank = len(known[0])
    axis = axis_of(call.attr("axis", 1), rank)
    contents = [fact.content for fact in call.facts if fact is not None and fact.content is not None]
    if len(contents) == len(shapes):
        result = np.concatenate(contents, axis)
        return [Fact(result.shape, result if result.size <= MAX_CONTENT else None)]
    alike = [shape for shape in known if 0 not in shape] or known
    sizes: list[Dim] = [0 if k == axis else _agreed([shape[k] for shape in alike]) for k in range(rank)]
    for shape in shapes:
        sizes[axis] = sizes[axis] + (symbolic.unknown(0) if shape is None else shape[axis])
    return [Fact(tuple(sizes))]


def _agreed(sizes: Sequence[Dim]) -> Dim:
    """The size of an axis that all inputs with elements have alike: a number that any of them gives."""
    numbers = [size for size in sizes if isinstance(size, int)]
    return next(iter(numbers), sizes[0] if len(set(sizes)) == 1 else symbolic.unknown(0))


@rule("Split")
def split(call: Call) -> list[Fact]:
    """One fact per part."""
    shape, count = call.shape(), len(call.node.outputs)
    sizes: Sequence[Dim] | None = call.dims(1) if call.has(1) else call.attr("split")
    if shape is None:
        return [NOTHING] * count
    axis = axis_of(call.attr("axis", 0), len(shape))
    if sizes is None and not call.has(1):
        sizes = _equal_parts(shape[axis], count)
    if sizes is None or len(sizes) != count:
        sizes = [symbolic.unknown(0) for _ in range(count)]
    content = call.content()
    facts = [Fact((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]
    if content is None or not all(isinstance(s, int) for s in sizes):
        return facts
    parts = np.split(content, np.cumsum(np.asarray(sizes[:-1], int)), axis)
    return [Fact(part.shape, part) for part in parts]


def _equal_parts(size: Dim, count: int) -> list[Dim]:
    """Equal parts, the last one smaller where they do not divide the size."""
    exact = symbolic.quotient([size], [count])
    if exact is not None:
        return [exact] * count
    part = symbolic.floor_divide(size + (count - 1), count)
    return [*[part] * (count - 1), size - part * (count - 1)]


def slice_bounds(call: Call) -> dict[int, tuple[Dim, Dim, int]] | None:
    """(start, end, step) per axis as the operator gives them; None when they are not all known."""
    shape = call.shape()
    if shape is None:
        return None
    if call.opset < 10:
        starts, ends, axes = call.attr("starts"), call.attr("ends"), call.attr("axes")
        steps = None
    else:
        starts, ends = call.dims(1), call.dims(2)
        axes, steps = call.ints(3), call.ints(4)
        if (call.has(3) and axes is None) or (call.has(4) and steps is None):
            return None
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else [axis_of(a, len(shape)) for a in axes]
    steps = [1] * len(starts) if steps is None else steps
    return {a: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


# Ends that mean the last element and all behind it, or, counting down, the first and all in front of it.
_TO_THE_END = (2**31 - 1, 2**63 - 1)


def _clamped(position: Dim, size: Dim) -> Dim:
    """A start or end of a slice with step 1, as a position from 0 to ``size``."""
    if isinstance(position, int):
        if position >= FAR:
            return size
        if position <= -FAR:
            return 0
        if position < 0:
            return symbolic.maximum(size + position, 0)
        return symbolic.minimum(position, size)
    return symbolic.minimum(position, size) if symbolic.nonnegative(position) else symbolic.unknown(0)


def _kept(size: int, start: int, end: int, step: int) -> range:
    """The positions that a slice keeps of an axis; unlike in Python, a start in front of it is its first element."""
    if step > 0 or not size:
        return range(size)[slice(start, end, step)]
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = -1 if end in _TO_THE_END else min(max(end + size if end < 0 else end, -1), size)
    return range(first, last, step)


def sliced_size(size: Dim, start: Dim, end: Dim, step: int) -> Dim:
    """Number of elements that a slice keeps of an axis."""
    if all(isinstance(v, int) for v in (size, start, end)) and step:
        return len(_kept(size, start, end, step))  # type: ignore[arg-type]
    if step == 1:
        first, last = _clamped(start, size), _clamped(end, size)
        return symbolic.maximum(last - first, 0)
    if step == -1 and start == -1 and isinstance(end, int) and end <= -FAR:
        return size
    if step > 1:
        length = sliced_size(size, start, end, 1)
        return symbolic.floor_divide(length + (step - 1), step)
    return symbolic.unknown(0)


@rule("Slice")
def slice_(call: Call) -> list[Fact]:
    """Per axis, start:end:step."""
    shape, parts = call.shape(), slice_bounds(call)
    if shape is None or parts is None:
        return [NOTHING if shape is None else Fact(_slice_unknown(call, shape))]
    result = list(shape)
    for axis, (start, end, step) in parts.items():
        result[axis] = sliced_size(shape[axis], start, end, step)
    numeric = all(isinstance(v, int) for part in parts.values() for v in part[:2])
    content = call.content()
    if content is None or not numeric:
        return [Fact(tuple(result))]
    for axis, (start, end, step) in parts.items():
        assert isinstance(start, int) and isinstance(end, int)
        content = np.take(content, _kept(content.shape[axis], start, end, step), axis)
    return [Fact(tuple(result), content)]


def _slice_unknown(call: Call, shape: Shape) -> Shape:
    axes = call.ints(3)
    changed = range(len(shape)) if axes is None else [axis_of(a, len(shape)) for a in axes]
    return tuple(symbolic.unknown(0) if k in changed else d for k, d in enumerate(shape))


@rule("Gather")
def gather(call: Call) -> list[Fact]:
    """The axes of the indices take the place of the gathered axis."""
    shape, indices = call.shape(0), call.shape(1)
    if shape is None or indices is None:
        return [NOTHING]
    axis = axis_of(call.attr("axis", 0), len(shape))
    result = (*shape[:axis], *indices, *shape[axis + 1 :])
    content, chosen = call.content(0), call.content(1)
    if content is None or chosen is None or not all(isinstance(i, int) for i in chosen.reshape(-1)):
        return [Fact(result)]
    size = content.shape[axis]
    if any(not -size <= i < size for i in chosen.reshape(-1)):
        return [Fact(result)]
    taken = np.take(content, chosen.astype(np.int64), axis)
    return [Fact(result, np.asarray(taken, object))]


@rule("GatherElements")
def gather_elements(call: Call) -> list[Fact]:
    """The shape of the indices."""
    return [Fact(call.shape(1))]


@rule("GatherND")
def gather_nd(call: Call) -> list[Fact]:
    """Each index tuple picks a slice."""
    shape, indices = call.shape(0), call.shape(1)
    if shape is None or not indices or not isinstance(indices[-1], int):
        return [NOTHING]
    return [Fact((*indices[:-1], *shape[call.attr("batch_dims", 0) + indices[-1] :]))]


@rule("Expand")
def expand(call: Call) -> list[Fact]:
    """The input and a tensor of the target shape, broadcast against each other."""
    shape, target = call.shape(), call.dims(1)
    if target is None:
        length = call.shape(1)
        if shape is None or not length or not isinstance(length[0], int):
            return [NOTHING]
        return [Fact(anything(max(len(shape), length[0])))]
    if shape is None:
        return [NOTHING]
    target = [d if symbolic.nonnegative(d) else symbolic.unknown(0) for d in target]
    rank = max(len(shape), len(target))
    padded = (*[1] * (rank - len(shape)), *shape)
    wanted = (*[1] * (rank - len(target)), *target)
    result = tuple(symbolic.broadcast(a, b) for a, b in zip(padded, wanted, strict=True))
    content = call.content()
    numbers = [d for d in result if isinstance(d, int)]
    if content is None or len(numbers) < rank or np.prod(numbers, dtype=float) > MAX_CONTENT:
        return [Fact(result)]
    return [Fact(result, np.broadcast_to(content, numbers))]


@rule("Tile")
def tile(call: Call) -> list[Fact]:
    """Sizes times repeats."""
    shape, repeats = call.shape(), call.dims(1)
    if shape is None or repeats is None or len(repeats) != len(shape):
        return [NOTHING if shape is None else Fact(anything(len(shape)))]
    result = tuple(a * b for a, b in zip(shape, repeats, strict=True))
    content = call.content()
    numbers = [d for d in result if isinstance(d, int)]
    if content is None or len(numbers) < len(result) or np.prod(numbers, dtype=float) > MAX_CONTENT:
        return [Fact(result)]
    return [Fact(result, np.tile(content, [int(r) for r in repeats]))]  # type: ignore[arg-type]


def pad_amounts(call: Call) -> dict[int, tuple[Dim, Dim]] | None:
    """(before, after) per padded axis; None when they are not known."""
    shape = call.shape()
    pads: Sequence[Dim] | None = call.dims(1) if call.opset >= 11 else call.attr("pads", call.attr("paddings"))
    if shape is None or pads is None:
        return None
    axes = call.ints(3) if call.has(3) else list(range(len(shape)))
    if axes is None:
        return None
    half = len(axes)
    return {axis_of(a, len(shape)): (pads[k], pads[half + k]) for k, a in enumerate(axes)}


@rule("Pad")
def pad(call: Call) -> list[Fact]:
    """Sizes plus what is added on both sides."""
    shape, amounts = call.shape(), pad_amounts(call)
    if shape is None or amounts is None:
        return [NOTHING if shape is None else Fact(anything(len(shape)))]
    result = list(shape)
    for axis, (before, after) in amounts.items():
        result[axis] = shape[axis] + before + after
    return [Fact(tuple(result))]


@rule("DepthToSpace")
def depth_to_space(call: Call) -> list[Fact]:
    """(n, c / b², h * b, w * b)."""
    shape, block = call.shape(), call.attr("blocksize")
    if shape is None or len(shape) != 4:
        return [Fact(anything(4))]
    n, c, h, w = shape
    return [Fact((n, symbolic.floor_divide(c, block * block), h * block, w * block))]


@rule("SpaceToDepth")
def space_to_depth(call: Call) -> list[Fact]:
    """(n, c * b², h / b, w / b)."""
    shape, block = call.shape(), call.attr("blocksize")
    if shape is None or len(shape) != 4:
        return [Fact(anything(4))]
    n, c, h, w = shape
    return [Fact((n, c * block * block, symbolic.floor_divide(h, block), symbolic.floor_divide(w, block)))]
