"""simplify: the same function with fewer nodes."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, Counter
from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim.axes import merge_movements
from onnxslim.branches import inline_constant_if
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.defaults import drop_zeros
from onnxslim.folding import fold_constants
from onnxslim.graph import add_constant, is_constant, opset, replace, subgraphs
from onnxslim.layouts import remove_changes
from onnxslim.liveness import remove_unread
from onnxslim.lookups import replace_lookup
from onnxslim.narrow import narrow_values
from onnxslim.noops import unchanged
from onnxslim.pairs import merge_pair
from onnxslim.parts import move_through_parts
from onnxslim.shapes import Shapes
from onnxslim.sharing import deduplicate_initializers, merge_equal_nodes
from onnxslim.sizes import Rebuilder
from onnxslim.splits import split_slices
from onnxslim.views import merge_casts, merge_views, settle_target

# Types of shape arithmetic; the contents of float tensors leave open the sign of a zero.
_SIZES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
# Sweeps after which a graph that still changes is left as it is; each is linear in the nodes, and real models take
# three to five.
MAX_SWEEPS = 20


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Removes every node that the result does not need, without changing a bit of the outputs.

    Sizes are followed through the graph as exact expressions of the named dimensions of the inputs, so that chains of
    Shape, Gather, Concat and arithmetic become constants; what depends on weights alone is computed (unless storing it
    would make the file larger); nodes that change nothing, repeat another node or are read by nobody go; equal weights
    are stored once. Chains of Reshape and Transpose become three nodes at most; masks are computed no wider than needed
    and looked up without index tensors that only count; what all parts of a Split go through is done in front of it;
    states of zeros, with which recurrent layers start anyway, are left out. Inputs, outputs, their names, types and
    symbolic sizes stay.
    """

    name: ClassVar[str] = "simplify"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        if opset(model) < 5:
            return Outcome({}, [Skip("*", "operator sets below 5 write shapes as attributes")])
        run = _Run(model)
        for _ in range(MAX_SWEEPS):
            if not run.sweep():
                break
        run.shapes.declare()  # for the passes that follow
        return Outcome({k: v for k, v in run.stats.items() if v}, run.skipped)


class _Run:
    """One application of the pass: what was done so far, and what need not be tried again."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.stats: Counter[str] = Counter()
        self.skipped: list[Skip] = []
        self.failed: dict[str, Skip] = {}
        self.shapes = Shapes(model)

    def sweep(self) -> int:
        """Apply every mechanism once; returns the number of changes."""
        before = self.stats.total()
        signature = [(v.type, v.shape) for v in self.model.graph.outputs]
        initializers, saved = deduplicate_initializers(self.model)
        self.stats["initializers_shared"] += initializers
        self.stats["bytes_shared"] += saved
        self.stats["merged"] += merge_equal_nodes(self.model)
        self.shapes = shapes = Shapes(self.model)
        self._rewrite(self.model.graph, shapes, ChainMap())
        folding = fold_constants(self.model, shapes, self.failed)
        self.stats["folded"] += folding.nodes
        self.skipped = folding.skipped
        dead, outputs = remove_unread(self.model)
        self.stats["dead_outputs"] += outputs
        self.stats["narrowed"] += narrow_values(self.model, shapes)
        self.stats["sizes_rebuilt"] += Rebuilder(self.model, shapes).run()
        self.stats["slices_split"] += split_slices(self.model, shapes)
        self.stats["parts_joined"] += move_through_parts(self.model, shapes)
        self.stats["layouts_saved"] += remove_changes(self.model, shapes)
        for value, (kind, shape) in zip(self.model.graph.outputs, signature, strict=True):
            value.type, value.shape = kind, shape
        return self.stats.total() - before + dead

    def _rewrite(self, graph: ir.Graph, shapes: Shapes, equal: ChainMap[Hashable, ir.Value]) -> None:
        """Visit ``graph`` in order, find out what every value is, and replace what is already there."""
        for node in list(graph):
            for inner in subgraphs(node):
                self._rewrite(inner, shapes, equal.new_child())
            shapes.visit(node)
            source = unchanged(node, shapes)
            if source is not None and self._substitute(node.outputs[0], source):
                self.stats["no_ops"] += 1
                continue
            if inline_constant_if(node, self.model.graph):
                self.stats["ifs_inlined"] += 1
                continue
            for value in node.outputs:
                self._compute(value, shapes, equal)
            self.stats["zeros_left_out"] += drop_zeros(node)
            self.stats["targets_settled"] += settle_target(node, shapes, self.model.graph)
            self.stats["views_merged"] += merge_views(node, shapes, self.model.graph)
            self.stats["casts_merged"] += merge_casts(node)
            self.stats["pairs_merged"] += merge_pair(node, shapes, self.model.graph)
            self.stats["lookups_replaced"] += replace_lookup(node, shapes, self.model.graph)
            self.stats["movements_merged"] += merge_movements(node, shapes, self.model.graph)

    def _compute(self, value: ir.Value, shapes: Shapes, equal: ChainMap[Hashable, ir.Value]) -> None:
        """Replace a value whose content is known by a constant, or by an earlier value with the same content."""
        content = shapes.content(value)
        if content is None or value.dtype not in _SIZES or not value.uses():
            return
        elements = content.reshape(-1)
        if all(isinstance(d, int) for d in elements):
            array = np.asarray(content.tolist(), value.dtype.numpy()).reshape(content.shape)
            if not value.is_graph_output():
                replace(value, add_constant(self.model.graph, str(value.name), array))
                self.stats["shapes_computed"] += 1
            return
        key = (value.dtype, content.shape, tuple(elements))
        first = equal.setdefault(key, value)
        if first is not value and self._substitute(value, first):
            self.stats["shapes_merged"] += 1

    def _substitute(self, old: ir.Value, new: ir.Value) -> bool:
        """Make the users of ``old`` read ``new``; False where that would only put an Identity in its place."""
        if old is new:
            return False
        if old.is_graph_output():
            fixed = new.is_graph_input() or new.is_graph_output() or is_constant(new)
            if fixed or new.producer() is None or new.graph is not old.graph:
                return False
        elif not old.uses():
            return False
        replace(old, new)
        return True
