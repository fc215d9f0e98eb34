"""What storing tensors in 8 bits would do to a model, measured by running it.

`Local` adds, beside every product of the float model, the same product of the stored input and the stored weight, once
for each range that is tried, and sums up the differences: one pass gives the errors of every product. Upstream products
stay exact, so errors do not mix. Scales and zero points are inputs of the session: then it leaves pairs as they are.

`Switched` is the whole model with every stored tensor behind a switch that is an input of the session: any choice of
units can be simulated without building a model for it. A switch is an If: only what is chosen is computed, and the
weights of both sides are constants, which a selection by Where would multiply with as if they were activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import branch_values, runtime
from onnxslim import graph as g
from onnxslim.profiles import CPU, Profile
from onnxslim.qdq import Plan, stored_operand, stores
from onnxslim.quantization import QParams, dequantize
from onnxslim.units import Kind, Unit, connect, find_units, sources, stored_values

Weights = Mapping[str, tuple[np.ndarray, QParams]]
Feeds = dict[str, np.ndarray]


class Local:
    """The error that each product makes by itself, with each of several ranges of what it reads.

    Args:
        model: a float model; it is not changed.
        products: names of the units to measure.
        weights: stored weights of these units.
        options: for each tensor that is stored, the parameters to try, by name.
        profile: how activations are stored.
    """

    def __init__(
        self,
        model: ir.Model,
        products: Sequence[str],
        weights: Weights,
        options: Mapping[str, Mapping[str, QParams]],
        threads: int,
        profile: Profile = CPU,
    ) -> None:
        clone = model.clone()
        self.version = g.opset(model)
        units = profile.units(find_units(clone)[0])
        owner = sources(units.values())
        self.inputs = {n: owner.get(units[n].inputs[0], units[n].inputs[0]) for n in products}
        self.owners = list(dict.fromkeys(self.inputs.values()))
        # Several ranges may be the same: each is computed once.
        self._place = {o: _places(options[o]) for o in self.owners}
        self._params: Feeds = {}
        inputs: dict[str, list[tuple[ir.Value, ir.Value]]] = {}
        for o in self.owners:
            inputs[o] = []
            for k, method in {k: method for method, k in self._place[o].items()}.items():
                scale, zero_point = _params_inputs(clone.graph, f"{k}:{o}", profile.dtype)
                self._params[scale.name or ""] = options[o][method].scale
                self._params[zero_point.name or ""] = options[o][method].zero_point
                inputs[o].append((scale, zero_point))
        clone.graph.outputs.clear()
        numbers = _Numbers(clone.graph)
        self._results: dict[str, list[str]] = {}
        results: list[ir.Value] = []
        for name in products:
            stored = numbers(name, weights[name])
            made = self._branches(clone.graph, units[name], inputs[self.inputs[name]], stored)
            self._results[name] = [v.name or "" for v in made]
            results += made
        self._names = _give(clone, results)
        g.remove_dead(clone.graph)
        self.runner = _load(clone, threads)

    def _branches(
        self, graph: ir.Graph, unit: Unit, params: Sequence[tuple[ir.Value, ir.Value]], weight: ir.Value
    ) -> list[ir.Value]:
        """The squared norm of what ``unit`` gives, and for each of ``params`` squared error and mean error."""
        assert unit.weight is not None
        node, home = unit.node, unit.node.graph
        assert node.inputs[0] is not None and home is not None
        exact = node.outputs[0]
        sizes = g.known_shape(weight) or ()
        results = [_reduce(graph, "ReduceSumSquare", exact, None, self.version)]
        for pair in params:
            inputs = list(node.inputs)
            inputs[0] = _round_trip(graph, node, node.inputs[0], pair)
            inputs[unit.weight[0]] = weight
            copy = ir.node(node.op_type, inputs, outputs=[ir.Value(name=g.fresh_name(graph, f"{unit.name}_q"))])
            copy.attributes.update(node.attributes)
            home.insert_after(node, copy)
            error = g.add_node(graph, "Sub", [copy.outputs[0], exact], after=copy, hint=unit.name)
            results.append(_reduce(graph, "ReduceSumSquare", error.outputs[0], None, self.version))
            if node.op_type == "Conv":
                rows, axes = error, [0, *range(2, len(sizes))]
            else:
                form = g.add_constant(graph, f"{unit.name}_form", np.array([-1, sizes[unit.weight[1]]], np.int64))
                rows, axes = g.add_node(graph, "Reshape", [error.outputs[0], form], after=error, hint=unit.name), [0]
            results.append(_reduce(graph, "ReduceMean", rows.outputs[0], axes, self.version))
        for k, found in enumerate(results):
            found.name = f"{k}:{unit.name}"
            found.dtype = ir.DataType.FLOAT
        return results

    def __call__(self, feeds: Feeds) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
        """For each product and name of parameters: squared error over the squared result, mean error per channel.

        Products that give nothing but zeros are not among them, nor are those in branches that are not taken.
        """
        outputs = runtime.run(self.runner, {**feeds, **self._params})
        found = {}
        for name, results in self._results.items():
            signal, *rest = (outputs[self._names[r]] for r in results)
            if signal.size and signal > 0:
                told = [(float(e) / float(signal), mean) for e, mean in zip(rest[::2], rest[1::2], strict=True)]
                found[name] = {method: told[k] for method, k in self._place[self.inputs[name]].items()}
        return found


def _places(options: Mapping[str, QParams]) -> dict[str, int]:
    """The position of each among those that differ."""
    known: dict[tuple[bytes, bytes], int] = {}
    keys = {name: (p.scale.tobytes(), p.zero_point.tobytes()) for name, p in options.items()}
    return {name: known.setdefault(key, len(known)) for name, key in keys.items()}


class Switched:
    """The model with the storage of every tensor of a plan behind a switch.

    Args:
        model: a float model; it is not changed.
        plan: units, parameters, weights and shifts; calls simulate subsets of its units.
    """

    def __init__(self, model: ir.Model, plan: Plan, threads: int) -> None:
        clone = model.clone()
        self.units = plan.profile.units(find_units(clone)[0])
        owner = sources(self.units.values())
        graph = clone.graph
        values = {v.name or "": v for v in graph.inputs}
        values.update((v.name or "", v) for node in g.in_branches(graph) for v in node.outputs)
        self.values = stored_values(self.units, plan.chosen)
        chosen = [n for n in self.units if n in plan.chosen]
        self.products = [n for n in chosen if self.units[n].kind is Kind.PRODUCT]
        # Units whose own numbers are others on integers.
        glue = [n for n in chosen if self.units[n].constants or self.units[n].op == "HardSwish"]
        self.renumbered = [*self.products, *glue]
        constants = {o: _constants(graph, o, plan.params[o]) for o in {owner.get(v, v) for v in self.values}}
        products = {self.units[n].node for n in self.products}
        self.writer, readers = connect(self.units)
        self.merged = {name for name in self.values if stores(values[name].producer(), plan.profile)}
        # Units other than products that read a value which has several readers: what is chosen reads what is stored,
        # and everybody does where an integer operator writes it, or a kernel that stores it by the way.
        self.shared: dict[str, list[str]] = {}
        unstored: dict[str, ir.Value] = {}
        for name in self.values:
            value = values[name]
            uses = list(value.uses())
            outputs = graph.outputs if value.graph is None else value.graph.outputs
            params = constants[owner.get(name, name)]
            q = _loose(graph, "QuantizeLinear", [value, *params])
            dq = _loose(graph, "DequantizeLinear", [q.outputs[0], *params])
            stored = read = _either(graph, f"on:{name}", [q, dq], _same(graph, value), value)
            own: dict[ir.Node | None, ir.Value] = {}
            if len({use.node for use in uses}) + (value in outputs) > 1:
                self.shared[name] = [r for r in readers.get(name, ()) if r not in self.products]
                unstored[name] = read = _either(graph, f"all:{name}", _same(graph, stored), _same(graph, value), stored)
                for r in self.shared[name]:
                    own[self.units[r].node] = _either(
                        graph, f"{r} reads {name}", _same(graph, stored), _same(graph, value), stored
                    )
            for use in uses:
                use.node.replace_input_with(use.idx, stored if use.node in products else own.get(use.node, read))
            for index, output in enumerate(outputs):
                if output is value:
                    outputs[index] = read
        # Outputs may have been renamed: they are read by position.
        numbers = _Numbers(graph)
        for name in self.products:
            unit = self.units[name]
            stored = numbers(name, plan.weights[name])
            self._product(graph, unit, stored, plan.shift.get(name), unstored.get(unit.inputs[0]))
        for name in glue:
            self._glue(graph, self.units[name], plan.profile)
        self.runner = _load(clone, threads)

    def _product(
        self, graph: ir.Graph, unit: Unit, stored: ir.Value, shift: np.ndarray | None, unstored: ir.Value | None
    ) -> None:
        """Put ``unit`` with the numbers of the file, and with those that would be stored, behind a switch.

        ``unstored`` is what it reads in float, where that may be another value than on integers.
        """
        assert unit.weight is not None
        changed = {(unit.node, unit.weight[0]): stored}
        target = unit.bias or unit.node
        place = 2 if unit.bias is None else (0 if g.is_constant(unit.bias.inputs[0]) else 1)
        if shift is not None and target.op_type != "MatMul":
            old = g.constant(target.inputs[place]) if len(target.inputs) > place else None
            moved = (shift if old is None else old + shift).astype(np.float32)
            changed[target, place] = g.add_constant(graph, f"{unit.name}_moved", moved)
        plain = {} if unstored is None else {(unit.node, 0): unstored}
        _renumber(graph, unit, _copies(graph, unit, changed), _copies(graph, unit, plain))

    def _glue(self, graph: ir.Graph, unit: Unit, profile: Profile) -> None:
        """Put the constants of ``unit``, and what HardSwish multiplies by, as they are and stored behind a switch."""
        changed = {}
        for index in unit.constants:
            array = dequantize(*stored_operand(unit, index, profile))
            changed[unit.node, index] = g.add_constant(graph, f"{unit.name}_{index}_stored", array)
        copies = _copies(graph, unit, changed)
        if unit.op == "HardSwish":
            source, swish = unit.node.inputs[0], copies[0]
            gate = _loose(graph, "HardSigmoid", [source], alpha=1 / 6, beta=0.5)
            params = _constants(graph, f"{unit.name}_gate", profile.params(0.0, 1.0))
            q = _loose(graph, "QuantizeLinear", [gate.outputs[0], *params])
            dq = _loose(graph, "DequantizeLinear", [q.outputs[0], *params])
            product = _loose(graph, "Mul", [source, dq.outputs[0]])
            swish.outputs[0].replace_all_uses_with(product.outputs[0])
            copies[:1] = [gate, q, dq, product]
        _renumber(graph, unit, copies, _copies(graph, unit, {}))

    def __call__(self, feeds: Feeds, chosen: Collection[str]) -> list[np.ndarray]:
        """The outputs, in the order of the model's, with the ``chosen`` units on integers."""
        on = set(stored_values(self.units, chosen))
        switches = {f"on:{v}": np.array(v in on) for v in self.values}
        for name, units in self.shared.items():
            told = name in self.merged or self.writer.get(name) in chosen
            switches[f"all:{name}"] = np.array(told)
            switches.update((f"{unit} reads {name}", np.array(told or unit in chosen)) for unit in units)
        switches.update((f"w:{n}", np.array(n in chosen)) for n in self.renumbered)
        return runtime.arrays(runtime.run(self.runner, {**feeds, **switches}))


class _Numbers:
    """Makes constants of stored weights, one for all products that share one."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[int, ir.Value] = {}

    def __call__(self, name: str, weight: tuple[np.ndarray, QParams]) -> ir.Value:
        key = id(weight[0])
        if key not in self._made:
            self._made[key] = g.add_constant(self._graph, f"{name}_stored", dequantize(*weight))
        return self._made[key]


class SwitchedWeights:
    """The model with other numbers for some of its weights, each behind a switch that is an input of the session.

    Args:
        model: it is not changed.
        changed: the other numbers, by the name of the initializer.
    """

    def __init__(self, model: ir.Model, changed: Mapping[str, np.ndarray], threads: int) -> None:
        clone = model.clone()
        graph = clone.graph
        self.names = list(changed)
        for name, array in changed.items():
            value = graph.initializers[name]
            old = g.constant(value)
            assert old is not None
            uses = list(value.uses())
            switch = ir.Value(name=f"on:{name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
            graph.inputs.append(switch)
            # Unlike Where, these are in all operator sets.
            change = g.add_constant(graph, f"{name}_change", (array - old).astype(np.float32))
            step = g.add_node(graph, "Mul", [change, switch], before=graph[0], like=value)
            choice = g.add_node(graph, "Add", [value, step.outputs[0]], after=step, like=value)
            for use in uses:
                use.node.replace_input_with(use.idx, choice.outputs[0])
        self.runner = _load(clone, threads)

    def __call__(self, feeds: Feeds, chosen: Collection[str]) -> list[np.ndarray]:
        """The outputs with the other numbers for the ``chosen`` initializers."""
        switches = {f"on:{n}": np.array(n in chosen, np.float32) for n in self.names}
        return runtime.arrays(runtime.run(self.runner, {**feeds, **switches}))


def _load(clone: ir.Model, threads: int) -> runtime.Runner:
    """A session for ``clone``, which has had its day: the session has copies of the weights that were added to it.

    Nodes and values refer to each other, so the arrays would wait for a collection of cycles.
    """
    runner = runtime.load(clone, threads=threads)
    for value in clone.graph.initializers.values():
        value.const_value = None
    return runner


def _either(graph: ir.Graph, name: str, on: Sequence[ir.Node], off: Sequence[ir.Node], like: ir.Value) -> ir.Value:
    """What the last node of ``on`` computes where the new input ``name`` of the model is true, else that of ``off``.

    It stands right behind what computes ``like``, whose type it has.
    """
    switch = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
    graph.inputs.append(switch)
    branches = {}
    for branch, nodes in (("then_branch", on), ("else_branch", off)):
        result = nodes[-1].outputs[0]
        result.type = like.type
        branches[branch] = ir.Graph([], [result], nodes=nodes, name=result.name)
    producer = like.producer()
    before = graph[0] if producer is None else None
    chosen = g.add_node(graph, "If", [switch], attributes=branches, before=before, after=producer, like=like)
    return chosen.outputs[0]


def _renumber(graph: ir.Graph, unit: Unit, on: Sequence[ir.Node], off: Sequence[ir.Node]) -> None:
    """Put the nodes ``on``, which stand for ``unit`` on integers, and ``off``, for ``unit`` in float, in its place."""
    result = unit.nodes[-1].outputs[0]
    g.replace(result, _either(graph, f"w:{unit.name}", on, off, result))
    for node in reversed(unit.nodes):
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)


def _copies(graph: ir.Graph, unit: Unit, numbers: Mapping[tuple[ir.Node, int], ir.Value]) -> list[ir.Node]:
    """The nodes of ``unit`` once more, with other ``numbers`` in the place of some inputs."""
    made: dict[ir.Value | None, ir.Value | None] = {}
    copies = []
    for node in unit.nodes:
        inputs = [made.get(value, value) for value in node.inputs]
        for (owner, index), value in numbers.items():
            if owner is node:
                inputs += [None] * (index + 1 - len(inputs))
                inputs[index] = value
        copy = _loose(graph, node.op_type, inputs)
        copy.attributes.update(node.attributes)
        made[node.outputs[0]] = copy.outputs[0]
        copies.append(copy)
    return copies


def _same(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    return [_loose(graph, "Identity", [value])]


def _loose(graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value | None], **attributes: float) -> ir.Node:
    """A node in no graph yet, with a name that is new to ``graph``."""
    output = ir.Value(name=g.fresh_name(graph, op_type))
    return ir.node(op_type, inputs, attributes, outputs=[output], name=output.name)


def _constants(graph: ir.Graph, owner: str, params: QParams) -> tuple[ir.Value, ir.Value]:
    return (
        g.add_constant(graph, f"{owner}_scale", params.scale),
        g.add_constant(graph, f"{owner}_zero_point", params.zero_point),
    )


def _give(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, str]:
    """Make outputs of ``values`` of the main graph and of branches: the name of the output for each."""
    inside = [v.name or "" for v in values if v.graph is not model.graph]
    lifted = branch_values.lift(model, inside)
    found = {v.name or "": lifted.get(v.name or "", v) for v in values}
    model.graph.outputs.extend(found.values())
    return {name: value.name or "" for name, value in found.items()}


def _params_inputs(graph: ir.Graph, owner: str, stored: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of one tensor as inputs of the graph, named ``s:`` and ``z:``."""
    found = []
    for kind, dtype in (("s", ir.DataType.FLOAT), ("z", stored)):
        value = ir.Value(name=f"{kind}:{owner}", type=ir.TensorType(dtype), shape=ir.Shape(()))
        graph.inputs.append(value)
        found.append(value)
    return found[0], found[1]


def _round_trip(graph: ir.Graph, before: ir.Node, value: ir.Value, params: tuple[ir.Value, ir.Value]) -> ir.Value:
    """``value`` stored and read back."""
    q = g.add_node(graph, "QuantizeLinear", [value, *params], before=before)
    if params[1].dtype is not None:
        q.outputs[0].dtype = params[1].dtype
    return g.add_node(graph, "DequantizeLinear", [q.outputs[0], *params], before=before, like=value).outputs[0]


def _reduce(graph: ir.Graph, op_type: str, value: ir.Value, axes: list[int] | None, version: int) -> ir.Value:
    """A reduction without kept axes; from opset 18 the axes are an input."""
    producer = value.producer()
    assert producer is not None
    inputs: list[ir.Value | None] = [value]
    attributes: dict[str, object] = {"keepdims": 0}
    if axes is not None and version < 18:
        attributes["axes"] = axes
    elif axes is not None:
        inputs.append(g.add_constant(graph, f"{value.name}_axes", np.array(axes, np.int64)))
    return g.add_node(graph, op_type, inputs, after=producer, attributes=attributes).outputs[0]
