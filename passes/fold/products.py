"""Two linear operators in a row as one: ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``.

One of the two must be pointwise (a matrix product, or a 1x1 convolution of stride 1 without padding):

* pointwise behind any other: always exact.
* pointwise in front: exact when the second pads nothing, or when there is no ``b1`` that its padding would not see.

Done only where the product has no more weights than the two factors, and padding does not enlarge the tensor, so that
it takes no more multiplications either: low-rank pairs and depthwise-separable convolutions stay as they are.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import Linear, along, view
from onnxslim.passes.fold.absorb import Rewrite, place, record
from onnxslim.passes.fold.affine import Affine, chain_before
from onnxslim.passes.fold.edit import EXACT_ELEMENTS, representable
from onnxslim.passes.fold.work import Work

# Not worth a line in the report: nobody expects it.
TOO_LARGE = "its product with the linear operator in front of it is larger than the two"
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """``first``, nodes that add constants or None, and ``second``; nobody else reads anything in between."""

    first: Linear
    between: Affine | None
    second: Linear

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes in between."""
        return self.between.nodes if self.between is not None else ()


def linear_operator(node: ir.Node | None) -> Linear | None:
    """`view` of a convolution or of a product with one matrix."""
    linear = view(node) if node is not None and node.op_type in OPERATORS else None
    if linear is None or (linear.node.op_type == "MatMul" and linear.kernel):
        return None
    return linear


def pair(work: Work, second: Linear) -> Pair | None:
    """What stands in front of ``second`` when it is a linear operator for ``second`` alone."""
    x, between = second.x, None
    if g.only_user(x) is None:
        return None
    if linear_operator(x.producer()) is None:
        chains = chain_before(x, work.weights.read)
        # A scale would be in one of the two weights by now, had it been possible to change it.
        if not chains or chains[0].scales or g.only_user(chains[0].x) is None:
            return None
        between, x = chains[0], chains[0].x
    first = linear_operator(x.producer())
    if first is None or first.node.graph is not second.node.graph:
        return None
    if (first.out_axis, first.outputs) != (second.in_axis, second.inputs):
        return None
    return Pair(first, between, second)


def pointwise(linear: Linear) -> bool:
    """True when every position of the result depends on the same position of the data alone."""
    if linear.node.op_type in ("Gemm", "MatMul"):
        return linear.in_axis == linear.out_axis
    strides = g.attribute(linear.node, "strides", [1])
    return linear.uniform and all(k == 1 for k in linear.kernel) and all(s == 1 for s in strides)


def expand(matrix: np.ndarray, groups: int) -> np.ndarray:
    """A block-diagonal (g, out, in, taps) with fewer, larger blocks (``groups`` divides g), zeros in between."""
    small, outputs, inputs, taps = matrix.shape
    if small == groups:
        return matrix
    merged = small // groups
    result = np.zeros((groups, merged, outputs, merged, inputs, taps))
    for k in range(merged):
        result[:, k, :, k] = matrix.reshape(groups, merged, outputs, inputs, taps)[:, k]
    return result.reshape(groups, merged * outputs, merged * inputs, taps)


def multiply_pair(work: Work, both: Pair, *, any_size: bool = False) -> tuple[Linear, np.ndarray, np.ndarray] | str:
    """(host, matrix, bias) of the product: the one of the two operators that stays, with what it becomes.

    ``any_size`` allows a product with more weights than the factors have.
    """
    first, second = both.first, both.second
    if pointwise(second) and not (pointwise(first) and first.bias is None and second.bias is not None):
        host = first
    elif pointwise(first):
        host = second
    else:
        return TOO_LARGE
    groups = math.gcd(first.groups, second.groups)
    if groups not in (first.groups, second.groups):
        groups = 1
    taps = math.prod(host.kernel)
    size = first.inputs * second.outputs // groups * taps
    dense = first.outputs // groups * max(first.inputs, second.outputs) * taps
    if not any_size and (size > _weights(first) + _weights(second) or _enlarges(host)):
        return TOO_LARGE
    if max(size, dense, _weights(first), _weights(second)) > EXACT_ELEMENTS:
        return TOO_LARGE
    read = work.weights.read
    m1, m2 = first.matrix(read(first.w)), second.matrix(read(second.w))
    b1, b2 = first.bias_vector(read), second.bias_vector(read)
    if b1 is None or b2 is None:
        return "the bias of one of the two linear operators is no constant per output channel"
    if both.between is not None:
        # A scale of ones may still spread the data over more elements.
        scale, offset = (
            along(a, first.out_axis, first.outputs, first.rank) for a in (both.between.scale, both.between.offset)
        )
        if scale is None or offset is None:
            return "a constant in between varies along another axis than the channels"
        b1 = b1 + offset
    if np.any(b1) and not second.uniform:
        return f"the zero padding of {second.node.op_type} does not see the bias in front of it"
    bias = b2 + second.gain * np.einsum("goik,gi->go", m2, b1.reshape(second.groups, -1)).reshape(-1)
    m1, m2 = expand(m1, groups), expand(m2, groups)
    if host is first:
        matrix = second.gain * np.einsum("goc,gcik->goik", m2[..., 0], m1, optimize=True)
    else:
        matrix = first.gain * np.einsum("gock,gci->goik", m2, m1[..., 0], optimize=True)
    merged = dataclasses.replace(host, groups=groups, inputs=first.inputs, outputs=second.outputs)
    return merged, matrix, bias


def merge_products(work: Work) -> None:
    """Multiply linear operators that follow each other."""
    for node in work.nodes():
        second = linear_operator(node)
        both = pair(work, second) if second is not None else None
        if both is not None:
            reason = _merge(work, both)
            if reason is not None and reason is not TOO_LARGE:
                work.stays(node, reason)


def _merge(work: Work, both: Pair) -> str | None:
    product = multiply_pair(work, both)
    if isinstance(product, str):
        return product
    host, matrix, bias = product
    first, second = both.first, both.second
    dtype = host.w.dtype
    if dtype is None or not representable(matrix, dtype):
        return "its product with the linear operator in front of it leaves the range of its type"
    rest = host.spread(bias) if host.bias is None and np.any(bias) else None
    stays_first = host.node is first.node
    after = (*both.nodes, second.node) if stays_first else ()
    change = Rewrite(host, matrix, bias if host.bias is not None else None, rest, after)
    if change.linear.b is None and not np.any(bias):
        change = dataclasses.replace(change, bias=None)
    if 1 + len(both.nodes) - change.added < 1:
        return "the offset in between would take a node of its own"
    edit = work.edit()
    if not stays_first:
        edit.drop((first.node, *both.nodes))
        edit.redirect(second.x, first.x)
    position = record(work, edit, change)
    reason = edit.refusal()
    if reason is not None:
        return reason
    work.done[f"product {host.node.op_type}"] += 1
    constants = edit.commit()
    if not stays_first:
        host.node.replace_input_with(host.data, first.x)
    if host.node.op_type in ("Conv", "ConvTranspose"):
        g.set_attribute(host.node, "group", host.groups)
    place(work, change, constants, position)
    edit.finish()
    return None


def _weights(linear: Linear) -> int:
    return linear.w.const_value.size if linear.w.const_value is not None else 0


def _enlarges(linear: Linear) -> bool:
    """True when padding lets a convolution have more positions than its kernel takes away."""
    if (
        linear.node.op_type not in ("Conv", "ConvTranspose")
        or g.attribute(linear.node, "auto_pad", "NOTSET") != "NOTSET"
    ):
        return False
    axes = len(linear.kernel)
    pads = g.attribute(linear.node, "pads", [0] * 2 * axes)
    dilations = g.attribute(linear.node, "dilations", [1] * axes)
    return any(
        a + b > d * (k - 1) for a, b, d, k in zip(pads[:axes], pads[axes:], dilations, linear.kernel, strict=True)
    )
