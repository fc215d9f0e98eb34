"""Resize that repeats pixels: found by the specification, checked with the runtime, and the same by copying."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.graph import replace
from onnxslim.upsample import by_copying, repeats

IMAGE = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
COORDINATES = ("asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resize(
    opset: int = 19,
    *,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
    shape: tuple[int | str, ...] = IMAGE.shape,
    **attributes: object,
) -> ir.Model:
    constants = [
        numpy_helper.from_array(np.array(a, np.float32), n) for n, a in (("none", []), ("scales", scales or []))
    ]
    if sizes:
        constants.append(numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))
    node = helper.make_node("Resize", ["x", "none", "scales", "sizes"][: 4 if sizes else 3], ["y"], **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants,
    )  # fmt: skip
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def by_hand(times: tuple[int, int]) -> np.ndarray:
    return IMAGE.repeat(times[0], 2).repeat(times[1], 3)


@pytest.mark.parametrize(("coordinates", "rounding"), itertools.product(COORDINATES, ROUNDINGS))
@pytest.mark.parametrize("times", [(2, 2), (3, 1), (1, 4), (5, 8)])
def test_what_repeats_is_what_the_runtime_repeats(coordinates: str, rounding: str, times: tuple[int, int]) -> None:
    model = resize(scales=[1, 1, *times], coordinate_transformation_mode=coordinates, nearest_mode=rounding)
    found = repeats(model.graph[0])
    assert found in (times, None)
    same = np.array_equal(runtime.load(model)({"x": IMAGE})["y"], by_hand(times))
    assert (found == times) == same or (coordinates == "align_corners" and found is None)


def test_the_coordinates_of_opset_11() -> None:
    for rounding in ROUNDINGS:
        mode = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": rounding}
        model = resize(11, scales=[1, 1, 2, 3], **mode)
        assert (repeats(model.graph[0]) is not None) == (rounding == "floor")
        same = np.array_equal(runtime.load(model)({"x": IMAGE})["y"], by_hand((2, 3)))
        assert same or repeats(model.graph[0]) is None


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": [2, 3, 8, 15]},
        {"sizes": [15, 8], "axes": [3, 2]},
        {"scales": [3, 2], "axes": [-1, 2]},
        {"sizes": [8, 15], "axes": [2, 3], "shape": ("n", 3, 4, 5)},
    ],
)
def test_how_the_factors_are_told(options: dict[str, list[int]]) -> None:
    model = resize(**options)  # type: ignore[arg-type]
    assert repeats(model.graph[0]) == (2, 3)
    np.testing.assert_array_equal(runtime.load(model)({"x": IMAGE})["y"], by_hand((2, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {"scales": [1, 1, 1.5, 2]},
        {"scales": [1, 1, 0.5, 1]},
        {"scales": [1, 2, 2, 2]},
        {"scales": [1, 1, 1, 1]},
        {"sizes": [2, 3, 9, 10]},
        {"sizes": [2, 3, 8, 15], "shape": (2, 3, "h", 5)},
        {"scales": [1, 1, 2, 2], "shape": (2, "c", 4, 5)},
        {"scales": [1, 1, 2, 2], "mode": "linear"},
        {"sizes": [8, 15], "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"},
    ],
)
def test_other_resizes_do_not_repeat(options: dict[str, object]) -> None:
    assert repeats(resize(**options).graph[0]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [(2, 2), (3, 1), (1, 4), (5, 8)])
@pytest.mark.parametrize("shape", [IMAGE.shape, ("n", 3, 4, "w"), ("n", 3, "h", 5), ("n", 3, "h", "w")])
def test_copies_are_the_same(shape: tuple[int | str, ...], times: tuple[int, int]) -> None:
    model = resize(scales=[1, 1, *times], shape=shape)
    node = model.graph[0]
    copied = by_copying(model.graph, model.graph.inputs[0], times, node, "up")
    replace(node.outputs[0], copied)
    model.graph.remove(node, safe=True)
    found = runtime.load(model)({"x": IMAGE})
    np.testing.assert_array_equal(next(iter(found.values())), by_hand(times))
