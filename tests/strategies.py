"""Hypothesis strategies for small valid ONNX graphs that exercise what rewrites get wrong.

`graphs` draws operators with non-default attributes, weights shared by several nodes, constants that broadcast along
every axis, values that several nodes read or that are graph outputs, a weight that is a graph output, ``If`` branches
that capture values and weights, and a symbolic batch. `build` gives tests that look at one rule the same tools.

    @given(graphs())
    def test_pass(case):
        model, feeds = case
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.printer
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

BATCH = 2


class Case(tuple[onnx.ModelProto, dict[str, np.ndarray]]):
    """(model, feeds), printed as ONNX text when a test fails."""

    def __repr__(self) -> str:
        copy = onnx.ModelProto()
        copy.CopyFrom(self[0])
        large = [t for t in copy.graph.initializer if math.prod(t.dims) > 16]
        for tensor in large:
            copy.graph.initializer.remove(tensor)
        return onnx.printer.to_text(copy) + "\n".join(f"{t.name}: {list(t.dims)}" for t in large)


@dataclasses.dataclass(frozen=True)
class Value:
    """A float32 tensor of the graph under construction; axis 0 is the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


class Builder:
    """Collects nodes and weights; every random decision comes from hypothesis, every number from a seed it drew.

    ``share=False`` gives every node weights of its own.
    """

    def __init__(self, draw: Callable[..., Any], *, opset: int = 17, symbolic: bool = True, share: bool = True) -> None:
        self.draw = draw
        self.share = share
        self.opset = opset
        self.symbolic = symbolic
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.inputs: list[Value] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.values: list[Value] = []
        self.count = 0

    def name(self, stem: str) -> str:
        """A name that was not given before."""
        self.count += 1
        return f"{stem}{self.count}"

    def pick(self, *options: Any) -> Any:
        """One of the options; hypothesis shrinks towards the first."""
        return self.draw(st.sampled_from(options))

    def input(self, shape: Sequence[int]) -> Value:
        """A graph input of shape (batch, *shape)."""
        value = Value(self.name("x"), (BATCH, *shape))
        self.inputs.append(value)
        self.feeds[value.name] = self.rng.standard_normal(value.shape).astype(np.float32)
        self.values.append(value)
        return value

    def weight(self, shape: Sequence[int], scale: float = 1.0, *, positive: bool = False) -> str:
        """An initializer: one of the same shape that exists already, or new numbers (zeros and ones now and then)."""
        shape = tuple(shape)
        same = [n for n, a in self.weights.items() if a.shape == shape and a.dtype == np.float32]
        same = [n for n in same if not positive or self.weights[n].min(initial=1.0) > 0.1]
        if same and self.share and self.pick(False, False, True):
            return self.pick(*same)
        array = self.rng.standard_normal(shape) * scale
        kind = self.pick("normal", "normal", "normal", "zero", "one") if math.prod(shape) < 32 else "normal"
        if kind == "zero":
            array = np.zeros(shape)
        elif kind == "one":
            array = np.ones(shape)
        if positive:
            array = np.abs(array) + 0.5
        return self.constant(array.astype(np.float32))

    def constant(self, array: np.ndarray, stem: str = "w") -> str:
        """An initializer with this content."""
        name = self.name(stem)
        self.weights[name] = np.asarray(array)
        return name

    def node(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> Value:
        """Append a node whose first output has ``shape``."""
        value = Value(self.name(op.lower()), tuple(shape))
        self.nodes.append(helper.make_node(op, list(inputs), [value.name], name=f"n_{value.name}", **attributes))
        self.values.append(value)
        return value

    def declared(self, value: Value) -> onnx.ValueInfoProto:
        """Type and shape as the file states them."""
        batch = "N" if self.symbolic else BATCH
        return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [batch, *value.shape[1:]])

    def finish(self, outputs: Sequence[Value], weights_as_outputs: Sequence[str] = ()) -> Case:
        """The model and something to feed it."""
        declared = [self.declared(value) for value in dict.fromkeys(outputs)]
        declared += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, self.weights[name].shape)
            for name in weights_as_outputs
        ]
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [self.declared(value) for value in self.inputs],
            declared,
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return Case((model, self.feeds))


def _sizes(b: Builder, x: Value, out: Callable[[int, int, int, int, int], int], largest: int) -> dict[str, Any]:
    """kernel_shape, strides, dilations and pads for the spatial axes of ``x`` with non-empty results."""
    spatial = x.rank - 2
    kernel = [b.pick(*range(1, min(largest, n) + 1)) for n in x.shape[2:]]
    strides = [b.pick(1, 1, 2) for _ in range(spatial)]
    dilations = [b.pick(1, 1, 2) if 2 * (k - 1) < n else 1 for k, n in zip(kernel, x.shape[2:], strict=True)]
    pads = [b.pick(0, 0, 1, 2) for _ in range(2 * spatial)]
    shape = [
        out(n, k, s, d, p)
        for n, k, s, d, p in zip(
            x.shape[2:], kernel, strides, dilations, [a + c for a, c in zip(pads, pads[spatial:], strict=False)],
            strict=True,
        )
    ]  # fmt: skip
    return {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "shape": shape}


def conv(b: Builder, x: Value) -> Value | None:
    """Conv with groups, strides, dilations, uneven pads or auto_pad, with and without bias."""
    if x.rank < 3:
        return None
    channels = x.shape[1]
    group = b.pick(*[g for g in (1, 2, channels) if channels % g == 0])
    out = group * b.pick(1, 2, 3)
    sizes = _sizes(b, x, lambda n, k, s, d, p: (n + p - d * (k - 1) - 1) // s + 1, 3)
    shape, kernel = sizes.pop("shape"), sizes["kernel_shape"]
    attributes = {**sizes, "group": group}
    if b.pick(False, False, False, True):
        attributes["auto_pad"] = b.pick("VALID", "SAME_UPPER", "SAME_LOWER")
        attributes.pop("pads")
        attributes["dilations"] = [1] * (x.rank - 2)
        shape = [
            (n - k) // s + 1 if attributes["auto_pad"] == "VALID" else -(-n // s)
            for n, k, s in zip(x.shape[2:], kernel, sizes["strides"], strict=True)
        ]
    fan = channels // group * math.prod(kernel)
    inputs = [x.name, b.weight((out, channels // group, *kernel), fan**-0.5)]
    if b.pick(True, False):
        inputs.append(b.weight((out,)))
    return b.node("Conv", inputs, (BATCH, out, *shape), **attributes)


def conv_transpose(b: Builder, x: Value) -> Value | None:
    """ConvTranspose with groups, strides, dilations, pads and output_padding."""
    if x.rank < 3 or math.prod(x.shape[2:]) > 100:
        return None
    channels = x.shape[1]
    group = b.pick(*[g for g in (1, 2, channels) if channels % g == 0])
    per_group = b.pick(1, 2, 3)
    spatial = x.rank - 2
    kernel = [b.pick(1, 2, 3) for _ in range(spatial)]
    strides = [b.pick(1, 2) for _ in range(spatial)]
    dilations = [b.pick(1, 1, 2) for _ in range(spatial)]
    extra = [b.pick(0, 0, s - 1) for s in strides]
    pads = [b.pick(0, 0, 1) for _ in range(2 * spatial)]
    shape = [
        (n - 1) * s + d * (k - 1) + 1 + e - pads[i] - pads[i + spatial]
        for i, (n, k, s, d, e) in enumerate(zip(x.shape[2:], kernel, strides, dilations, extra, strict=True))
    ]
    if min(shape) < 1:
        return None
    inputs = [x.name, b.weight((channels, per_group, *kernel), (channels // group) ** -0.5)]
    if b.pick(True, False):
        inputs.append(b.weight((group * per_group,)))
    return b.node(
        "ConvTranspose", inputs, (BATCH, group * per_group, *shape), group=group, kernel_shape=kernel, strides=strides,
        dilations=dilations, output_padding=extra, pads=pads,
    )  # fmt: skip


def gemm(b: Builder, x: Value) -> Value | None:
    """Gemm with transB, alpha, beta, and biases of every shape that broadcasts."""
    if x.rank != 2:
        return None
    features, out = x.shape[1], b.pick(1, 2, 3, 4)
    transposed = b.pick(0, 1)
    inputs = [x.name, b.weight((out, features) if transposed else (features, out), features**-0.5)]
    bias = b.pick(None, (out,), (1, out), (1,), (), (BATCH, 1), (BATCH, out))
    if bias is not None and not (b.symbolic and bias[:1] == (BATCH,) and len(bias) == 2):
        inputs.append(b.weight(bias))
    return b.node(
        "Gemm", inputs, (BATCH, out), transB=transposed, alpha=b.pick(1.0, 0.5, -2.0), beta=b.pick(1.0, 0.0, 2.0)
    )


def matmul(b: Builder, x: Value) -> Value | None:
    """MatMul with a matrix or a stack of matrices on the right, or a matrix on the left."""
    if x.rank < 2:
        return None
    out = b.pick(1, 2, 3, 4)
    if x.rank > 2 and b.pick(False, False, True):
        rows = x.shape[-2]
        return b.node("MatMul", [b.weight((out, rows), rows**-0.5), x.name], (*x.shape[:-2], out, x.shape[-1]))
    stack = b.pick((), (), x.shape[1:-2]) if x.rank > 2 else ()
    weight = b.weight((*stack, x.shape[-1], out), x.shape[-1] ** -0.5)
    return b.node("MatMul", [x.name, weight], (*x.shape[:-1], out))


def batchnorm(b: Builder, x: Value) -> Value | None:
    """Inference BatchNormalization."""
    if x.rank < 2:
        return None
    c = (x.shape[1],)
    inputs = [x.name, b.weight(c), b.weight(c), b.weight(c), b.weight(c, positive=True)]
    return b.node("BatchNormalization", inputs, x.shape, epsilon=b.pick(1e-5, 1e-3, 0.1))


def broadcast_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of constants that a tensor of ``shape`` broadcasts with without growing; the batch axis is left alone."""
    rank = len(shape)
    shapes: list[tuple[int, ...]] = [(), (1,), (1,) * rank]
    for axis in range(1, rank):
        one = [1] * rank
        one[axis] = shape[axis]
        shapes += [tuple(one), tuple(one[axis:])]
    shapes += [(1, *shape[1:]), tuple(shape[1:])]
    return list(dict.fromkeys(shapes))


def elementwise(b: Builder, x: Value) -> Value | None:
    """Mul, Div, Add or Sub by a constant of any shape that broadcasts, on either side; or Neg."""
    op = b.pick("Mul", "Add", "Sub", "Div", "Neg")
    if op == "Neg":
        return b.node("Neg", [x.name], x.shape)
    c = b.weight(b.pick(*broadcast_shapes(x.shape)), positive=op == "Div")
    swap = op != "Div" and b.pick(False, True)
    return b.node(op, [c, x.name] if swap else [x.name, c], x.shape)


def grow(b: Builder, x: Value) -> Value | None:
    """An elementwise constant that broadcasts the *data* to a larger shape."""
    axes = [axis for axis in range(1, x.rank) if x.shape[axis] == 1]
    if not axes:
        return None
    axis = b.pick(*axes)
    shape = [1] * x.rank
    shape[axis] = b.pick(2, 3)
    out = [max(d, s) for d, s in zip(x.shape, shape, strict=True)]
    return b.node(b.pick("Add", "Mul"), [x.name, b.weight(shape[axis:])], out)


def activation(b: Builder, x: Value) -> Value | None:
    """Something that is not linear."""
    op = b.pick("Relu", "Sigmoid", "LeakyRelu", "Clip", "Tanh")
    if op == "Clip":
        return b.node("Clip", [x.name, b.constant(np.float32(0)), b.constant(np.float32(6))], x.shape)
    return b.node(op, [x.name], x.shape, **({"alpha": 0.3} if op == "LeakyRelu" else {}))


def pool(b: Builder, x: Value) -> Value | None:
    """MaxPool, AveragePool (counting its padding or not) or a global one."""
    if x.rank < 3 or min(x.shape[2:]) < 2:
        return None
    op = b.pick("MaxPool", "AveragePool", "GlobalAveragePool")
    if op == "GlobalAveragePool":
        return b.node(op, [x.name], (*x.shape[:2], *(1,) * (x.rank - 2)))
    spatial = x.rank - 2
    kernel, strides = [2] * spatial, [b.pick(1, 2) for _ in range(spatial)]
    pads = [b.pick(0, 0, 1) for _ in range(2 * spatial)]
    ceil = b.pick(0, 0, 1)
    shape = []
    for i, (n, s) in enumerate(zip(x.shape[2:], strides, strict=True)):
        room = n + pads[i] + pads[i + spatial] - 2
        size = (-(-room // s) if ceil else room // s) + 1
        if ceil and (size - 1) * s >= n + pads[i]:
            return None  # a window behind the last element: counted by some versions of the specification only
        shape.append(size)
    extra = {"count_include_pad": b.pick(0, 1)} if op == "AveragePool" else {}
    if op == "AveragePool" and ceil:
        return None  # runtimes disagree on what counts
    return b.node(
        op, [x.name], (*x.shape[:2], *shape), kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil, **extra
    )


def pad(b: Builder, x: Value) -> Value | None:
    """Pad by constants: zeros or another value, or edge mode; at times of the channel axis or by a negative amount."""
    if x.rank < 3 or min(x.shape[2:]) < 3:
        return None
    amounts = np.zeros((2, x.rank), np.int64)
    amounts[:, 2:] = [[b.pick(1, 0, 2, -1) for _ in range(x.rank - 2)] for _ in range(2)]
    if b.pick(False, False, False, True):
        amounts[0, 1] = 1
    mode = b.pick("constant", "constant", "constant", "edge")
    inputs = [x.name, b.constant(amounts.reshape(-1), "pads")]
    if mode == "constant" and b.pick(True, False):
        inputs.append(b.constant(np.float32(b.pick(0.0, 1.0, -np.inf, -1.0)), "fill"))
        if np.isinf(b.weights[inputs[-1]]):  # infinities only where a maximum takes them away again
            return pool_max(b, b.node("Pad", inputs, tuple(int(n) for n in x.shape + amounts.sum(0)), mode=mode))
    return b.node("Pad", inputs, tuple(int(n) for n in x.shape + amounts.sum(0)), mode=mode)


def pool_max(b: Builder, x: Value) -> Value:
    """MaxPool over windows of 3."""
    shape = [max(n - 3 + 1, 1) for n in x.shape[2:]]
    kernel = [min(3, n) for n in x.shape[2:]]
    return b.node("MaxPool", [x.name], (*x.shape[:2], *shape), kernel_shape=kernel)


def reshape(b: Builder, x: Value) -> Value | None:
    """Flatten the last axes, merge the last two, or split the channel axis."""
    kind = b.pick("flatten", "merge", "split")
    if kind == "flatten" or x.rank < 3:
        if x.rank == 2:
            return None
        return b.node("Flatten", [x.name], (BATCH, math.prod(x.shape[1:])), axis=1)
    if kind == "merge":
        shape = (BATCH, *x.shape[1:-2], x.shape[-2] * x.shape[-1])
    else:
        if x.shape[1] % 2 or x.rank > 3:
            return None
        shape = (BATCH, 2, x.shape[1] // 2, *x.shape[2:])
    return b.node("Reshape", [x.name, b.constant(np.array([0, *shape[1:]], np.int64), "shape")], shape)


def transpose(b: Builder, x: Value) -> Value | None:
    """Permute all axes but the batch."""
    if x.rank < 3:
        return None
    perm = [0, *b.draw(st.permutations(range(1, x.rank)))]
    return b.node("Transpose", [x.name], [x.shape[p] for p in perm], perm=perm)


def join(b: Builder, x: Value) -> Value | None:
    """Add, Mul or Concat with another value, or with itself."""
    same = [v for v in b.values if v.shape == x.shape] or [x]
    other = b.pick(*same[-3:])
    op = b.pick("Add", "Concat", "Mul", "Sub")
    if op == "Concat":
        axis = b.pick(*range(1, x.rank))
        if x.shape[axis] > 8:
            return None
        return b.node(
            "Concat", [x.name, other.name], [2 * n if k == axis else n for k, n in enumerate(x.shape)], axis=axis
        )
    return b.node(op, [x.name, other.name], x.shape)


def split(b: Builder, x: Value) -> Value | None:
    """Split an axis in two; the second part is read later or by nobody."""
    axes = [axis for axis in range(1, x.rank) if x.shape[axis] > 1]
    if not axes:
        return None
    axis = b.pick(*axes)
    first = b.pick(*range(1, x.shape[axis]))
    parts = (first, x.shape[axis] - first)
    values = [Value(b.name("split"), tuple(p if k == axis else n for k, n in enumerate(x.shape))) for p in parts]
    sizes = b.constant(np.array(parts, np.int64), "sizes")
    b.nodes.append(helper.make_node("Split", [x.name, sizes], [v.name for v in values], axis=axis))
    b.values += values[::-1]
    return values[0]


def branch(b: Builder, x: Value) -> Value | None:
    """An If whose branches capture ``x`` and a weight, one of them through another operator."""
    condition = b.name("flag")
    if b.pick(False, True):
        b.weights[condition] = np.array(b.pick(True, False))
    else:
        # Depends on the data, so that nothing can decide it beforehand.
        total = b.name("total")
        b.nodes.append(helper.make_node("ReduceMax", [x.name], [total], keepdims=0))
        b.nodes.append(helper.make_node("Greater", [total, b.constant(np.float32(0))], [condition]))
    weight = b.weight(b.pick(*broadcast_shapes(x.shape)))
    value = Value(b.name("if"), x.shape)
    bodies = []
    for k, op in enumerate((b.pick("Mul", "Add"), b.pick("Add", "Sub"))):
        inner, outer = b.name("inner"), b.name("outer")
        steps = [helper.make_node(op, [x.name, weight], [inner]), helper.make_node("Mul", [inner, weight], [outer])]
        declared = helper.make_tensor_value_info(outer, TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(steps, f"body{k}", [], [declared]))
    b.nodes.append(helper.make_node("If", [condition], [value.name], then_branch=bodies[0], else_branch=bodies[1]))
    b.values.append(value)
    return value


def masked(b: Builder, x: Value) -> Value | None:
    """Add 0 or a number, as positions along one or two axes say: Range, comparison, And, Expand, Where."""

    def emit(op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = b.name(op.lower())
        b.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def number(value: Any) -> str:
        return b.constant(np.asarray(value), "number")

    sizes = emit("Shape", [x.name])
    masks = []
    for axis in b.pick((x.rank - 1,), (0, x.rank - 1), (x.rank - 2, x.rank - 1)):
        size = emit("Gather", [sizes, number(axis)], axis=0)
        position = emit("Range", [number(0), size, number(1)])
        others = [k for k in range(x.rank) if k != axis]
        position = emit("Unsqueeze", [position, number(others)])
        # The first two are true of every position, the others of some.
        test, bound = b.pick(("GreaterOrEqual", 0), ("Greater", -1), ("Less", 2), ("Equal", 1))
        if b.pick(False, True):
            position = emit("Expand", [position, sizes])
        masks.append(emit(test, [position, number(bound)]))
    mask = masks[0] if len(masks) == 1 else emit(b.pick("And", "Or"), masks)
    if b.pick(False, True):
        mask = emit("Not", [mask])
    chosen = emit("Where", [mask, number(np.float32(0)), number(np.float32(-3))])
    return b.node("Add", [x.name, chosen], x.shape)


Template = Callable[[Builder, Value], Value | None]
LINEAR: tuple[Template, ...] = (conv, conv_transpose, gemm, matmul)
AFFINE: tuple[Template, ...] = (elementwise, batchnorm, elementwise, grow)
MOVEMENT: tuple[Template, ...] = (reshape, transpose, split)
OTHER: tuple[Template, ...] = (activation, pool, pad, *MOVEMENT, join, branch, masked)


@st.composite
def graphs(draw: Callable[..., Any], templates: Sequence[Template] = (*LINEAR, *AFFINE, *AFFINE, *OTHER)) -> Case:
    """A valid model of up to a dozen nodes and inputs for it."""
    b = Builder(draw, opset=draw(st.sampled_from([17, 13, 18, 21])), symbolic=draw(st.booleans()))
    shape = b.pick((4, 5, 6), (3, 7), (4, 4, 4), (5,), (4, 6, 1))
    b.input(shape)
    x = b.values[0]
    for _ in range(draw(st.integers(3, 12))):
        result = None
        for _ in range(4):  # most operators want a certain rank
            result = b.pick(*templates)(b, x) if result is None else result
        # Mostly a chain, at times a second reader of an earlier value.
        x = result if result is not None else x
        if b.pick(*[False] * 7, True):
            x = b.pick(*b.values[-4:])
        if math.prod(x.shape) > 2000:
            break
    read = {name for node in b.nodes for name in node.input}
    outputs = [v for v in b.values[1:] if v.name not in read] or [b.values[-1]]
    outputs += [v for v in b.values[1:] if b.pick(*[False] * 11, True)]
    if outputs == [b.values[0]]:
        outputs = [b.node("Identity", [b.values[0].name], b.values[0].shape)]
    floats = [n for n, a in b.weights.items() if a.dtype == np.float32]
    shown = [b.pick(*floats)] if floats and b.pick(False, False, False, True) else []
    return b.finish(outputs, shown)
