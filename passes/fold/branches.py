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

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import Linear, along, padded
from onnxslim.passes.fold.absorb import Rewrite, place, record
from onnxslim.passes.fold.affine import Affine, chain_before, keeps_shape
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


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A linear function of ``x``: what it amounts to, and the nodes that compute it.

    ``matrix`` is (groups, out, in, taps) with the gain of the operator in it, ``bias`` (out,). ``host`` is the operator
    that could take others in, None for anything that is not a single operator.
    """

    x: ir.Value
    matrix: np.ndarray
    bias: np.ndarray
    windows: tuple[Window, ...]
    nodes: tuple[ir.Node, ...]
    axis: int
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
    candidates.sort(key=lambda c: -c[0].matrix.shape[-1])
    for host, taken, of_host, of_taken in candidates:
        reason = _merge(work, node, host, taken, of_host, of_taken)
        if reason is None:
            return
        work.stays(node, reason)


def _merge(work: Work, node: ir.Node, host: Branch, taken: Branch, of_host: float, of_taken: float) -> str | None:
    linear = host.host
    assert linear is not None
    other = _embed(taken, host)
    if other is None:
        return "the branches that it adds read different positions, or have different strides or groups"
    if not np.all(linear.gain):
        return "the gain of its linear operator is zero"
    matrix = (of_host * host.matrix + of_taken * other) / linear.gain
    bias = of_host * host.bias + of_taken * taken.bias
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
    if chain is not None and g.only_user(source) is None:
        return None
    read = work.weights.read
    windows, bias, weight = _windows(linear), linear.bias_vector(read), read(linear.w)
    if windows is None or bias is None or weight.size > EXACT_ELEMENTS:
        return None
    matrix = linear.gain * linear.matrix(weight)
    nodes: tuple[ir.Node, ...] = (linear.node,)
    if chain is not None:
        scale, offset = (along(a, linear.out_axis, linear.outputs, linear.rank) for a in (chain.scale, chain.offset))
        if scale is None or offset is None or linear.out_axis != linear.in_axis:
            return None
        matrix = matrix * scale.reshape(linear.groups, -1, 1, 1)
        bias = scale * bias + offset
        nodes += chain.nodes
    if linear.in_axis != linear.out_axis:
        return None
    return Branch(linear.x, matrix, bias, windows, nodes, linear.out_axis, linear)


def _product(work: Work, value: ir.Value, reader: ir.Node) -> Branch | None:
    """``value`` as two matrix products in a row, however many weights their product has."""
    second = linear_operator(value.producer()) if g.only_user(value) is reader else None
    both = pair(work, second) if second is not None and second.node.op_type in ("Gemm", "MatMul") else None
    if both is None or both.first.node.op_type not in ("Gemm", "MatMul") or both.second.node.graph is not reader.graph:
        return None
    if both.first.inputs * both.second.outputs > EXACT_ELEMENTS:
        return None
    product = multiply_pair(work, both, any_size=True)
    if isinstance(product, str):
        return None
    host, matrix, bias = product
    nodes = (both.first.node, *both.nodes, both.second.node)
    return Branch(both.first.x, host.gain * matrix, bias, (), nodes, host.out_axis)


def _diagonal(work: Work, value: ir.Value, reader: ir.Node, host: Branch) -> Branch | None:
    """``value`` as an affine map per channel of the data of ``host``, or that data itself."""
    linear = host.host
    assert linear is not None
    if linear.inputs != linear.outputs:
        return None
    ones, zeros = np.ones(linear.outputs), np.zeros(linear.outputs)
    windows = tuple(Window(1, 1, 1, 0, 0) for _ in linear.kernel)
    if value is linear.x:
        return Branch(value, ones.reshape(-1, 1, 1, 1), zeros, windows, (), linear.out_axis)
    if g.only_user(value) is not reader:
        return None
    for chain in chain_before(value, work.weights.read):
        if chain.x is not linear.x or not keeps_shape(chain) or chain.nodes[0].graph is not reader.graph:
            continue
        scale, offset = (along(a, linear.in_axis, linear.inputs, linear.rank) for a in (chain.scale, chain.offset))
        if scale is not None and offset is not None and chain.finite():
            return Branch(chain.x, scale.reshape(-1, 1, 1, 1), offset, windows, chain.nodes, linear.out_axis)
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


def _embed(taken: Branch, host: Branch) -> np.ndarray | None:
    """The matrix of ``taken`` with the groups and taps of ``host``, or None where it does not fit in."""
    if taken.axis != host.axis or len(taken.windows) != len(host.windows):
        return None
    groups, outputs, inputs, _ = host.matrix.shape
    if taken.matrix.shape[0] % groups or _channels(taken.matrix) != _channels(host.matrix):
        return None
    places = []
    for mine, other in zip(host.windows, taken.windows, strict=True):
        offsets = mine.offsets()
        if mine.stride != other.stride or mine.loss != other.loss or not set(other.offsets()) <= set(offsets):
            return None
        places.append([offsets.index(offset) for offset in other.offsets()])
    matrix = expand(taken.matrix, groups)
    if not places:
        return matrix
    taps = tuple(window.taps for window in host.windows)
    result = np.zeros((groups, outputs, inputs, int(np.prod(taps))))
    result[..., np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), taps).reshape(-1)] = matrix
    return result


def _channels(matrix: np.ndarray) -> tuple[int, int]:
    groups, outputs, inputs, _ = matrix.shape
    return groups * outputs, groups * inputs
