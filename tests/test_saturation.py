"""`saturation`: the sums of two products that kernels without VNNI keep in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.quantization import QParams, activation_params
from onnxslim.saturation import LIMIT, overflowing, saturates_here
from onnxslim.units import find_units, name_nodes


def build(op: str, weight: np.ndarray, shape: list[int], **attributes: object) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def check(model: ir.Model, stored: np.ndarray, axis: int, x: np.ndarray) -> list[str]:
    """Layers that overflow when ``x`` is stored in steps of 1 from 0."""
    name_nodes(model)
    units, _ = find_units(model)
    params = {"layer": activation_params(0, 255)}
    weights = {"layer": (stored, QParams(np.ones(stored.shape[axis], np.float32), np.zeros(1, np.int8), axis))}
    samples = data.open_data([{"x": x}], data.input_specs(model))
    return overflowing(model, units, weights, params, Context(calibration=samples, threads=1), samples)


# Two weights of 100 that meet inputs of 255 leave 16 bits; they do where they are neighbours in the kernel's order.
@pytest.mark.parametrize(("places", "overflows"), [((0, 1), True), ((1, 2), False), ((0, 2), False), ((2, 3), True)])
def test_neighbouring_rows_of_a_matrix(places: tuple[int, int], overflows: bool) -> None:
    stored = np.zeros((8, 4), np.int8)
    stored[list(places), 2] = 100
    model = build("MatMul", stored.astype(np.float32), [3, 8])
    assert check(model, stored, 1, np.full((3, 8), 255, np.float32)) == ["layer"] * overflows


def test_what_inputs_do_not_reach_does_not_overflow() -> None:
    stored = np.full((8, 4), 127, np.int8)
    model = build("MatMul", stored.astype(np.float32), [3, 8])
    largest = LIMIT // (2 * 127)
    assert check(model, stored, 1, np.full((3, 8), largest, np.float32)) == []
    assert check(model, stored, 1, np.full((3, 8), largest + 1, np.float32)) == ["layer"]


def test_whether_this_machine_saturates_is_seen_in_a_product() -> None:
    """`overflowing` and the probe must agree with what a larger product does here."""
    stored = np.full((32, 24), 127, np.int8)
    model = build("MatMulInteger", stored, [16, 32])
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.UINT8)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    found = runtime.load(model, threads=1)({"x": np.full((16, 32), 255, np.uint8)})["y"]
    assert saturates_here() == bool((found != 32 * 255 * 127).any())
    assert found[0, 0] in (32 * 255 * 127, 16 * LIMIT), "two products are added in 16 bits or in 32"


def test_opposite_signs_cancel() -> None:
    stored = np.tile(np.array([[127], [-127]], np.int8), (4, 4))
    model = build("MatMul", stored.astype(np.float32), [3, 8])
    assert check(model, stored, 1, np.full((3, 8), 255, np.float32)) == []


@pytest.mark.parametrize(("axis", "overflows"), [(1, True), (2, False), (3, False)])
def test_neighbours_in_a_convolution_are_channels(axis: int, overflows: bool) -> None:
    stored = np.zeros((4, 4, 2, 2), np.int8)
    first, second = [0, 0, 0, 0], [0, 0, 0, 0]
    second[axis] = 1
    stored[tuple(first)] = stored[tuple(second)] = 100
    model = build("Conv", stored.astype(np.float32), [1, 4, 5, 5])
    assert check(model, stored, 0, np.full((1, 4, 5, 5), 255, np.float32)) == ["layer"] * overflows


def test_depthwise_convolutions_have_other_kernels() -> None:
    stored = np.full((4, 1, 3, 3), 127, np.int8)
    model = build("Conv", stored.astype(np.float32), [1, 4, 5, 5], group=4)
    assert check(model, stored, 0, np.full((1, 4, 5, 5), 255, np.float32)) == []


def test_two_filters_per_channel_have_no_kernel_of_their_own() -> None:
    stored = np.full((8, 1, 3, 3), 127, np.int8)
    model = build("Conv", stored.astype(np.float32), [1, 4, 5, 5], group=4)
    assert check(model, stored, 0, np.full((1, 4, 5, 5), 255, np.float32)) == ["layer"]
