"""Pad into convolutions and pools."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import fold, net, node, normal, reasons
from oracles import operators


def padded(
    op: str,
    amounts: Sequence[int],
    fill: float | None = None,
    *,
    relu: bool = False,
    mode: str = "constant",
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    parts: dict[str, np.ndarray] = {"pads": np.array(amounts, np.int64)}
    nodes = [node("Relu", "x", "r")] if relu else []
    if fill is not None:
        parts["fill"] = np.float32(fill)
    nodes.append(node("Pad", f"{'r' if relu else 'x'} pads{' fill' if fill is not None else ''}", "p", mode=mode))
    if op == "Conv":
        parts["w"] = normal(2, 3, 3, 3)
    else:
        attributes.setdefault("kernel_shape", [3, 3])
    nodes.append(node(op, "p w" if op == "Conv" else "p", **attributes))
    return net(nodes, {"x": [1, 3, 6, 5]}, parts), {"x": normal(1, 3, 6, 5) - 1}


SPATIAL = (0, 0, 1, 2, 0, 0, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "attributes", "folds"),
    [
        (("Conv", SPATIAL), {}, True),
        (("Conv", SPATIAL, 0.0), {"pads": [1, 0, 0, 2], "strides": [2, 1], "dilations": [1, 2]}, True),
        (("Conv", SPATIAL), {"auto_pad": "VALID"}, True),
        (("Conv", SPATIAL), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, False),
        (("Conv", SPATIAL, 1.0), {}, False),
        (("Conv", (0, 0, 1, -1, 0, 0, 0, 1)), {}, False),
        (("Conv", (1, 0, 1, 1, 0, 0, 0, 1)), {}, False),
        (("AveragePool", SPATIAL), {}, True),
        (("AveragePool", SPATIAL), {"pads": [1, 0, 0, 0], "count_include_pad": 1}, False),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 0, 1)), {"pads": [1, 0, 0, 0], "count_include_pad": 1}, True),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 0, 1)), {"pads": [1, 0, 0, 0]}, False),
        (("AveragePool", SPATIAL, 2.0), {}, False),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 1, 1)), {"ceil_mode": 1, "strides": [2, 2]}, False),
        (("MaxPool", SPATIAL, -np.inf), {}, True),
        (("MaxPool", SPATIAL, float(np.finfo(np.float32).min)), {}, True),
        (("MaxPool", SPATIAL), {}, False),
        (("MaxPool", (0, 0, 3, 0, 0, 0, 0, 0), -np.inf), {}, False),
        (("MaxPool", (0, 0, 1, 1, 0, 0, 1, 1), -np.inf), {"ceil_mode": 1, "strides": [2, 2]}, False),
    ],
)
def test_pads(arguments: tuple[Any, ...], attributes: dict[str, Any], folds: bool) -> None:
    if arguments == ("AveragePool", SPATIAL) and attributes.get("pads"):
        attributes = {**attributes, "pads": [2, 0, 0, 0]}  # 1 + 2 rows of padding are as many as the window has
    model, feeds = padded(*arguments, **attributes)
    result = fold(model, feeds)
    assert ("Pad" not in operators(result)) == folds
    assert bool(reasons(model)) != folds


def test_zeros_never_win_against_the_result_of_a_relu() -> None:
    model, feeds = padded("MaxPool", SPATIAL, relu=True)
    assert operators(fold(model, feeds)) == ["Relu", "MaxPool"]
    model, feeds = padded("MaxPool", SPATIAL, 0.5, relu=True)
    assert operators(fold(model, feeds)) == ["Relu", "Pad", "MaxPool"]


@pytest.mark.parametrize(("between", "folds"), [("Sigmoid", True), ("Neg", False), ("Relu", False)])
def test_windows_of_nothing_but_infinities_stay_what_they_are(between: str, folds: bool) -> None:
    parts = {"w": np.where(normal(1, 3, 6, 5) > 9, 0, -np.inf).astype(np.float32), "pads": np.array(SPATIAL, np.int64)}
    parts["fill"] = np.float32(-np.inf)
    nodes = [node("Mul", "x w", "h"), node(between, "h", "b"), node("Pad", "b pads fill", "p")]
    nodes.append(node("MaxPool", "p", kernel_shape=[3, 3]))
    model = net(nodes, {"x": [1, 3, 6, 5]}, parts)
    assert ("Pad" not in operators(fold(model, {"x": np.abs(normal(1, 3, 6, 5)) + 1}))) == folds


def test_indices_of_a_maximum_count_padded_elements() -> None:
    model, feeds = padded("MaxPool", SPATIAL, -np.inf)
    model.graph.node[-1].output.append("indices")
    model.graph.output.append(helper.make_tensor_value_info("indices", TensorProto.INT64, None))
    assert operators(fold(model, feeds)) == ["Pad", "MaxPool"]


def test_other_modes_of_pad_stay() -> None:
    for mode in ("edge", "reflect"):
        model, feeds = padded("Conv", SPATIAL, mode=mode)
        assert operators(fold(model, feeds)) == ["Pad", "Conv"]


def test_a_padded_value_that_others_read_stays() -> None:
    model, feeds = padded("Conv", SPATIAL)
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    assert operators(fold(model, feeds)) == ["Pad", "Conv"]


def test_pads_by_axes_and_pads_of_old_operator_sets() -> None:
    parts = {"pads": np.array([1, 2], np.int64), "axes": np.array([-1], np.int64), "w": normal(2, 3, 2)}
    new = net(
        [node("Pad", "x pads  axes".replace("  ", " none "), "p"), node("Conv", "p w")],
        {"x": [1, 3, 5]},
        parts,
        opset=18,
    )
    new.graph.node[0].input[2] = ""
    result = fold(new, {"x": normal(1, 3, 5)})
    assert operators(result) == ["Conv"]
    old = net(
        [node("Pad", "x", "p", pads=[0, 0, 1, 0, 0, 2], value=0.0), node("Conv", "p w")],
        {"x": [1, 3, 5]},
        {"w": normal(2, 3, 2)},
        opset=10,
    )
    assert operators(fold(old, {"x": normal(1, 3, 5)})) == ["Conv"]


def test_axes_of_an_input_whose_rank_is_unknown_stay() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]> g (float[1, 3, 4, 5] x, int64[k] s) => (float[a, b, c, d] y) {
            r = Reshape(x, s)
            p = Pad(r, pads, , axes)
            y = Conv(p, w)
        }"""
    )
    weights = {
        "pads": np.array([0, 0, 1, 0, 0, 1], np.int64),
        "axes": np.array([-3, -2, -1], np.int64),
        "w": normal(2, 3, 2, 2),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    result = fold(proto, {"x": normal(1, 3, 4, 5), "s": np.array([1, 3, 4, 5], np.int64)})
    assert operators(result) == ["Reshape", "Pad", "Conv"]


def test_a_window_with_gaps_may_lie_in_the_padding_alone() -> None:
    # Taps at -1 and 1 of a tensor of one element: the maximum is the zero of the Pad.
    parts = {"pads": np.array([0, 0, 1, 0, 0, 1])}
    nodes = [node("Relu", "x", "r"), node("Pad", "r pads", "p"), node("MaxPool", "p", kernel_shape=[2], dilations=[2])]
    model = net(nodes, {"x": [1, 1, 1]}, parts)
    assert operators(fold(model, {"x": normal(1, 1, 1)})) == ["Relu", "Pad", "MaxPool"]


def test_a_padded_weight_stays() -> None:
    nodes = [node("Pad", "v pads", "w"), node("Conv", "x w")]
    model = net(nodes, {"x": [1, 3, 6], "v": [2, 3, 2]}, {"pads": np.array([0, 0, 1, 0, 0, 1])})
    assert operators(fold(model, {"x": normal(1, 3, 6), "v": normal(2, 3, 2)})) == ["Pad", "Conv"]


def test_amounts_and_values_of_run_time_stay() -> None:
    nodes = [node("Pad", "x pads fill", "p"), node("Conv", "p w")]
    arrays = {"pads": np.array([0, 0, 1, 0, 0, 1]), "fill": np.array(0.5, np.float32)}
    for name in arrays:
        model = net(nodes, {"x": [1, 3, 6]}, {"w": normal(2, 3, 2), **{n: a for n, a in arrays.items() if n != name}})
        kind = onnx.TensorProto.INT64 if name == "pads" else onnx.TensorProto.FLOAT
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, arrays[name].shape))
        assert operators(fold(model, {"x": normal(1, 3, 6), name: arrays[name]})) == ["Pad", "Conv"]


def test_indices_that_are_read_count_padded_elements() -> None:
    nodes = [
        node("Relu", "x", "r"),
        node("Pad", "r pads", "p"),
        node("MaxPool", "p", "y i", kernel_shape=[3]),
        node("Abs", "i", "z"),
    ]
    model = net(nodes, {"x": [1, 1, 6]}, {"pads": np.array([0, 0, 1, 0, 0, 1])}, ("y", "z"))
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    assert operators(fold(model, {"x": normal(1, 1, 6)})) == operators(model)


@pytest.mark.parametrize(("low", "folds"), [(0.5, True), (0.0, True), (-1.0, False), (None, False)])
@pytest.mark.parametrize("opset", [10, 17])
def test_the_lower_bound_of_clip_decides_whether_zeros_win(low: float | None, folds: bool, opset: int) -> None:
    amounts = [0, 0, 1, 0, 0, 1]
    if opset == 10:
        parts = {}
        clip = node("Clip", "x", "c", **({} if low is None else {"min": low}))
        pad = node("Pad", "c", "p", pads=amounts)
    else:
        parts = {"pads": np.array(amounts), **({} if low is None else {"low": np.float32(low)})}
        clip, pad = node("Clip", "x" if low is None else "x low", "c"), node("Pad", "c pads", "p")
    model = net([clip, pad, node("MaxPool", "p", kernel_shape=[3])], {"x": [1, 1, 6]}, parts, opset=opset)
    assert ("Pad" not in operators(fold(model, {"x": normal(1, 1, 6) - 2}))) == folds
