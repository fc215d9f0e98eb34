"""Parallel linear branches that are added, as one operator: ``(W x + b) + (V x + c) = (W + V) x + (b + c)``.

The branch with the largest kernel stays and takes the others in. What is added to a convolution may be

* a convolution of the same stride whose taps all read positions that the first reads as well (a 1x1 beside a padded
  3x3), and whose padding leaves a result of the same size;
* the data itself, or an affine map of it per channel (the identity of a RepVGG block): a 1x1 with a diagonal matrix;

and what is added to a matrix product: another one, the data, or two products in a row (``W x + B (A x)``, LoRA).
Exact at the borders too, where all read the same zeros; never more multiplications than before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import Linear, along, padded
from onnxslim.passes.fold.absorb import Rewrite, place, record
from onnxslim.passes.fold.affine import Affine, chain_before
from onnxslim.passes.fold.edit import EXACT_ELEMENTS, representable
from onnxslim.passes.fold.products import expand, linear_operator, multiply_pair, pair
from onnxslim.passes.fold.work import Work


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Where the taps of one axis read: position ``stride * i + offset(t)`` for result i and tap t."""

    taps: int
    stride: int
    dilation: int
    before: int
    behind: int

    def offsets(self) -> list[int]:
        """One position per tap, relative to ``stride * i``."""
        return [self.dilation * t - self.before for t in range(self.taps)]

    @property
    def loss(self) -> int:
        """By how much the result (before striding) is smaller than the data."""
        return self.dilation * (self.taps - 1) - self.before - self.behind


Content = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A linear function of ``x``: its structure, the nodes that compute it, and, on demand, what it amounts to.

    ``content()`` gives the matrix (groups, out, in, taps), the gain of the operator in it, and the bias (out,), or why
    they are no constants. ``axes`` are the channel axes of ``x`` and of the result. ``host`` is the operator that could
    take others in, None when it is not a single one.
    """

    x: ir.Value
    groups: int
    outputs: int
    inputs: int
    windows: tuple[Window, ...]
    nodes: tuple[ir.Node, ...]
    axes: tuple[int, int]
    content: Callable[[], Content | str]
    host: Linear | None = None


def merge_branches(work: Work) -> None:
    """Merge the two operands of every Add, Sub and two-fold Sum that are linear functions of the same value."""
    for node in work.nodes():
        if g.is_op(node, "Add", "Sub", "Sum") and len(node.inputs) == 2:
            _merge_operands(work, node)


def _merge_operands(work: Work, node: ir.Node) -> None:
    left, right = node.inputs
    if left is None or right is None or left is right or g.is_constant(left) or g.is_constant(right):
        return
    sign = -1.0 if node.op_type == "Sub" else 1.0
    candidates = []
    for mine, other, of_mine, of_other in ((left, right, 1.0, sign), (right, left, sign, 1.0)):
        host = _operator(work, mine, node)
        if host is None:
            continue
        readings = (_operator(work, other, node), _product(work, other, node), _diagonal(work, other, node, host))
        taken = next((branch for branch in readings if branch is not None and branch.x is host.x), None)
        if taken is not None:
            candidates.append((host, taken, of_mine, of_other))
    # The larger kernel can hold the smaller one.
    candidates.sort(key=lambda c: -math.prod(window.taps for window in c[0].windows))
    for host, taken, of_host, of_taken in candidates:
        reason = _merge(work, node, host, taken, of_host, of_taken)
        if reason is None:
            return
        work.stays(node, reason)


def _merge(work: Work, node: ir.Node, host: Branch, taken: Branch, of_host: float, of_taken: float) -> str | None:
    linear = host.host
    assert linear is not None
    places = _places(taken, host)
    if places is None:
        return "the branches that it adds read different positions, or have different strides or groups"
    if not np.all(linear.gain):
        return "the gain of its linear operator is zero"
    mine, other = host.content(), taken.content()
    if isinstance(mine, str) or isinstance(other, str):
        return mine if isinstance(mine, str) else str(other)
    matrix = of_host * mine[0]
    matrix[..., places] += of_taken * expand(other[0], host.groups)
    matrix /= linear.gain
    bias = of_host * mine[1] + of_taken * other[1]
    dtype = linear.w.dtype
    if dtype is None or not representable(matrix, dtype):
        return "the sum of its branches leaves the range of its type"
    rest = linear.spread(bias) if linear.bias is None and np.any(bias) else None
    has_bias = linear.bias is not None and (linear.b is not None or bool(np.any(bias)))
    change = Rewrite(linear, matrix, bias if has_bias else None, rest, (*host.nodes[1:], node))
    if len(host.nodes) + len(taken.nodes) - change.added < 1:
        return "the sum of its biases would take a node of its own"
    edit = work.edit()
    edit.drop(taken.nodes)
    position = record(work, edit, change)
    reason = edit.refusal()
    if reason is not None:
        return reason
    work.done[f"branch {linear.node.op_type}"] += 1
    constants = edit.commit()
    place(work, change, constants, position)
    edit.finish()
    return None


def _operator(work: Work, value: ir.Value, reader: ir.Node) -> Branch | None:
    """``value`` as a convolution or matrix product, with the affine nodes behind it, that only ``reader`` reads."""
    found = _behind(work, value, reader)
    if found is None:
        return None
    chain, source = found
    linear = linear_operator(source.producer())
    if linear is None or linear.node.op_type == "ConvTranspose" or linear.node.graph is not reader.graph:
        return None
    windows = _windows(linear)
    if windows is None or (chain is not None and g.only_user(source) is None):
        return None
    if (linear.w.const_value.size if linear.w.const_value is not None else 0) > EXACT_ELEMENTS:
        return None

    def content() -> Content | str:
        bias = linear.bias_vector(work.weights.read)
        if bias is None:
            return "a bias of the branches that it adds is no constant per output channel"
        matrix = linear.gain * linear.matrix(work.weights.read(linear.w))
        if chain is None:
            return matrix, bias
        scale, offset = (along(a, linear.out_axis, linear.outputs, linear.rank) for a in (chain.scale, chain.offset))
        if scale is None or offset is None:
            return "a constant of the branches that it adds varies along another axis than the channels"
        return matrix * scale.reshape(linear.groups, -1, 1, 1), scale * bias + offset

    nodes = (linear.node, *(chain.nodes if chain is not None else ()))
    axes = (linear.in_axis, linear.out_axis)
    return Branch(linear.x, linear.groups, linear.outputs, linear.inputs, windows, nodes, axes, content, linear)


def _product(work: Work, value: ir.Value, reader: ir.Node) -> Branch | None:
    """``value`` as two matrix products in a row, however many weights their product has."""
    second = linear_operator(value.producer()) if g.only_user(value) is reader else None
    both = pair(work, second) if second is not None and second.node.op_type in ("Gemm", "MatMul") else None
    if both is None or both.first.node.op_type not in ("Gemm", "MatMul") or both.second.node.graph is not reader.graph:
        return None

    def content() -> Content | str:
        product = multiply_pair(work, both, any_size=True)
        return product if isinstance(product, str) else (product[0].gain * product[1], product[2])

    nodes = (both.first.node, *both.nodes, both.second.node)
    axes = (both.first.in_axis, both.second.out_axis)
    return Branch(both.first.x, 1, both.second.outputs, both.first.inputs, (), nodes, axes, content)


def _diagonal(work: Work, value: ir.Value, reader: ir.Node, host: Branch) -> Branch | None:
    """``value`` as an affine map per channel of the data of ``host``, or that data itself."""
    linear = host.host
    assert linear is not None
    channels = linear.inputs
    windows = tuple(Window(1, 1, 1, 0, 0) for _ in linear.kernel)

    def branch(scale: np.ndarray, offset: np.ndarray, nodes: tuple[ir.Node, ...]) -> Branch:
        content = (scale.reshape(-1, 1, 1, 1), offset)
        axes = (linear.in_axis, linear.in_axis)
        return Branch(linear.x, channels, channels, channels, windows, nodes, axes, lambda: content)

    if value is linear.x:
        return branch(np.ones(channels), np.zeros(channels), ())
    if g.only_user(value) is not reader:
        return None
    for chain in chain_before(value, work.weights.read):
        if chain.x is not linear.x or chain.nodes[0].graph is not reader.graph:
            continue
        scale, offset = (along(a, linear.in_axis, channels, linear.rank) for a in (chain.scale, chain.offset))
        if scale is not None and offset is not None and chain.finite():
            return branch(scale, offset, chain.nodes)
    return None


def _behind(work: Work, value: ir.Value, reader: ir.Node) -> tuple[Affine | None, ir.Value] | None:
    """The affine chain that ends at ``value`` and what it starts from; None when somebody else reads ``value``."""
    if g.only_user(value) is not reader:
        return None
    if linear_operator(value.producer()) is not None:
        return None, value
    chains = chain_before(value, work.weights.read)
    return (chains[0], chains[0].x) if chains and chains[0].finite() else None


def _windows(linear: Linear) -> tuple[Window, ...] | None:
    """The windows of a convolution, () for a matrix product; None when its padding depends on the size of the data."""
    node, axes = linear.node, len(linear.kernel)
    if not axes:
        return ()
    if g.attribute(node, "auto_pad", "NOTSET") == "NOTSET":
        pads = g.attribute(node, "pads", [0] * 2 * axes)
    elif padded(node, linear.kernel):
        return None
    else:
        pads = [0] * 2 * axes
    strides, dilations = g.attribute(node, "strides", [1] * axes), g.attribute(node, "dilations", [1] * axes)
    return tuple(
        Window(k, s, d, a, b)
        for k, s, d, a, b in zip(linear.kernel, strides, dilations, pads[:axes], pads[axes:], strict=True)
    )


def _places(taken: Branch, host: Branch) -> np.ndarray | None:
    """Which taps of ``host`` those of ``taken`` are, or None where the one does not fit into the other."""
    if (taken.axes, taken.outputs, taken.inputs) != (host.axes, host.outputs, host.inputs):
        return None
    if taken.groups % host.groups or len(taken.windows) != len(host.windows):
        return None
    places = []
    for mine, other in zip(host.windows, taken.windows, strict=True):
        offsets = mine.offsets()
        if mine.stride != other.stride or mine.loss != other.loss or not set(other.offsets()) <= set(offsets):
            return None
        places.append([offsets.index(offset) for offset in other.offsets()])
    if not places:
        return np.array([0])
    taps = tuple(window.taps for window in host.windows)
    return np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), taps).reshape(-1)
