"""Weights stored in few bits with one scale per block of inputs, read back as float: less to load from memory.

A weight (K, N) has one scale and zero point for every ``block`` rows of each column. The file holds a
DequantizeLinear in front of the product (opset 21), which ONNX Runtime turns into MatMulNBits when it loads the model.
Layers are stored one after the other and their float weights given back, so that memory holds the result and one layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from scipy import linalg

from onnxslim import graph as g
from onnxslim import integer
from onnxslim import model as model_io
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.errors import ModelError
from onnxslim.layer_inputs import moments
from onnxslim.opset import raise_opset
from onnxslim.rounding import round_columns, spreading
from onnxslim.units import NEVER, PRODUCTS, name_all_nodes
from onnxslim.weights import TOO_LARGE, squares

# Weights with fewer elements are not worth the scales; columns that are worked on at a time.
SMALLEST, COLUMNS = 4096, 512
# Shares of the range of a block that are tried as the range of what is stored.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
OPSET, IR_VERSION = 21, 10


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights are stored: unsigned, ``bits`` 4 or 8 wide, with one scale for ``block`` rows (16, 32, 64 ...)."""

    bits: int
    block: int

    @property
    def dtype(self) -> ir.DataType:
        """Storage type."""
        return ir.DataType.UINT4 if self.bits == 4 else ir.DataType.UINT8

    @property
    def top(self) -> int:
        """Largest stored number."""
        return int(2**self.bits - 1)


class Inputs:
    """What a product reads: second moments (K, K), and how the error of a column is spread (None: it cannot be)."""

    def __init__(self, moments: np.ndarray) -> None:
        self.moments = moments
        self.spread: tuple[np.ndarray, np.ndarray] | None = None
        with contextlib.suppress(linalg.LinAlgError):  # singular to working precision: plain rounding stays
            self.spread = spreading(moments)


def quantize(
    weight: np.ndarray, form: Format, inputs: Inputs | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers (K, N) uint8, scales (blocks, N) float32 and zero points (blocks, N) uint8 of a weight (K, N).

    Each block takes the range of least squared error among shrunken ones, weighted by the mean square of its inputs.
    With ``inputs``, columns of the weight are rounded so that the product is off by least.
    """
    depth, width = weight.shape
    blocks = -(-depth // form.block)
    stored = np.empty((depth, width), np.uint8)
    scales, zeros = np.empty((blocks, width), np.float32), np.empty((blocks, width), np.uint8)
    importance = np.ones(depth) if inputs is None else np.maximum(np.diag(inputs.moments), 1e-12)
    for start in range(0, width, COLUMNS):
        part = slice(start, min(start + COLUMNS, width))
        columns = np.asarray(weight[:, part], np.float32)
        scale, zero = _ranges(columns, form, importance)
        scales[:, part], zeros[:, part] = scale, zero
        step, offset = (np.repeat(a, form.block, 0)[:depth] for a in (scale, zero.astype(np.float32)))
        plain = np.clip(np.rint(columns / step) + offset, 0, form.top)
        if inputs is not None and inputs.spread is not None:
            refined = round_columns(columns.T, step.T, offset.T, inputs.spread, 0, form.top).T
            gaps = [(q - offset) * step - columns for q in (plain, refined)]
            costs = [((inputs.moments @ gap) * gap).sum(0) for gap in gaps]
            plain = np.where(costs[1] < costs[0], refined, plain)
        stored[:, part] = plain
    return stored, scales, zeros


def _ranges(columns: np.ndarray, form: Format, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (blocks, n) of columns (K, n)."""
    depth, width = columns.shape
    blocks = -(-depth // form.block)
    padded = np.zeros((blocks * form.block, width), np.float32)
    padded[:depth] = columns
    cube = padded.reshape(blocks, form.block, width)
    weights = np.zeros(blocks * form.block, np.float32)
    weights[:depth] = importance / importance.mean()
    weights = weights.reshape(blocks, form.block, 1)
    low, high = np.minimum(cube.min(1), 0), np.maximum(cube.max(1), 0)
    best = np.full((blocks, width), np.inf, np.float32)
    scale, zero = np.ones((blocks, width), np.float32), np.zeros((blocks, width), np.uint8)
    for factor in FACTORS:
        step = np.maximum((high - low) * np.float32(factor / form.top), np.float32(1e-30))
        offset = np.clip(np.rint(-low * factor / step), 0, form.top)
        q = np.clip(np.rint(cube / step[:, None]) + offset[:, None], 0, form.top)
        error = (np.square((q - offset[:, None]) * step[:, None] - cube) * weights).sum(1)
        better = error < best * np.float32(1 - 1e-6)
        best, scale, zero = np.where(better, error, best), np.where(better, step, scale), np.where(better, offset, zero)
    return scale, zero.astype(np.uint8)


def dequantize(stored: np.ndarray, scales: np.ndarray, zeros: np.ndarray, form: Format) -> np.ndarray:
    """The weight (K, N), float32, that the integers stand for."""
    step, offset = (np.repeat(a, form.block, 0)[: len(stored)] for a in (scales, zeros.astype(np.float32)))
    return ((stored - offset) * step).astype(np.float32)


def store(model: ir.Model, form: Format, ctx: Context, *, keep: Collection[str] = (), samples: int = 32) -> Outcome:
    """Store the weights of the products of ``model`` in ``form``, in place, as the outcome of a pass."""
    name_all_nodes(model)
    chosen: list[ir.Node] = []
    skipped: list[Skip] = []
    for node in model.graph.all_nodes():
        if not g.is_op(node, *PRODUCTS, *NEVER):
            continue
        why = "asked to stay in float" if node.name in keep else _unsuitable(node)
        if why is None:
            chosen.append(node)
        else:
            skipped.append(Skip(node.name or node.op_type, why))
    reason = raise_opset(model, OPSET) if chosen else None
    if reason is not None:
        skipped += [Skip(node.name or "", reason) for node in chosen]
        chosen = []
    if not chosen:
        return Outcome({"layers": len(skipped), "stored": 0}, skipped)
    model.ir_version = max(model.ir_version, IR_VERSION)
    rounded = 0
    shared: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for group, grams in moments(model, chosen, ctx, samples):
        inputs = {key: Inputs(gram.matrix[0]) for key, gram in {id(x): x for x in grams.values()}.items()}
        for node in group:
            source = node.inputs[1]
            assert source is not None
            if source not in shared:
                gram = grams.get(node.name or "")
                rounded += gram is not None
                shared[source] = _store(model, node, source, form, None if gram is None else inputs[id(gram)])
            _read(model, node, shared[source], form)
    g.remove_dead(model.graph)
    stats = {"layers": len(chosen) + len(skipped), "stored": len(chosen), "rounded": rounded}
    written: dict[ir.Value, list[ir.Value]] = {}
    # ONNX Runtime refuses a model where it finds stored weights for a product in a body outside of that body, and it
    # merges some products with what follows before it looks for stored weights: both are written out.
    inside = [node for node in chosen if node.graph is not model.graph]
    for node in inside:
        _write_out(model, node, form, written)
    g.remove_dead(model.graph)
    missed = _unmerged(model, [node for node in chosen if node not in inside], ctx)
    for node in missed:
        _write_out(model, node, form, written)
    g.remove_dead(model.graph)
    return Outcome(stats | {"merged_at_load": len(chosen) - len(inside) - len(missed)}, skipped)


def _unmerged(model: ir.Model, nodes: Sequence[ir.Node], ctx: Context) -> list[ir.Node]:
    """Those of ``nodes`` whose weight ONNX Runtime would read back at every inference."""
    feed = ctx.calibration.feed(ctx.calibration[0]) if len(ctx.calibration) else {}
    try:
        proof = integer.prove(model, feed, threads=ctx.threads)
    except ModelError:
        return []  # an operator that this runtime does not know: what it would merge cannot be seen
    merged = {layer.name for layer in proof.layers if layer.rule == "weight-only"}
    return [node for node in nodes if node.name not in merged]


def _write_out(model: ir.Model, node: ir.Node, form: Format, written: dict[ir.Value, list[ir.Value]]) -> None:
    """Replace a product and its DequantizeLinear by the MatMulNBits that ONNX Runtime did not make of them.

    ``written`` holds the weights written so far, by the value with their integers.
    """
    dq = node.inputs[1].producer() if node.inputs[1] is not None else None
    source = dq.inputs[0] if dq is not None else None
    assert dq is not None and source is not None
    if source not in written:
        written[source] = _rows(model, dq, form)
    depth, width = (int(n) for n in source.const_value.shape.numpy())  # type: ignore[union-attr]
    inputs = [node.inputs[0], *written[source]]
    attributes = {"K": depth, "N": width, "bits": form.bits, "block_size": form.block, "accuracy_level": 4}
    model.graph.opset_imports["com.microsoft"] = 1
    end = product = g.add_node(
        model.graph, "MatMulNBits", inputs, before=node, attributes=attributes, domain="com.microsoft",
        hint=node.name or "", like=node.outputs[0],
    )  # fmt: skip
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        end = g.add_node(model.graph, "Add", [product.outputs[0], bias], before=node, like=node.outputs[0])
    name, node.name = node.name, g.fresh_name(model.graph, f"{node.name}_replaced")
    product.name = name
    g.replace(node.outputs[0], end.outputs[0])


def _rows(model: ir.Model, dq: ir.Node, form: Format) -> list[ir.Value]:
    """Weight, scales and zero points of a DequantizeLinear as MatMulNBits takes them: one row per output."""
    tensors = [v.const_value for v in dq.inputs if v is not None]
    stored, scales, zeros = (t.numpy() for t in tensors if t is not None)
    depth, width = stored.shape
    padded = np.zeros((width, len(scales) * form.block), np.uint8)
    padded[:, :depth] = stored.astype(np.uint8).T
    points = zeros.astype(np.uint8).T
    if form.bits == 4:
        padded = g.pairs(padded)
        points = g.pairs(np.pad(points, ((0, 0), (0, len(scales) % 2))))
    hint = dq.inputs[0].name if dq.inputs[0] is not None else ""
    return [
        g.add_constant(model.graph, f"{hint}_rows", padded.reshape(width, len(scales), -1)),
        g.add_constant(model.graph, f"{hint}_rows_scales", np.ascontiguousarray(scales.T).reshape(-1)),
        g.add_constant(model.graph, f"{hint}_rows_zeros", np.ascontiguousarray(points).reshape(-1)),
    ]


def _unsuitable(node: ir.Node) -> str | None:
    """Why the weight of a product cannot be stored in blocks, or None."""
    if not g.is_op(node, "MatMul", "Gemm"):
        return f"{node.op_type} has no kernel for weights in blocks"
    weight = node.inputs[1]
    if weight is None or not g.is_constant(weight) or weight.const_value is None:
        return "its right operand is not constant"
    if weight.const_value.dtype != ir.DataType.FLOAT or len(weight.const_value.shape) != 2:
        return "its weight is not a float32 matrix"
    if weight.const_value.size < SMALLEST:
        return f"its weight has fewer than {SMALLEST} elements"
    if weight.is_graph_output():
        return "its weight is an output of the model"
    if g.is_op(node, "Gemm") and (
        g.attribute(node, "alpha", 1.0) != 1 or g.attribute(node, "beta", 1.0) != 1 or g.attribute(node, "transA", 0)
    ):
        return "Gemm with alpha, beta or transA has no kernel for weights in blocks"
    shared = {int(g.attribute(use.node, "transB", 0)) for use in weight.uses() if g.is_op(use.node, "Gemm", "MatMul")}
    if len(shared) > 1:
        return "its weight is read both ways round"
    return None if squares(weight) else TOO_LARGE


def _store(
    model: ir.Model, node: ir.Node, source: ir.Value, form: Format, inputs: Inputs | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """New initializers for the weight ``source``; its own memory is given back where it lies in a file."""
    tensor = source.const_value
    assert tensor is not None
    array = tensor.numpy()
    if g.attribute(node, "transB", 0):
        array = array.T
    stored, scales, zeros = quantize(array, form, inputs)
    del array
    model_io.forget(tensor)
    scale = g.add_constant(model.graph, f"{source.name}_scales", scales)
    return (
        g.add_integers(model.graph, f"{source.name}_q", stored, form.bits),
        scale,
        g.add_integers(model.graph, f"{source.name}_zeros", zeros, form.bits),
    )


def _read(model: ir.Model, node: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value], form: Format) -> None:
    """Let ``node`` read the stored weight; ONNX Runtime merges a DequantizeLinear with one reader only."""
    old = node.inputs[1]
    assert old is not None
    dq = g.add_node(
        model.graph, "DequantizeLinear", parts, before=node, attributes={"axis": 0, "block_size": form.block},
        hint=old.name or "",
    )  # fmt: skip
    dq.outputs[0].type, dq.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), parts[0].shape
    node.replace_input_with(1, dq.outputs[0])
    node.attributes.pop("transB", None)


@dataclasses.dataclass(frozen=True)
class WeightOnly(Pass):
    """A pass that is `store` with ``bits`` bits; a subclass says how many and describes the options."""

    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True
    bits: ClassVar[int]

    block: int = 32
    keep: tuple[str, ...] = ()
    samples: int = 32

    def __post_init__(self) -> None:
        self.require(
            self.block >= 16 and self.block & (self.block - 1) == 0,
            f"block={self.block} must be a power of two and at least 16",
        )
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return store(model, Format(self.bits, self.block), ctx, keep=self.keep, samples=self.samples)
