"""Centring and equalization: the same function, closer ranges; and what elementwise readers make of a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from scipy import special

from onnxslim import data, equalize, ranges, runtime
from onnxslim import model as model_io
from onnxslim.calibration import Histogram
from onnxslim.contract import Context
from onnxslim.responses import response
from onnxslim.units import name_nodes

RNG = np.random.default_rng(2)
SPREAD = np.geomspace(0.01, 1, 8).astype(np.float32)


def f(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def build(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], out: str = "y") -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in out.split(",")],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = model_io.load(onnx.shape_inference.infer_shapes(proto))
    name_nodes(model)
    return model


FEEDS = [{"x": RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)} for _ in range(4)]
PAD = {"pads": [1, 1, 1, 1]}
# Outputs of the first Conv with channels of very different size, far from zero.
UNEVEN = {"w": f(8, 4, 3, 3) * SPREAD[:, None, None, None], "b": np.linspace(-3, 3, 8, dtype=np.float32)}
OTHERS = {"p": f(6, 8, 1, 1), "d": f(8, 1, 3, 3), "q": f(8, 8, 1, 1), "qb": f(8), "g2": f(6, 4, 1, 1)}
OTHERS |= {"low": np.float32(0)}
START = node("Conv", ["x", "w", "b"], "c", **PAD)

POINT = node("Conv", ["r", "p"], "y")
DEPTHWISE = node("Conv", ["r", "d"], "e", group=8, **PAD)
RELU = node("Relu", ["c"], "r")
READ_TWICE = [node("Conv", ["c", "p"], "e"), node("Sigmoid", ["c"], "s")]
READ_TWICE += [node("Conv", ["s", "p"], "t"), node("Add", ["e", "t"], "y")]
# Nodes behind the first Conv, values centred, classes equalized at least.
CASES: dict[str, tuple[list[onnx.NodeProto], int, int]] = {
    "linear": ([node("Conv", ["c", "p"], "y")], 1, 1),
    "relu": ([RELU, POINT], 0, 1),
    "depthwise": ([RELU, DEPTHWISE, node("Conv", ["e", "p"], "y")], 1, 1),
    "padded": ([node("Conv", ["c", "d"], "e", group=8, **PAD), node("Relu", ["e"], "y")], 0, 1),
    "grouped": ([node("Conv", ["c", "g2"], "y", group=2)], 1, 1),
    "residual": (
        [node("Conv", ["c", "q", "qb"], "e"), node("Add", ["c", "e"], "s"), node("Conv", ["s", "p"], "y")],
        3,
        1,
    ),
    "pooled": ([node("Relu", ["c"], "m"), node("MaxPool", ["m"], "r", kernel_shape=[2, 2]), POINT], 0, 1),
    "clipped": ([node("Clip", ["c", "low", "b1"], "r"), POINT], 0, 0),
    "tanh": ([node("Tanh", ["c"], "r"), POINT], 0, 0),
    "read twice": (READ_TWICE, 0, 0),
    "shared weight": ([node("Conv", ["c", "q"], "e"), node("Relu", ["e"], "r"), node("Conv", ["r", "q"], "y")], 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(name: str) -> None:
    nodes, centred, scaled = CASES[name]
    model = build([START, *nodes], UNEVEN | OTHERS | {"b1": np.float32(1)})
    changed = model.clone()
    given = data.open_data(FEEDS, data.input_specs(model))
    done = equalize.equalize(changed, given, Context(calibration=given, threads=1))
    onnx.checker.check_model(model_io.to_proto(changed), full_check=True)
    assert done["centred"] == centred
    assert done["equalized"] >= scaled
    if not scaled:
        assert done["equalized"] == 0
    for feed in FEEDS:
        a, b = runtime.load(model)(feed)["y"], runtime.load(changed)(feed)["y"]
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_ranges_come_closer() -> None:
    model = build([START, node("Conv", ["c", "p"], "y")], UNEVEN | OTHERS)
    changed = model.clone()
    given = data.open_data(FEEDS, data.input_specs(model))
    equalize.equalize(changed, given, Context(calibration=given, threads=1))

    def peaks(m: ir.Model) -> np.ndarray:
        values = [v["c"] for v in runtime.tap(m, ["c"], FEEDS)]
        return np.abs(np.concatenate(values)).max((0, 2, 3))

    before, after = peaks(model), peaks(changed)
    assert after.max() / after.min() < 0.2 * before.max() / before.min()


def test_an_output_is_never_scaled() -> None:
    model = build([START, node("Conv", ["c", "p"], "y")], UNEVEN | OTHERS, "y,c")
    given = data.open_data(FEEDS, data.input_specs(model))
    assert equalize.equalize(model, given, Context(calibration=given, threads=1)) == {"centred": 0, "equalized": 0}


HARD = {"three": np.array([3.0], np.float32), "low": np.float32(0), "six": np.float32(6)}
RESPONSES: dict[str, tuple[list[onnx.NodeProto], str, Any]] = {
    "relu": ([node("Relu", ["c"], "m")], "m", lambda x: np.maximum(x, 0)),
    "silu": ([node("Sigmoid", ["c"], "s"), node("Mul", ["c", "s"], "m")], "m", lambda x: x * special.expit(x)),
    "hard-swish": (
        [node("Add", ["c", "three"], "a"), node("Clip", ["a", "low", "six"], "i"), node("Mul", ["i", "c"], "m")],
        "m",
        lambda x: x * np.clip(x + 3, 0, 6),
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_response_of_elementwise_readers(name: str) -> None:
    nodes, end, want = RESPONSES[name]
    model = build([START, *nodes, node("Conv", ["m", "p"], "y")], UNEVEN | OTHERS | HARD)
    value = next(n.outputs[0] for n in model.graph if n.name == "c")
    found = response(value)
    assert found is not None
    function, seen = found
    assert seen.name == end
    x = np.linspace(-9, 9, 50)
    np.testing.assert_allclose(function(x), want(x), atol=1e-7)


def test_no_response_when_the_value_is_seen_itself() -> None:
    model = build(
        [START, node("Sigmoid", ["c"], "s"), node("Add", ["s", "c"], "m"), node("Conv", ["c", "p"], "y")],
        UNEVEN | OTHERS,
    )
    assert response(next(n.outputs[0] for n in model.graph if n.name == "c")) is None


def test_what_hard_swish_ignores_takes_no_levels() -> None:
    seen = Histogram()
    seen.update(RNG.standard_normal(50_000) * 8 - 4)
    low, _ = ranges.candidates(seen, lambda x: x * np.clip(x + 3, 0, 6) / 6)["mse"]
    assert -5 < low < -2
    assert ranges.candidates(seen)["mse"][0] < -15


def test_the_range_of_least_error_has_it() -> None:
    seen = Histogram()
    values = np.concatenate([RNG.standard_normal(1_000_000), [40.0]])
    for part in np.array_split(values, 20):
        seen.update(part)
    low, high = ranges.least_error(seen)
    best = ranges.expected_error(seen, low, high)
    assert high < 20
    for other in ranges.candidates(seen).values():
        assert best <= ranges.expected_error(seen, *other) * 1.0001
    step = (high - low) / 255
    stored = np.clip(np.rint(values / step), round(low / step), round(high / step)) * step
    assert np.mean(np.square(stored - values)) == pytest.approx(best, rel=0.2)


def test_positions_that_are_infinite_say_nothing_about_channels() -> None:
    array = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    plain, broken = equalize.Channels(1), equalize.Channels(1)
    plain.update(array)
    hole = np.array([np.inf, 0, np.nan], np.float32).reshape(1, 3, 1)
    broken.update(np.concatenate([array, np.broadcast_to(hole, (2, 3, 4))], axis=2))
    for name in ("low", "high", "mean", "power"):
        np.testing.assert_allclose(getattr(broken, name), getattr(plain, name), rtol=1e-6)
