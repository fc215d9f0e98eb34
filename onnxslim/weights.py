"""The weights of a model that layers multiply with, whichever layers these are: what sparsity and sharing change."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import cost, layer_inputs, restoring, runtime
from onnxslim import graph as g
from onnxslim import model as model_io
from onnxslim.contract import Context, Skip
from onnxslim.data import Data
from onnxslim.probe import SwitchedWeights
from onnxslim.results import Told
from onnxslim.rounding import Gram
from onnxslim.units import NEVER, PRODUCTS

# Weights with fewer elements are no size.
SMALLEST = 4096
# Numbers beyond have squares, added up over a weight, that float32 does not hold.
LARGEST = 1e15
TOO_LARGE = "its weight has numbers that are NaN, infinite or too large to be squared"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A float initializer that layers multiply with.

    Attributes:
        value: the initializer.
        axis: along which the products are added up.
        readers: the layers that read it, in the order of the graph.
        groups: of a convolution, else 1.
    """

    value: ir.Value
    axis: int
    readers: tuple[ir.Node, ...]
    groups: int = 1

    @property
    def name(self) -> str:
        """Of the first layer that reads it: what the user calls the layer."""
        return self.readers[0].name or self.readers[0].op_type

    @property
    def size(self) -> int:
        """Elements."""
        assert self.value.const_value is not None
        return self.value.const_value.size

    def rows(self, array: np.ndarray) -> np.ndarray:
        """The weight as (groups, outputs, K), K as in `Gram`."""
        if self.readers[0].op_type == "Conv":
            return array.reshape(self.groups, array.shape[0] // self.groups, -1)
        return np.moveaxis(array, self.axis, -1).reshape(1, -1, array.shape[self.axis])

    def restored(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An array of ``shape`` from what `rows` gives."""
        if self.readers[0].op_type == "Conv":
            return rows.reshape(shape)
        others = tuple(n for k, n in enumerate(shape) if k != self.axis % len(shape))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(*others, shape[self.axis]), -1, self.axis))

    def moments(self, grams: Mapping[str, Gram]) -> np.ndarray | None:
        """Second moments (groups, K, K) of what all its readers multiply; None where one is not known."""
        found = [grams.get(node.name or "") for node in self.readers]
        known = [gram.matrix for gram in found if gram is not None]
        return np.sum(known, axis=0) if len(known) == len(found) else None


def find_weights(
    model: ir.Model, keep: Collection[str] = (), *, tables: bool = False
) -> tuple[list[Weight], list[Skip]]:
    """The weights of ``model``, subgraphs included, and the layers that have none of these with the reason.

    With ``tables``, what a Gather picks rows from (embeddings) is a weight too.
    """
    uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    skipped: list[Skip] = []
    for node in model.graph.all_nodes():
        if not g.is_op(node, *PRODUCTS, *NEVER, *(("Gather",) if tables else ())):
            continue
        name = node.name or node.op_type
        found = [(v, axis) for index, axis in _operands(node) if (v := _float(node, index)) is not None]
        if not found and node.op_type != "Gather":
            skipped.append(Skip(name, "it has no constant float32 weight"))
        for value, axis in found:
            uses.setdefault(value, []).append((node, axis))
    weights = []
    for value, readers in uses.items():
        why = _unsuitable(value, readers, keep)
        if why is None:
            node, axis = readers[0]
            groups = int(g.attribute(node, "group", 1)) if node.op_type == "Conv" else 1
            weights.append(Weight(value, axis, tuple(n for n, _ in readers), groups))
        else:
            skipped += [Skip(n.name or n.op_type, why) for n, _ in readers]
    return weights, list(dict.fromkeys(skipped))


def squares(weight: ir.Value) -> bool:
    """True when the numbers of a constant are finite, and their squares too: errors can be told then."""
    tensor = weight.const_value
    if tensor is None or not tensor.size:
        return True
    array = tensor.numpy()
    low, high = float(array.min()), float(array.max())
    del array
    model_io.forget(tensor)
    return low > -LARGEST and high < LARGEST


def with_moments(
    model: ir.Model, weights: Sequence[Weight], ctx: Context, samples: int
) -> Iterator[list[tuple[Weight, np.ndarray | None]]]:
    """Groups of ``weights``, each with the moments of what it multiplies (`Weight.moments`), from the calibration data.

    A group is what fits into memory together. A weight comes with the last layer that reads it, and its moments are
    known where all that read it are in one group.
    """
    nodes = list(dict.fromkeys(node for weight in weights for node in weight.readers))
    last: dict[ir.Node, list[Weight]] = {}
    for weight in weights:
        last.setdefault(weight.readers[-1], []).append(weight)
    for group, grams in layer_inputs.moments(model, nodes, ctx, samples):
        yield [(weight, weight.moments(grams)) for node in group for weight in last.get(node, ())]


@dataclasses.dataclass(frozen=True)
class Borne:
    """The weights whose change the outputs bear, the others with the reason, and the fidelity (None: not measured)."""

    weights: list[Weight]
    skipped: list[Skip]
    fidelity: float | None


def borne(
    model: ir.Model,
    changed: Mapping[str, np.ndarray],
    weights: Sequence[Weight],
    held_out: Data,
    fidelity: float,
    ctx: Context,
) -> Borne:
    """As many of ``weights`` as may get the numbers ``changed``, by the name of the initializer.

    With them, 1 minus noise over variance of each output of ``model``, on ``held_out``, is at least ``fidelity``. A
    model that is too large for both kinds of numbers in one session is not measured.
    """
    if model_io.weight_bytes(model) > runtime.STAGED:
        ctx.warnings.append(
            "the model is too large for its layers to be judged one by one: nothing was left as it is for fidelity"
        )
        return Borne(list(weights), [], None)
    owners = {weight.value.name or "": weight for weight in weights}
    work = cost.analyze(model, held_out.feed(held_out[0])).work
    budget = 1 - fidelity
    told = Told(model, ctx.threads)
    judge = restoring.Judge(SwitchedWeights(told.model, changed, ctx.threads), held_out, work, ctx, budget, told.exact)
    judge.hardest_first(list(owners))
    found = restoring.keep(list(owners), budget, judge.noise, judge.rank, lambda name: float(owners[name].size))
    skipped = [
        Skip(owners[name].name, f"changed, it takes about {lost:.2%} of an output's variance")
        for name, lost in found.restored.items()
    ]
    return Borne([owners[name] for name in found.names], skipped, round(1 - found.noise, 5))


def _operands(node: ir.Node) -> list[tuple[int, int]]:
    """Inputs of a layer that may be weights, each with the axis along which the products are added up."""
    if node.op_type == "Conv":
        return [(1, 1)]
    if node.op_type == "ConvTranspose":
        return [(1, 0)]
    if node.op_type == "Gather":
        return [(0, -1)]
    if node.op_type == "Gemm":
        return [(0, 0 if g.attribute(node, "transA", 0) else 1), (1, 1 if g.attribute(node, "transB", 0) else 0)]
    if node.op_type == "MatMul":
        return [(0, -1), (1, -2)]
    return [(1, -1), (2, -1)] if node.op_type in ("LSTM", "GRU", "RNN") else []


def _float(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not g.is_constant(value) or value.const_value is None:
        return None
    return value if value.const_value.dtype == ir.DataType.FLOAT and len(value.const_value.shape) > 1 else None


def _unsuitable(value: ir.Value, readers: list[tuple[ir.Node, int]], keep: Collection[str]) -> str | None:
    assert value.const_value is not None
    if any(node.name in keep for node, _ in readers):
        return "asked to stay as it is"
    if value.const_value.size < SMALLEST:
        return f"its weight has fewer than {SMALLEST} elements"
    if value.is_graph_output() or len(value.uses()) != len(readers):
        return "its weight is read by something else too"
    if not squares(value):
        return TOO_LARGE
    rank = len(value.const_value.shape)
    alike = {(n.op_type == "Conv", axis % rank, int(g.attribute(n, "group", 1))) for n, axis in readers}
    return None if len(alike) == 1 else "its weight is read both ways round"
