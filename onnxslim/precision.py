"""Runs a float32 model in a 16-bit float type, as far as the operators, their kernels and the numbers allow.

Which tensors of a node may change type is read off the operator's schema: inputs and outputs that share a type variable
change together, and only if the variable allows the type. A node stays in float32 where the execution provider has no
kernel for it (one node of its kind is run to find out), where a number it reads or writes does not fit into the type,
and where it has subgraphs or an output whose type an attribute decides. Casts stand where the two worlds meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import runtime, sequences
from onnxslim.calibration import Range, collect
from onnxslim.contract import Context, Outcome, Skip
from onnxslim.errors import ModelError
from onnxslim.units import NEVER, PRODUCTS, name_nodes

FLOAT = ir.DataType.FLOAT
# Largest and smallest positive numbers.
LIMITS = {ir.DataType.FLOAT16: (65504.0, 6.0e-8), ir.DataType.BFLOAT16: (3.38e38, 1e-38)}
# A sample is not the worst case: values up to this share of the largest number are taken to fit.
HEADROOM = 0.25
# Elements that the inputs of a node may have, all together, for it to be run to find out whether it has a kernel.
LARGEST_TRIAL = 1e7
# Weights of float32 nodes are worth a Cast from this many elements on.
WORTH = 256


@dataclasses.dataclass
class Conversion:
    """What `convert` did: nodes computing in the new type, nodes that stayed with the reason, casts that were added."""

    converted: int = 0
    casts: int = 0
    stored: int = 0
    kept: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Types:
    """Positions of the inputs and outputs of a node that change type."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def convert(
    model: ir.Model,
    kind: ir.DataType,
    peaks: Mapping[str, float],
    *,
    keep: Collection[str] = (),
    store: bool = False,
    has_kernel: Callable[[ir.Node, _Types], bool] | None = None,
) -> Conversion:
    """Rewrite the main graph of ``model`` in place; inputs and outputs of the model keep their types.

    Args:
        kind: FLOAT16 or BFLOAT16.
        peaks: the largest magnitude seen of values, by name; a value missing here is taken to fit.
        keep: names of nodes, or operator types, that stay in float32.
        store: also store the larger weights of nodes that stay in float32 in the type, behind a Cast.
        has_kernel: whether the execution provider runs a node with these tensors in the type.
    """
    done = Conversion()
    plan: dict[ir.Node, _Types] = {}
    for node in model.graph:
        found = _types(node, kind, g.opset(model))
        if isinstance(found, _Types):
            reason = _blocked(node, found, kind, peaks, keep)
            if reason is None and _breaks_fusion(node):
                reason = "ONNX Runtime crashes where it casts what this gives to a MatMul"
            if reason is None and has_kernel is not None and not has_kernel(node, found):
                reason = f"the execution provider has no {kind.name} kernel for {node.op_type}"
            if reason is None:
                plan[node] = found
                continue
            found = reason
        if found:
            done.kept[node.name or node.op_type] = found
    for node in _islands(model, plan):
        del plan[node]
        done.kept[node.name or node.op_type] = f"among float32 nodes {node.op_type} would only add casts"
    done.converted = len(plan)
    _Writer(model, kind, plan, done).run(store)
    g.remove_dead(model.graph)
    return done


def _islands(model: ir.Model, plan: Mapping[ir.Node, _Types]) -> list[ir.Node]:
    """Nodes of ``plan`` that pass tensors of the type to no product, directly or through others; casts cost them more
    than they gain. None in a model without products."""
    if not any(g.is_op(node, *PRODUCTS, *NEVER) for node in model.graph):
        return []
    seen: set[ir.Node] = set()
    alone: list[ir.Node] = []
    for start in plan:
        if start in seen:
            continue
        group, stack = [start], [start]
        seen.add(start)
        while stack:
            node = stack.pop()
            near = [use.node for k in plan[node].outputs for use in node.outputs[k].uses()]
            near += [p for k in plan[node].inputs if (v := node.inputs[k]) is not None and (p := v.producer())]
            fresh = [n for n in dict.fromkeys(near) if n in plan and n not in seen]
            seen.update(fresh)
            group += fresh
            stack += fresh
        if not any(g.is_op(node, *PRODUCTS, *NEVER) for node in group):
            alone += group
    return alone


def _types(node: ir.Node, kind: ir.DataType, version: int) -> _Types | str:
    """The tensors of ``node`` that can change type; an empty text when it has no float tensor, else why it cannot."""
    if not any(v is not None and v.dtype == FLOAT for v in (*node.inputs, *node.outputs)):
        unknown = any(v is not None and v.dtype is None and v.type is None for v in (*node.inputs, *node.outputs))
        return f"the types of {node.op_type} are not known" if unknown else ""
    if any(g.subgraphs(node)):
        return f"{node.op_type} has subgraphs"
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain) if domain == "" else None
    except onnx.defs.SchemaError:
        schema = None
    if schema is None:
        return f"nothing is known about the types of {node.domain or 'ai.onnx'}.{node.op_type}"
    if any(sequences.no_tensor(node, k, {domain: version}) for k in range(len(node.outputs))):
        return f"{node.op_type} gives something else than a tensor"
    name = f"tensor({kind.name.lower()})"
    allowed = {c.type_param_str: name in c.allowed_type_strs for c in schema.type_constraints}
    inputs = [_formal(schema.inputs, k) for k in range(len(node.inputs))]
    outputs = [_formal(schema.outputs, k) for k in range(len(node.outputs))]
    # The type of an output with a variable of its own is decided by an attribute; a Cast is rewritten.
    if g.is_op(node, "Cast"):
        free: set[str] = set()
    else:
        free = set(outputs) - set(inputs)
    given = [*zip(inputs, node.inputs, strict=True), *zip(outputs, node.outputs, strict=True)]
    floats = {variable for variable, v in given if v is not None and v.dtype == FLOAT and allowed.get(variable, False)}
    # A value of unknown type has that of those it shares a variable with.
    turned_in = tuple(k for k, v in enumerate(node.inputs) if v is not None and inputs[k] in floats)
    turned_out = tuple(k for k in range(len(node.outputs)) if outputs[k] in floats - free)
    if not turned_in and not turned_out:
        return f"{node.op_type} has no {kind.name.lower()} form in opset {version}"
    return _Types(turned_in, turned_out)


def _formal(parameters: list[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Type variable (or fixed type) of the parameter at ``index``; the last one may repeat."""
    return str(parameters[min(index, len(parameters) - 1)].type_str) if parameters else ""


def _blocked(
    node: ir.Node, types: _Types, kind: ir.DataType, peaks: Mapping[str, float], keep: Collection[str]
) -> str | None:
    if node.name in keep or node.op_type in keep:
        return "asked to stay in float32"
    largest, smallest = LIMITS[kind]
    for index in types.inputs:
        value = node.inputs[index]
        if value is None or not g.is_constant(value):
            continue
        array = g.constant(value)
        assert array is not None
        sizes = np.abs(array[np.isfinite(array)])
        if sizes.size and sizes.max() > largest:
            return f"its constant {value.name!r} reaches {sizes.max():.3g}, {kind.name.lower()} ends at {largest:.3g}"
        if sizes.size and 0 < sizes.max() < smallest:
            return f"its constant {value.name!r} is {sizes.max():.3g} at most, which {kind.name.lower()} takes for 0"
    values = [*(node.inputs[k] for k in types.inputs), *(node.outputs[k] for k in types.outputs)]
    for value in values:
        peak = peaks.get(value.name or "", 0.0) if value is not None else 0.0
        if value is not None and not peak <= largest * HEADROOM:
            return f"{value.name!r} reaches {peak:.3g}, {kind.name.lower()} ends at {largest:.3g}"
    return None


def _breaks_fusion(node: ir.Node) -> bool:
    """Whether ONNX Runtime's CPU provider may fail to load ``node``, a Cast and a MatMul in a row.

    It casts where a kernel wants float32, and swaps the two to make the Transpose part of the MatMul. Where the first
    axis becomes one of the last two, and the other factor has fewer axes, it then gives up without cleaning up.
    """
    if not g.is_op(node, "Transpose") or not any(g.is_op(use.node, "MatMul") for use in node.outputs[0].uses()):
        return False
    perm = g.attribute(node, "perm")
    others = list(range(1, len(perm))) if perm is not None else []
    return len(others) > 1 and list(perm) in ([*others[:-1], 0, others[-1]], [*others, 0])


class _Writer:
    """Changes types, and inserts each cast once per value."""

    def __init__(self, model: ir.Model, kind: ir.DataType, plan: Mapping[ir.Node, _Types], done: Conversion) -> None:
        self.graph = model.graph
        self.kind = kind
        self.plan = plan
        self.done = done
        self.lowered: dict[ir.Value, ir.Value] = {}
        self.raised: dict[ir.Value, ir.Value] = {}

    def run(self, store: bool) -> None:
        halves = {node.outputs[k] for node, types in self.plan.items() for k in types.outputs}
        for node, types in self.plan.items():
            if g.is_op(node, "Cast") and types.outputs:
                g.set_attribute(node, "to", int(self.kind))
        for node in list(self.graph):
            turned = self.plan.get(node, _Types((), ())).inputs
            for index in turned:
                value = node.inputs[index]
                if value is not None and value not in halves:
                    node.replace_input_with(index, self._lower(value))
        for value in sorted(halves, key=lambda v: v.name or ""):
            self._raise_readers(value)
        for value in halves:
            value.type = ir.TensorType(self.kind)  # clones share type objects
        if store:
            self._store()

    def _lower(self, value: ir.Value) -> ir.Value:
        """``value`` in the 16-bit type: a constant is stored so, anything else is cast."""
        if value not in self.lowered:
            array = g.constant(value)
            if array is not None:
                value_type = self.kind.numpy()
                found = g.add_constant(self.graph, f"{value.name}_{self.kind.short_name()}", array.astype(value_type))
                found.dtype = self.kind
            else:
                found = self._cast(value, self.kind)
            self.lowered[value] = found
        return self.lowered[value]

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        producer = value.producer()
        first = self.graph[0] if producer is None else None
        node = g.add_node(
            self.graph,
            "Cast",
            [value],
            before=first,
            after=producer,
            attributes={"to": int(kind)},
            hint=value.name or "",
        )
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, kind
        self.done.casts += 1
        return node.outputs[0]

    def _raise_readers(self, value: ir.Value) -> None:
        """Give float32 to everybody who reads ``value`` and did not change, subgraphs and the outside included."""
        users = [use for use in value.uses() if use.idx not in self.plan.get(use.node, _Types((), ())).inputs]
        if not users and not value.is_graph_output():
            return
        cast = self._cast(value, FLOAT)
        for use in users:
            use.node.replace_input_with(use.idx, cast)
        if value.is_graph_output():
            name, producer = value.name, cast.producer()
            assert producer is not None
            value.name = g.fresh_name(self.graph, f"{name}_{self.kind.short_name()}")
            cast.name = name
            cast.type = ir.TensorType(FLOAT)
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = cast

    def _store(self) -> None:
        """Store what is left of the larger float32 weights in the type, behind a Cast."""
        for value in list(self.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != FLOAT or tensor.size < WORTH or value.is_graph_output():
                continue
            users = list(value.uses())
            if not users:
                continue
            array = tensor.numpy()
            largest, _ = LIMITS[self.kind]
            if np.abs(array[np.isfinite(array)]).max(initial=0) > largest:
                continue
            small = self._lower(value)
            cast = self._cast(small, FLOAT)
            for use in users:
                use.node.replace_input_with(use.idx, cast)
            self.done.stored += 1


def convert_interface(model: ir.Model, kind: ir.DataType, peaks: Mapping[str, float]) -> dict[str, str]:
    """Give the float32 inputs and outputs of ``model`` the type ``kind``; those that keep theirs, with the reason.

    To be called after `convert`, whose casts at the border go.
    """
    kept: dict[str, str] = {}
    largest, _ = LIMITS[kind]
    for value in model.graph.inputs:
        if _is_float(value) and not value.is_graph_output():
            if peaks.get(value.name or "", 0.0) > largest * HEADROOM:
                kept[value.name or ""] = (
                    f"it reaches {peaks[value.name or '']:.3g}, {kind.name.lower()} ends at {largest:.3g}"
                )
            else:
                _convert_input(model.graph, value, kind)
    for index, value in enumerate(model.graph.outputs):
        if not _is_float(value):
            continue
        if value.producer() is None or list(model.graph.outputs).count(value) > 1:
            kept[value.name or ""] = "it is an input, a weight or another output too"
        elif peaks.get(value.name or "", 0.0) > largest * HEADROOM:
            kept[value.name or ""] = (
                f"it reaches {peaks[value.name or '']:.3g}, {kind.name.lower()} ends at {largest:.3g}"
            )
        else:
            _convert_output(model.graph, index, kind)
    g.remove_dead(model.graph)
    return kept


def _is_float(value: ir.Value) -> bool:
    """Whether it is a float32 tensor, not a sequence of them."""
    return isinstance(value.type, ir.TensorType) and value.dtype == FLOAT


def _convert_input(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> None:
    uses = list(value.uses())
    value.type = ir.TensorType(kind)
    raised: ir.Value | None = None
    for use in uses:
        if g.is_op(use.node, "Cast") and g.attribute(use.node, "to") == int(kind):
            g.replace(use.node.outputs[0], value)
            continue
        if raised is None:
            node = g.add_node(
                graph, "Cast", [value], before=graph[0], attributes={"to": int(FLOAT)}, hint=value.name or ""
            )
            raised = node.outputs[0]
            raised.shape, raised.type = value.shape, ir.TensorType(FLOAT)
        use.node.replace_input_with(use.idx, raised)


def _convert_output(graph: ir.Graph, index: int, kind: ir.DataType) -> None:
    value = graph.outputs[index]
    node, name = value.producer(), value.name
    assert node is not None
    source = node.inputs[0] if g.is_op(node, "Cast") else None
    value.name = g.fresh_name(graph, f"{name}_float")
    if source is None or source.dtype != kind or source.producer() is None or source.is_graph_output():
        cast = g.add_node(graph, "Cast", [value], after=node, attributes={"to": int(kind)}, hint=name or "")
        source = cast.outputs[0]
        source.shape = value.shape
    source.type, source.name = ir.TensorType(kind), name
    graph.outputs[index] = source


def kernels(model: ir.Model, kind: ir.DataType, ep: str) -> Callable[[ir.Node, _Types], bool]:
    """Whether ``ep`` runs a single node with its tensors in ``kind``; each sort of node is tried once."""
    version = g.opset(model)
    seen: dict[str, bool] = {}

    def probe(node: ir.Node, types: _Types) -> bool:
        key = repr((node.domain, node.op_type, types, sorted((k, str(a.value)) for k, a in node.attributes.items())))
        key += repr([None if v is None else (str(v.dtype), g.known_shape(v)) for v in node.inputs])
        if key not in seen:
            seen[key] = _runs(node, types, kind, version, ep)
        return seen[key]

    return probe


def _runs(node: ir.Node, types: _Types, kind: ir.DataType, version: int, ep: str) -> bool:
    """True when a model of ``node`` alone loads in ``kind``, and runs on made-up inputs where it does in float32.

    Kernels that are registered for a type may still refuse it when they run.
    """
    ep = ep if runtime.available(ep) else "cpu"
    trial = _alone(node, types, kind, version)
    feed = _made_up(trial, node)
    if _works(trial, feed, ep):
        return True
    fair = feed is not None and _works(_alone(node, types, FLOAT, version), feed, ep)
    return feed is not None and not fair and _works(trial, None, ep)


def _works(model: ir.Model, feed: Mapping[str, np.ndarray] | None, ep: str) -> bool:
    """True when ``model`` loads, and runs where there is a ``feed``."""
    try:
        runner = runtime.load(model, ep=ep, threads=1)
        if feed is not None:
            runner(feed)
    except ModelError:
        return False
    return True


def _made_up(model: ir.Model, node: ir.Node) -> dict[str, np.ndarray] | None:
    """Zeros for the inputs of ``model``, sizes that are not known being 1; None where that is no fair try."""
    feed: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        if value.dtype is None or value.shape is None or node.domain not in ("", "ai.onnx"):
            return None
        kind = np.dtype(np.float32) if value.dtype.is_floating_point() else value.dtype.numpy()
        # Exporters write unknown sizes as -1, too.
        sizes = [size if isinstance(size, int) and size >= 0 else 1 for size in value.shape]
        feed[value.name or ""] = np.zeros(sizes, kind)
    return feed if sum(array.size for array in feed.values()) <= LARGEST_TRIAL else None


def _alone(node: ir.Node, types: _Types, kind: ir.DataType, version: int) -> ir.Model:
    """A model of ``node`` alone, with the tensors of ``types`` in ``kind``."""
    inputs: list[ir.Value | None] = []
    given: list[ir.Value] = []
    constants: list[ir.Value] = []
    for index, old in enumerate(node.inputs):
        if old is None:
            inputs.append(None)
            continue
        dtype = kind if index in types.inputs else old.dtype
        value = ir.Value(name=f"i{index}", type=None if dtype is None else ir.TensorType(dtype), shape=old.shape)
        # Kernels may insist on constants (axes, shapes); weights need not be copied.
        array = g.constant(old) if old.dtype != FLOAT and g.is_constant(old) else None
        if array is not None:
            value.const_value = ir.tensor(array, name=value.name)
            constants.append(value)
        else:
            given.append(value)
        inputs.append(value)
    outputs = []
    for index, old in enumerate(node.outputs):
        dtype = kind if index in types.outputs else old.dtype
        outputs.append(
            ir.Value(name=f"o{index}", type=None if dtype is None else ir.TensorType(dtype), shape=old.shape)
        )
    copy = ir.node(node.op_type, inputs, domain=node.domain, outputs=outputs)
    copy.attributes.update({k: a for k, a in node.attributes.items() if a.type != ir.AttributeType.GRAPH})
    if g.is_op(node, "Cast") and types.outputs:
        g.set_attribute(copy, "to", int(kind))
    graph = ir.Graph(given, outputs, nodes=[copy], initializers=constants, opset_imports={"": version}, name="probe")
    return ir.Model(graph, ir_version=10)


def lower(
    model: ir.Model,
    kind: ir.DataType,
    ctx: Context,
    *,
    keep: Collection[str] = (),
    store: bool = False,
    samples: int = 32,
    keep_io: bool = True,
) -> Outcome:
    """`convert` with what the samples of ``ctx`` show and the kernels that its target has, as the outcome of a pass.

    Without ``keep_io`` followed by `convert_interface`.
    """
    name_nodes(model)
    peaks: dict[str, float] = {}
    if kind is ir.DataType.FLOAT16 and len(ctx.calibration):
        values = [v for node in model.graph for v in node.outputs if _is_float(v) and v.name]
        values += filter(_is_float, model.graph.inputs)
        seen = {v.name or "": Range() for v in values}
        collect(model, {name: [r] for name, r in seen.items()}, ctx, data=ctx.calibration.spread(samples))
        peaks = {name: max(-r.low, r.high) for name, r in seen.items() if r.low <= r.high}
    has_kernel = kernels(model, kind, ctx.target)
    done = convert(model, kind, peaks, keep=keep, store=store, has_kernel=has_kernel)
    if not keep_io:
        done.kept.update(convert_interface(model, kind, peaks))
    stats = {"converted": done.converted, "casts": done.casts, "weights_stored": done.stored, "kept": len(done.kept)}
    return Outcome(stats, [Skip(name, reason) for name, reason in done.kept.items()])
