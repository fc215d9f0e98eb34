"""Units and Q/DQ pairs: what can be an integer kernel becomes one, and nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import qdq, runtime
from onnxslim.calibration import Histogram
from onnxslim.graph import constant
from onnxslim.quantization import activation_params, store_weight, weight_params
from onnxslim.saturation import neighbours
from onnxslim.units import Kind, Unit, find_units, name_nodes, settle, sources, stored_values

RNG = np.random.default_rng(1)
X = RNG.standard_normal((2, 16, 8, 8)).astype(np.float32)


def f(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def build(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    x: tuple[Any, ...],
    out: str = "y",
    opset: int = 17,
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in out.split(",")],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = model_io.load(onnx.shape_inference.infer_shapes(proto))
    name_nodes(model)
    return model


def quantized(model: ir.Model, x: np.ndarray, products: set[str] | None = None) -> tuple[ir.Model, frozenset[str]]:
    """``model`` with all its units (or the given products) stored in ranges seen for ``x``."""
    units, _ = find_units(model)
    owner = sources(units.values())
    every = {n for n, u in units.items() if u.kind is Kind.PRODUCT}
    names = {owner.get(v, v) for v in stored_values(units, units)}
    values = next(runtime.tap(model, names, [{"x": x}]))
    params = {n: activation_params(float(a.min()), float(a.max())) for n, a in values.items()}
    weights = {}
    for name in every:
        weight = units[name].weight
        assert weight is not None
        index, axis = weight
        array = constant(units[name].node.inputs[index])
        assert array is not None
        pairs = neighbours(units[name].node, array.shape, axis)  # kernels without VNNI add two products in 16 bits
        scales = weight_params(array, axis, pairs=pairs)
        weights[name] = (store_weight(array, axis, scales, pairs), scales)
    chosen = settle(units, every if products is None else products, {})
    result = model.clone()
    qdq.insert(result, qdq.Plan(chosen, params, weights))
    onnx.checker.check_model(model_io.to_proto(result), full_check=True)
    return result, chosen


def kernels(model: ir.Model) -> set[str]:
    return {n.op_type for n in runtime.optimized(model).graph}


def error(a: ir.Model, b: ir.Model, x: np.ndarray) -> float:
    first, second = (runtime.load(m)({"x": x}) for m in (a, b))
    assert list(first) == list(second)
    return max(
        float(np.linalg.norm(first[k] - second[k]) / np.linalg.norm(first[k]))
        for k in first
        if first[k].dtype.kind == "f"
    )


CONV = {"w": f(16, 16, 3, 3), "b": f(16), "v": f(16, 16, 1, 1)}
FIRST = node("Conv", ["x", "w", "b"], "c", pads=[1, 1, 1, 1])
LAST = node("Conv", ["m", "v"], "y")
BETWEEN: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]] = {
    "relu": ([node("Relu", ["c"], "m")], {}, "QLinearConv"),
    "clip": ([node("Clip", ["c", "l", "h"], "m")], {"l": np.float32(0), "h": np.float32(6)}, "QLinearConv"),
    "leaky": ([node("LeakyRelu", ["c"], "m", alpha=0.1)], {}, "QLinearLeakyRelu"),
    "sigmoid": ([node("Sigmoid", ["c"], "s"), node("Mul", ["c", "s"], "m")], {}, "QLinearMul"),
    "add-constant": ([node("Add", ["c", "k"], "m")], {"k": np.float32(0.7)}, "QLinearAdd"),
    "residual": ([node("Add", ["c", "x"], "a"), node("Relu", ["a"], "m")], {}, "QLinearAdd"),
    "max-pool": ([node("MaxPool", ["c"], "m", kernel_shape=[2, 2])], {}, "NhwcMaxPool"),
    "mean-pool": ([node("AveragePool", ["c"], "m", kernel_shape=[2, 2])], {}, "QLinearAveragePool"),
    "global": ([node("GlobalAveragePool", ["c"], "m")], {}, "QLinearGlobalAveragePool"),
    "concat": (
        [node("Split", ["c"], "", axis=1), node("Concat", ["c2", "c1"], "m", axis=1)],
        {},
        "QLinearConcat",
    ),
    "transpose": ([node("Transpose", ["c"], "m", perm=[0, 1, 3, 2])], {}, "Transpose"),
    "hard-sigmoid": ([node("HardSigmoid", ["c"], "s", alpha=0.3), node("Mul", ["c", "s"], "m")], {}, "QLinearAdd"),
    "hard-swish-operator": ([node("HardSwish", ["c"], "m")], {}, "QLinearMul"),
    "hard-swish": (
        [node("Add", ["c", "k"], "a"), node("Clip", ["a", "l", "h"], "i"), node("Mul", ["c", "i"], "m")],
        {"k": np.float32(3), "l": np.float32(0), "h": np.float32(6)},
        "QLinearMul",
    ),
}
_BOUNDS = {"l": np.float32(-0.1), "h": np.float32(0.4)}
for _name in ("leaky", "sigmoid", "mean-pool", "global", "concat", "hard-sigmoid", "hard-swish-operator"):
    _nodes, _constants, _kernel = BETWEEN[_name]
    *_first, _last = _nodes
    _bare = onnx.NodeProto()
    _bare.CopyFrom(_last)
    _bare.output[0] = "raw"
    BETWEEN[f"{_name} within bounds"] = (
        [*_first, _bare, node("Clip", ["raw", "l", "h"], "m")], _constants | _BOUNDS, _kernel
    )  # fmt: skip
for _name in ("concat", "concat within bounds"):
    BETWEEN[_name][0][0] = helper.make_node("Split", ["c"], ["c1", "c2"], axis=1, name="split")


@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_convolutions(name: str) -> None:
    nodes, constants, kernel = BETWEEN[name]
    model = build([FIRST, *nodes, LAST], CONV | constants, X.shape)
    result, _ = quantized(model, X)
    found = kernels(result)
    assert kernel in found
    assert "QLinearConv" in found
    left = {
        "Conv",
        "Relu",
        "Clip",
        "Add",
        "Mul",
        "Sigmoid",
        "HardSigmoid",
        "LeakyRelu",
        "AveragePool",
        "GlobalAveragePool",
        "Concat",
    }
    assert not found & left
    assert error(model, result, X) < 0.05


@pytest.mark.parametrize("shape", [X.shape, ("n", 16, "h", "w")])
def test_an_image_is_enlarged_without_looking_up_its_elements(shape: tuple[Any, ...]) -> None:
    """Resize of two of the readers of one value, between integer layers with their channels last."""
    up = node("Resize", ["c", "", "twice"], "m", mode="nearest")
    more = node("Resize", ["c", "", "thrice"], "k", mode="nearest")
    nodes = [FIRST, up, more, node("Conv", ["k", "v"], "z"), LAST]
    sizes = {"twice": np.float32([1, 1, 2, 2]), "thrice": np.float32([1, 1, 1, 3])}
    model = build(nodes, CONV | sizes, shape, out="y,z")
    result, _ = quantized(model, X)
    assert kernels(result) <= {
        "QuantizeLinear", "QLinearConv", "Transpose", "Concat", "Reshape", "Shape", "Gather", "Mul", "DequantizeLinear",
    }  # fmt: skip
    assert [n.op_type for n in runtime.optimized(result).graph].count("Transpose") == 3  # x, y and z
    assert error(model, result, X) < 0.05


@pytest.mark.parametrize("transposed", [False, True])
def test_the_axis_of_square_weights(transposed: bool) -> None:
    weight = f(16, 16) * np.geomspace(0.01, 1, 16, dtype=np.float32)
    weight = np.ascontiguousarray(weight.T) if transposed else weight
    model = build([node("Gemm", ["x", "w", "b"], "y", transB=int(transposed))], {"w": weight, "b": f(16)}, (4, 16))
    x = X[:, :, 0, 0].repeat(2, 0)
    result, _ = quantized(model, x)
    assert "QGemm" in kernels(result)
    assert error(model, result, x) < 0.02


@pytest.mark.parametrize("shape", [(5, 16), (1, 5, 16), (2, 3, 5, 16), ("n", 16), ("n", "t", 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_matrix_products_without_a_stored_result(shape: tuple[Any, ...], bias: bool) -> None:
    nodes = [node("MatMul", ["x", "w"], "p" if bias else "y")] + ([node("Add", ["p", "b"], "y")] if bias else [])
    model = build(nodes, {"w": f(16, 12), "b": f(12)}, shape)
    x = RNG.standard_normal([5 if isinstance(d, str) else d for d in shape]).astype(np.float32)
    result, _ = quantized(model, x)
    assert kernels(result) & {"MatMulIntegerToFloat", "QGemm", "QLinearMatMul"}
    assert not kernels(result) & {"MatMul", "Gemm"}
    assert error(model, result, x) < 0.03


def test_a_value_with_many_readers_has_one_store() -> None:
    nodes = [FIRST, node("Conv", ["c", "v"], "d"), node("Conv", ["c", "v2"], "e"), node("Tanh", ["c"], "t")]
    nodes += [node("Add", ["d", "e"], "s"), node("Add", ["s", "t"], "y")]
    model = build(nodes, CONV | {"v2": f(16, 16, 1, 1)}, X.shape)
    result, _ = quantized(model, X)
    ops = [n.op_type for n in runtime.optimized(result).graph]
    assert ops.count("QLinearConv") == 3
    assert error(model, result, X) < 0.05


def test_a_stored_value_that_is_an_output_keeps_its_name() -> None:
    model = build([FIRST, node("Relu", ["c"], "m"), LAST], CONV, X.shape, "y,m")
    result, _ = quantized(model, X)
    assert [v.name for v in result.graph.outputs] == ["y", "m"]
    assert "Conv" not in kernels(result)
    assert error(model, result, X) < 0.05


def test_layers_left_in_float_keep_their_weights() -> None:
    # ONNX Runtime would store the weights of a float Conv between two pairs, with one scale for all channels.
    weights = CONV | {"w2": f(16, 16, 3, 3) * np.geomspace(1e-3, 1, 16, dtype=np.float32).reshape(-1, 1, 1, 1)}
    nodes = [FIRST, node("Conv", ["c", "w2", "b"], "m"), LAST]
    model = build(nodes, weights, X.shape)
    result, _ = quantized(model, X, {"Conv_c", "Conv_y"})
    assert [n.op_type for n in runtime.optimized(result).graph].count("QLinearConv") == 2


def test_shared_weights_and_weights_that_are_outputs() -> None:
    nodes = [FIRST, node("Conv", ["c", "v"], "m"), LAST, node("Identity", ["v"], "z")]
    model = build(nodes, CONV, X.shape, "y,z")
    result, _ = quantized(model, X)
    np.testing.assert_array_equal(runtime.load(result)({"x": X})["z"], CONV["v"])
    assert error(model, result, X) < 0.05


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        ([node("Gemm", ["x", "w"], "y", alpha=0.5)], {"w": f(16, 4)}, "alpha"),
        ([node("Gemm", ["x", "w", "b"], "y")], {"w": f(16, 4), "b": f(3, 4)}, "matrix"),
        ([node("MatMul", ["x", "w"], "y")], {"w": f(2, 16, 4)}, "3 axes"),
        ([node("MatMul", ["w", "x"], "y")], {"w": f(4, 3)}, "left operand"),
        ([node("Transpose", ["x"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")], {}, "activations"),
        ([node("Cast", ["x"], "h", to=10), node("MatMul", ["h", "w"], "z"), node("Cast", ["z"], "y", to=1)],
         {"w": f(16, 4).astype(np.float16)}, "FLOAT16"),
    ],
)  # fmt: skip
def test_what_cannot_run_on_integers_is_named(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], reason: str
) -> None:
    model = build(nodes, constants, (3, 16))
    units, reasons = find_units(model)
    assert not [u for u in units.values() if u.kind is Kind.PRODUCT]
    assert any(reason in text for text in reasons.values())


def test_glue_is_worth_it_only_between_integers() -> None:
    model = build(
        [FIRST, node("Sigmoid", ["c"], "s"), node("Tanh", ["s"], "t"), node("Add", ["t", "x"], "y")], CONV, X.shape
    )
    units, _ = find_units(model)
    chosen = settle(units, {"Conv_c"}, {"c": 100, "s": 100, "t": 100, "y": 100, "x": 100})
    assert chosen == {"Conv_c"}


def conversions(units: Mapping[str, Unit], chosen: Collection[str], sizes: Mapping[str, int]) -> int:
    """Elements that are stored and read back, counted at every value."""
    nodes = {n: name for name, unit in units.items() for n in unit.nodes}
    total = 0
    for name, size in sizes.items():
        value = next(v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and v.name == name)
        writer = next((n for n, u in units.items() if name in u.outputs), None)
        readers = {nodes.get(use.node) in chosen for use in value.uses()} | (
            {False} if value.is_graph_output() else set()
        )
        if writer in chosen:
            free = not units[writer].needs_store and True not in readers
            total += size * (False in readers and not free)
        else:
            total += size * (True in readers)
    return total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_choice_stores_and_reads_back_less(draw: st.DataObject) -> None:
    names = ["x"]
    nodes = []
    for k in range(draw.draw(st.integers(2, 7))):
        inputs = [draw.draw(st.sampled_from(names)) for _ in range(2)]
        op = draw.draw(st.sampled_from(["Conv", "MatMul", "Add", "Sigmoid", "Tanh", "Transpose", "Mul"]))
        weight = {"Conv": "v", "MatMul": "m"}.get(op)
        used = [inputs[0], weight] if weight else inputs if op in ("Add", "Mul") else inputs[:1]
        attributes = {"perm": [0, 1, 3, 2]} if op == "Transpose" else {}
        nodes.append(node(op, used, f"v{k}", **attributes))
        names.append(f"v{k}")
    outputs = draw.draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=2, unique=True))
    if names[-1] not in outputs:
        outputs.append(names[-1])
    weights = {"v": f(8, 8, 1, 1), "m": f(8, 8)}
    model = build(
        nodes, {k: w for k, w in weights.items() if any(k in n.input for n in nodes)}, (1, 8, 8, 8), ",".join(outputs)
    )
    units, _ = find_units(model)
    products = {n for n, u in units.items() if u.kind is Kind.PRODUCT and draw.draw(st.booleans())}
    others = [n for n, u in units.items() if u.kind is not Kind.PRODUCT]
    barred = {n for n in others if draw.draw(st.integers(0, 5)) == 0}
    values = dict.fromkeys(v for u in units.values() for v in (*u.inputs, *u.outputs))
    sizes = {v: draw.draw(st.integers(1, 4)) for v in values}
    chosen = settle(units, products, sizes, barred)
    assert products <= chosen and not chosen & barred
    assert {n for n in chosen if units[n].kind is Kind.PRODUCT} == products
    free = [n for n in others if n not in barred]
    every = (products.union(extra) for count in range(len(free) + 1) for extra in itertools.combinations(free, count))
    assert conversions(units, chosen, sizes) == min(conversions(units, choice, sizes) for choice in every)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_histogram_keeps_every_count_while_it_grows(scale: float) -> None:
    seen = Histogram()
    arrays = [RNG.standard_normal(1000) * scale * 10.0**k for k in range(4)]
    arrays[1][:100] = 0
    for array in arrays:
        seen.update(array)
    everything = np.concatenate(arrays)
    assert seen.counts.sum() + seen.zeros == seen.total == everything.size
    assert (seen.low, seen.high) == (everything.min(), everything.max())
    expected, _ = np.histogram(everything[everything != 0], seen.BINS, (-seen.limit, seen.limit))
    np.testing.assert_allclose(np.cumsum(seen.counts), np.cumsum(expected), atol=2)
    low, high = seen.quantile(0.9)
    assert np.mean(everything < low) == pytest.approx(0.05, abs=0.002)
    assert np.mean(everything > high) == pytest.approx(0.05, abs=0.002)


def test_histogram_takes_empty_and_infinite_values() -> None:
    seen = Histogram()
    seen.update(np.zeros(0, np.float32))
    seen.update(np.array([np.nan, np.inf, -np.inf]))
    assert not np.isfinite(seen.low)
    seen.update(np.array([np.nan, 2.0, -1.0, np.inf]))
    assert (seen.low, seen.high) == (-1.0, 2.0)
