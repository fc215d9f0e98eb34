"""Integers that grow evenly: what is said about a tensor is what ONNX Runtime computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from oracles import run

from onnxslim import grids, symbolic
from onnxslim import model as model_io
from onnxslim.shape_rules import Grid
from onnxslim.shapes import Shapes


class Net:
    """A graph of integer arithmetic over Range(n) and Range(m), built node by node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.count = 0
        for k, name in enumerate("nm"):
            self.add("Shape", ["x"], f"size_{name}", start=k, end=k + 1)
            self.add("Squeeze", [f"size_{name}", self.weight([0])], f"scalar_{name}")
            self.add("Range", [self.weight(0), f"scalar_{name}", self.weight(1)], f"range_{name}")

    def weight(self, numbers: object, dtype: type = np.int64) -> str:
        self.count += 1
        self.weights.append(numpy_helper.from_array(np.array(numbers, dtype), f"w{self.count}"))
        return f"w{self.count}"

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        self.count += 1
        output = output or f"v{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def facts(self, n: int, m: int) -> list[tuple[Grid, tuple[int, ...], np.ndarray, str]]:
        """For every value whose grid is known: grid, shape, what the runtime computes, name."""
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])], [], self.weights
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        shapes = Shapes(model_io.load(proto)).run()
        known = {v.name: v for v in shapes._facts if v.producer() is not None}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for node in self.nodes for name in node.output)
        results = run(onnx.shape_inference.infer_shapes(proto), {"x": np.zeros((n, m), np.float32)})
        found = []
        for name, value in known.items():
            grid = shapes.grid(value)
            if grid is not None:
                found.append((grid, results[name].shape, results[name], name))
        return found


def expected(grid: Grid, shape: tuple[int, ...], sizes: dict[str, int]) -> np.ndarray | None:
    """The tensor that a grid describes; None where it holds a number that is not known."""
    numbers = [symbolic.evaluate(d, sizes) for d in (grid.start, *grid.steps)]
    if any(n is None for n in numbers):
        return None
    total = np.full(shape, numbers[0], np.int64)
    for axis, step in enumerate(numbers[1:]):
        total += np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))]) * int(step or 0)
    return total


def hold(net: Net, n: int, m: int) -> int:
    checked = 0
    for grid, shape, array, name in net.facts(n, m):
        want = expected(grid, shape, {"n": n, "m": m})
        if want is not None:
            np.testing.assert_array_equal(array.astype(np.int64), want, err_msg=f"{name}: {grid}")
            checked += 1
    return checked


@st.composite
def nets(draw: st.DrawFn) -> Net:
    net = Net()
    values = {"range_n": 1, "range_m": 1, net.weight(list(range(3, 40, 4))): 1, net.weight([[2]]): 2}
    for _ in range(draw(st.integers(1, 6))):
        x = draw(st.sampled_from(sorted(values)))
        rank = values[x]
        op = draw(st.sampled_from(["Unsqueeze", "Transpose", "Add", "Sub", "Mul", "Slice", "Neg", "Compare", "Where"]))
        if op == "Unsqueeze" and rank < 4:
            axis = draw(st.integers(0, rank))
            values[net.add(op, [x, net.weight([axis])])] = rank + 1
        elif op == "Transpose":
            values[net.add(op, [x], perm=draw(st.permutations(range(rank))))] = rank
        elif op in ("Add", "Sub", "Mul"):
            number = net.weight(draw(st.integers(-3, 3)))
            values[net.add(op, [x, number])] = rank
        elif op == "Slice":
            axis, step = draw(st.integers(0, rank - 1)), draw(st.integers(1, 2))
            start, end = draw(st.integers(-2, 2)), draw(st.sampled_from([-1, 3, 2**62]))
            values[net.add(op, [x, *(net.weight([v]) for v in (start, end, axis, step))])] = rank
        elif op == "Neg":
            values[net.add(op, [x])] = rank
        elif op == "Compare":
            test = draw(st.sampled_from(sorted(grids._TESTS)))
            net.add(test, [x, net.weight(draw(st.integers(-1, 1)))])
        elif op == "Where":
            truth = net.weight(draw(st.booleans()), np.bool_)
            values[net.add(op, [truth, x, net.weight(5)])] = rank
    # Two of them meet where they can: one along the last axis, one along an axis before it.
    first, second = (draw(st.sampled_from(sorted(k for k, r in values.items() if r == 1))) for _ in range(2))
    column = net.add("Unsqueeze", [first, net.weight([1])])
    both = net.add(draw(st.sampled_from(["Add", "Sub", "Mul", "Less", "GreaterOrEqual"])), [column, second])
    if not both.startswith("w"):
        net.add("Reshape", [both, net.weight([-1])])
    return net


@settings(max_examples=120, deadline=None)
@given(nets(), st.integers(1, 5), st.integers(1, 5))
def test_every_grid_is_what_the_runtime_computes(net: Net, n: int, m: int) -> None:
    assert hold(net, n, m) >= 2


def test_rows_counted_through_are_one_range_when_flattened() -> None:
    net = Net()
    rows = net.add("Mul", [net.add("Unsqueeze", ["range_n", net.weight([1])]), "size_m"])
    whole = net.add("Reshape", [net.add("Add", [rows, "range_m"]), net.weight([-1])], "whole")
    assert hold(net, 3, 4) > 4
    grids_ = {name: grid for grid, _, _, name in net.facts(3, 4)}
    assert grids_[whole] == Grid(0, (1,))
    # With another row length the numbers do not grow evenly.
    net.add(
        "Reshape", [net.add("Add", [rows, net.add("Unsqueeze", ["range_n", net.weight([0])])]), net.weight([-1])], "odd"
    )
    assert "odd" not in {name for *_, name in net.facts(3, 4)}


def test_a_size_that_may_turn_out_to_be_one_has_no_step() -> None:
    net = Net()
    net.add("Add", ["range_n", "range_m"])
    for n, m in ((1, 3), (3, 1), (2, 2)):
        hold(net, n, m)


def test_indices_below_zero_count_from_the_end() -> None:
    net = Net()
    data = net.weight(np.arange(300) * 3)
    back = net.add("Sub", ["range_n", net.weight(2)])
    net.add("Gather", [data, back])
    forward = net.add("Gather", [data, net.add("Mul", ["range_n", net.weight(2)])])
    assert hold(net, 4, 1) > 3
    assert {name: grid for grid, _, _, name in net.facts(4, 1)}[forward] == Grid(0, (6,))


@pytest.mark.parametrize(
    ("op", "other", "decided"),
    [
        ("GreaterOrEqual", 0, 1), ("Less", 0, 0), ("Equal", -1, 0), ("Greater", -1, 1), ("LessOrEqual", -1, 0),
        ("GreaterOrEqual", 1, None), ("Equal", 0, None), ("Greater", 0, None),
    ],
)  # fmt: skip
def test_comparison_is_decided_only_by_a_bound(op: str, other: int, decided: int | None) -> None:
    net = Net()
    result = net.add(op, ["range_n", net.weight(other)])
    found = {name: grid for grid, _, _, name in net.facts(4, 2)}
    assert found.get(result) == (None if decided is None else Grid(decided, (0,)))


def test_a_weight_is_a_grid_only_if_every_element_fits() -> None:
    even = np.arange(600).reshape(2, 300) * 3 + 5
    assert grids.of_weight(even) == Grid(5, (900, 3))
    even[1, 299] += 1
    assert grids.of_weight(even) is None
    assert grids.of_weight(np.zeros(grids.MAX_WEIGHT + 1, np.int64)) is None
