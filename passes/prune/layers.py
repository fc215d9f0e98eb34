"""Linear layers as matrices: what a contraction sums over, as rows of observations and columns of a weight.

For a contraction over n channels with a constant factor, the layer computes ``y = M r + b`` for every observation r: a
row of the input of a Gemm or MatMul, or the patch under the kernel of a convolution (im2col). ``M`` is (out, columns),
and column k belongs to channel ``channel[k]``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim.coupling import Site
from onnxslim.graph import add_constant, attribute, constant, is_constant, is_op, only_user, set_constant, walk

# Above this many columns a patch's second moments no longer fit: all taps of the kernel then share one channel matrix.
MAX_COLUMNS = 4608


@dataclasses.dataclass(frozen=True)
class Layer:
    """A contraction with a constant weight whose outputs can be refitted.

    Attributes:
        site: the contraction.
        taps: kernel positions per channel, in the order of the weight's last axes (1 for a matrix product).
        shared: one matrix (channels x channels) serves all taps, because the patch is too large.
    """

    site: Site
    taps: int
    shared: bool

    @property
    def channels(self) -> int:
        return len(self.site.labels)

    @property
    def columns(self) -> int:
        """Length of an observation."""
        return self.channels * (1 if self.shared else self.taps)

    @property
    def outputs(self) -> int:
        """Number of outputs for an observation."""
        value = self.site.node.inputs[self.site.weight]
        assert value is not None and value.const_value is not None
        return int(value.const_value.size) // (self.channels * self.taps)

    @property
    def channel(self) -> np.ndarray:
        """Channel of each column, (columns,)."""
        return np.repeat(np.arange(self.channels), 1 if self.shared else self.taps)

    def rows(self, x: np.ndarray, limit: int, seed: int) -> np.ndarray:
        """At most ``limit`` observations from one value of the input, (n, columns); the same ones for the same seed."""
        if self.taps > 1 and not self.shared:
            return _patches(x, self.site.node, limit, seed)
        if self.site.node.op_type == "Conv" and not self.shared:  # a 1x1 kernel, which may skip positions
            x = x[(slice(None), slice(None), *(slice(None, None, s) for s in attribute(self.site.node, "strides", [])))]
        flat = np.moveaxis(x, self.site.axis, -1).reshape(-1, self.channels)
        return flat[_chosen(len(flat), limit, seed)]

    def output_rows(self, y: np.ndarray, limit: int, seed: int) -> np.ndarray:
        """The values (n, out) of a tensor shaped like the output that belong to the observations of `rows`."""
        flat = np.moveaxis(y, 1, -1) if self.site.node.op_type == "Conv" else y
        flat = flat.reshape(-1, flat.shape[-1])
        return flat[_chosen(len(flat), limit, seed)]

    def residual(self) -> str | None:
        """Name of the value that is added to this layer's output and was computed before it, or None.

        What is wrong with that value can be put right by this layer, since only the sum is read; not where the output
        is spread over it, which gives an error per element and one output for all of them.
        """
        node = self.site.node
        seen = {node.outputs[0]}
        output = node.outputs[0]
        for _ in range(2):  # past the bias of a MatMul
            user = only_user(output)
            if user is None or not is_op(user, "Add"):
                return None
            other = user.inputs[1] if user.inputs[0] in seen else user.inputs[0]
            if other is None:
                return None
            if not is_constant(other):
                producer = other.producer()
                before = producer is not None and producer.graph is node.graph and _precedes(producer, node)
                alike = other.shape == user.outputs[0].shape == node.outputs[0].shape
                return other.name if before and alike else None
            output = user.outputs[0]
            seen.add(output)
        return None

    def matrix(self, model: ir.Model) -> np.ndarray:
        """The weight as (out, channels * taps), float64."""
        weight = np.asarray(constant(self.weight(model)), np.float64)
        if self.site.node.op_type == "Conv":
            return weight.reshape(len(weight), -1)
        return np.moveaxis(weight, self.site.weight_axis, -1).reshape(-1, self.channels)

    def write(self, model: ir.Model, matrix: np.ndarray) -> None:
        """Store (out, channels * taps) back into the weight."""
        value = self.weight(model)
        old = np.asarray(constant(value))
        if self.site.node.op_type == "Conv":
            new = matrix.reshape(old.shape)
        else:
            moved = np.moveaxis(old, self.site.weight_axis, -1)
            new = np.moveaxis(matrix.reshape(moved.shape), -1, self.site.weight_axis)
        set_constant(value, new.astype(old.dtype))

    def weight(self, model: ir.Model) -> ir.Value:
        """The weight's value in ``model`` (a clone of the analyzed one)."""
        value = self.node(model).inputs[self.site.weight]
        assert value is not None
        return value

    def node(self, model: ir.Model) -> ir.Node:
        """This layer's node in ``model``."""
        name = self.site.node.outputs[0].name
        return next(n for n in walk(model.graph) if n.outputs[0].name == name)

    def place(self, model: ir.Model) -> int:
        """Position of this layer's node in the main graph of ``model``."""
        return list(model.graph).index(self.node(model))

    @property
    def data(self) -> str:
        """Name of the input that carries the channels."""
        return _name(self.site.node.inputs[self.site.data])

    @property
    def output(self) -> str:
        """Name of the output."""
        return _name(self.site.node.outputs[0])

    @property
    def biased(self) -> bool:
        """True where the operator itself adds the bias."""
        return self.site.node.op_type in ("Conv", "Gemm")

    def bias(self, model: ir.Model) -> ir.Value | None:
        """The constant (out,) that this layer alone adds, or None; a Conv or Gemm without one is given zeros."""
        node = self.node(model)
        if self.biased:
            value = node.inputs[2] if len(node.inputs) > 2 else None
            out = self.outputs
            if value is None:
                dtype = np.asarray(constant(self.weight(model))).dtype
                value = add_constant(model.graph, f"{node.outputs[0].name}_bias", np.zeros(out, dtype))
                node.resize_inputs(3)
                node.replace_input_with(2, value)
            alone = is_constant(value) and len(value.uses()) == 1
            return value if alone and value.shape is not None and value.shape.numpy() == (out,) else None
        user = only_user(node.outputs[0])
        if user is None or not is_op(user, "Add"):
            return None
        value = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
        if not is_constant(value) or value is None or len(value.uses()) != 1 or value.shape is None:
            return None
        return value if value.shape.numpy() == (self.outputs,) and self.site.data == 0 else None

    def stated(self, model: ir.Model) -> np.ndarray | float:
        """What ``model`` adds in the place of `bias`, 0 where it has none."""
        node = self.node(model)
        value = (node.inputs[2] if len(node.inputs) > 2 else None) if self.biased else self.bias(model)
        return 0.0 if value is None else np.asarray(constant(value), np.float64)


def layer(site: Site) -> Layer | None:
    """``site`` as a layer, or None when its outputs cannot be refitted in closed form."""
    node = site.node
    if site.weight < 0 or site.groups > 1 or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight = node.inputs[site.weight]
    if weight is None or len(weight.uses()) != 1 or weight.const_value is None or weight.dtype is None:
        return None
    if not weight.dtype.is_floating_point():
        return None
    shape = weight.const_value.shape.numpy()
    if node.op_type == "MatMul" and (len(shape) != 2 or site.data != 0):
        return None
    if node.op_type == "Gemm" and (site.data != 0 or not _is_plain(node)):
        return None
    taps = int(np.prod(shape[2:], dtype=np.int64)) if node.op_type == "Conv" else 1
    if node.op_type == "Conv" and taps == 1 and any(attribute(node, "pads", [])):
        return None  # positions that read nothing but padding
    return Layer(site, taps, shared=taps > 1 and shape[1] * taps > MAX_COLUMNS)


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm adds nothing but a constant row to the product, and neither has a factor."""
    factors = (attribute(node, name, 1.0) for name in ("alpha", "beta"))
    added = node.inputs[2] if len(node.inputs) > 2 else None
    row = added is None or (is_constant(added) and added.shape is not None and added.shape.rank() == 1)
    return row and all(factor == 1.0 for factor in factors)


def _chosen(count: int, limit: int, seed: int) -> np.ndarray:
    """At most ``limit`` of ``count`` positions, ascending; the same ones for the same seed."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def _precedes(first: ir.Node, second: ir.Node) -> bool:
    """True when ``first`` stands before ``second`` in their graph."""
    graph = first.graph
    assert graph is not None
    for node in graph:
        if node is first:
            return True
        if node is second:
            return False
    return False


def _patches(x: np.ndarray, node: ir.Node, limit: int, seed: int) -> np.ndarray:
    """(n, channels * taps): the inputs under the kernel at sampled output positions of a convolution."""
    spatial = x.ndim - 2
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    kernel = weight.const_value.shape.numpy()[2:]
    strides = attribute(node, "strides", [1] * spatial)
    dilations = attribute(node, "dilations", [1] * spatial)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], extents, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, x.ndim)))
    step = tuple(slice(None, None, s) for s in strides)
    taps = tuple(slice(None, None, d) for d in dilations)
    windows = np.moveaxis(windows[(slice(None), slice(None), *step, *taps)], 1, 1 + spatial)
    positions = windows.shape[: 1 + spatial]
    chosen = _chosen(int(np.prod(positions, dtype=np.int64)), limit, seed)
    return windows[np.unravel_index(chosen, positions)].reshape(len(chosen), -1)


def _pads(node: ir.Node, shape: tuple[int, ...], extents: list[int], strides: list[int]) -> list[tuple[int, int]]:
    spatial = len(shape)
    kind = attribute(node, "auto_pad", "NOTSET")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        result = []
        for n, e, s in zip(shape, extents, strides, strict=True):
            total = max((-(-n // s) - 1) * s + e - n, 0)
            small, large = total // 2, total - total // 2
            result.append((small, large) if kind == "SAME_UPPER" else (large, small))
        return result
    pads = attribute(node, "pads", [0] * (2 * spatial)) if kind == "NOTSET" else [0] * (2 * spatial)
    return list(zip(pads[:spatial], pads[spatial:], strict=True))


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name
