"""The one view of linear operators: its matrix and bias compute what the operator computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from oracles import run
from strategies import Builder, batchnorm, conv, conv_transpose, gemm, matmul

from onnxslim import model as model_io
from onnxslim.linear import along, float64, view

SHAPES = st.sampled_from([(4, 5, 6), (3, 7), (5,), (4, 4, 4)])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data())
def test_matrix_and_bias_compute_the_operator(data: st.DataObject) -> None:
    b = Builder(data.draw, symbolic=False)
    template = b.pick(conv, conv_transpose, gemm, matmul, batchnorm)
    y = template(b, b.input(data.draw(SHAPES)))
    assume(y is not None)
    assert y is not None
    proto, feeds = b.finish([y])
    model = model_io.load(proto)
    node = next(n for n in model.graph if n.op_type == b.nodes[-1].op_type)
    linear = view(node)
    assert linear is not None
    weight = float64(linear.w)
    matrix, bias = linear.matrix(weight), linear.bias_vector(float64)
    np.testing.assert_array_equal(linear.layout(matrix), weight)
    assert matrix.shape[0] * matrix.shape[1] == linear.outputs
    assert matrix.shape[0] * matrix.shape[2] == linear.inputs
    # A constant input sees the sum of all taps wherever no padding is in reach.
    if bias is None or not linear.uniform:
        return
    level = np.linspace(-1, 2, linear.inputs)
    x = next(iter(feeds))
    shape = [1] * feeds[x].ndim
    shape[linear.in_axis] = linear.inputs
    filled = np.broadcast_to(level.reshape(shape), feeds[x].shape).astype(np.float32)
    got = run(proto, {x: filled})[y.name]
    sums = np.einsum("goik,gi->go", matrix, level.reshape(linear.groups, -1)).reshape(-1)
    expected = linear.gain * sums + bias
    np.testing.assert_allclose(
        np.moveaxis(got, linear.out_axis, -1), np.broadcast_to(expected, np.moveaxis(got, linear.out_axis, -1).shape),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_along_accepts_what_varies_along_one_axis_alone() -> None:
    channel = np.arange(3.0)
    np.testing.assert_array_equal(along(channel.reshape(3, 1), -2, 3, 4), channel)
    np.testing.assert_array_equal(along(channel.reshape(1, 3, 1), -2, 3, 4), channel)
    np.testing.assert_array_equal(along(np.array(2.0), -2, 3, 4), [2, 2, 2])
    assert along(channel, -2, 3, 4) is None
    assert along(channel.reshape(3, 1, 1), -2, 3, 4) is None
    assert along(np.ones((3, 3)), -2, 3, 4) is None
    assert along(channel.reshape(1, 1, 3, 1), -2, 3, 3) is None
    assert along(np.ones((1, 1)), -1, 3, 1) is None
    assert along(channel.reshape(3, 1), -2, 1, 4) is None
