"""Quantization parameters, weights and biases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim.quantization import (
    activation_params,
    bias_params,
    dequantize,
    may_saturate,
    quantize,
    store_weight,
    weight_params,
    widen_for_bias,
)

BOUND = st.floats(-1e6, 1e6, width=32)


@given(BOUND, BOUND)
def test_activations_keep_zero_and_the_range(a: float, b: float) -> None:
    low, high = sorted((a, b))
    params = activation_params(low, high)
    assert dequantize(quantize(np.zeros(1, np.float32), params), params) == 0
    step = float(params.scale)
    assert params.low <= min(low, 0) + step
    assert params.high >= max(high, 0) - step
    inside = np.linspace(low, high, 50)
    assert np.abs(dequantize(quantize(inside, params), params) - inside).max() <= step * 1.0001


def test_a_range_from_zero_is_a_relu() -> None:
    params = activation_params(0.0, 3.0)
    assert params.zero_point == 0
    assert (quantize(np.array([-5.0, -1e-3]), params) == 0).all()
    assert params.high == pytest.approx(3.0)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)])
def test_refuses_what_is_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="not a range"):
        activation_params(low, high)


@settings(max_examples=50)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_weights_are_symmetric_and_close(weight: np.ndarray, axis: int, per_channel: bool) -> None:
    params = weight_params(weight, axis, per_channel=per_channel)
    stored = store_weight(weight, axis, params)
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    assert (params.zero_point == 0).all()
    assert params.scale.shape == ((weight.shape[axis],) if per_channel else ())
    # Never worse than plain rounding over the whole range.
    over = 1 - axis if per_channel else None
    peak = np.abs(weight).max(axis=over, keepdims=True).astype(np.float64)
    plain = np.where(peak > 1e-25, np.rint(weight / np.maximum(peak, 1e-25) * 127) * peak / 127, 0)
    error = np.square(dequantize(stored, params) - weight.astype(np.float64)).sum(axis=over)
    assert (error <= np.square(plain - weight).sum(axis=over) * 1.01 + 1e-9).all()


def test_channels_do_not_disturb_each_other() -> None:
    weight = np.array([[1000.0, -500.0], [0.001, 0.0005]], np.float32)
    back = dequantize(quantize(weight, weight_params(weight, 0)), weight_params(weight, 0))
    np.testing.assert_allclose(back, weight, rtol=0.01)


@settings(max_examples=50)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 9)), elements=st.floats(-100, 100, width=32)),
    st.booleans(),
)
def test_sums_of_pairs_fit_into_sixteen_bits(weight: np.ndarray, per_channel: bool) -> None:
    pairs = np.arange(weight.shape[1] // 2 * 2).reshape(-1, 2)[:, ::-1]
    params = weight_params(weight, 0, per_channel=per_channel, pairs=pairs)
    stored = store_weight(weight, 0, params, pairs)
    assert not may_saturate(stored, pairs)
    for inputs in ([0, 255], [255, 0], [255, 255]):
        sums = stored.astype(int)[:, pairs] @ np.array(inputs)
        assert np.iinfo(np.int16).min <= sums.min(initial=0)
        assert sums.max(initial=0) <= np.iinfo(np.int16).max


def test_limited_pairs_cost_less_than_a_bit() -> None:
    """Few pairs are large in both: most weights keep almost all of their steps."""
    weight = np.random.default_rng(0).standard_normal((16, 200)).astype(np.float32)
    pairs = np.arange(200).reshape(-1, 2)

    def error(pairs: np.ndarray | None) -> float:
        params = weight_params(weight, 0, pairs=pairs)
        return float(np.square(dequantize(store_weight(weight, 0, params, pairs), params) - weight).mean())

    assert error(pairs) < 2.5 * error(None), "7 bits have 4 times the error of 8"


def test_bias_has_the_scale_of_the_accumulator() -> None:
    weight = weight_params(np.array([[1.0], [2.0]], np.float32), 0)
    bias = np.array([3.0, -4.0], np.float32)
    params = bias_params(weight, np.float32(0.5), 2)
    np.testing.assert_allclose(params.scale, weight.scale * 0.5)
    stored = quantize(bias, params)
    assert stored.dtype == np.int32
    np.testing.assert_allclose(dequantize(stored, params), bias, atol=float(params.scale.max()))


def test_a_dead_channel_keeps_its_bias() -> None:
    weight = np.array([[1e-20], [1.0]], np.float32)
    bias = np.array([5.0, 5.0], np.float32)
    params = widen_for_bias(weight_params(weight, 0), bias, 0.01)
    stored = bias_params(params, np.float32(0.01), 2)
    np.testing.assert_allclose(dequantize(quantize(bias, stored), stored), bias, rtol=1e-3)
    assert params.scale[1] == weight_params(weight, 0).scale[1]


def test_scales_of_zeros_do_not_vanish() -> None:
    weight = weight_params(np.zeros((2, 3), np.float32), 0)
    params = bias_params(weight, activation_params(0.0, 0.0).scale, 2)
    assert (params.scale > np.finfo(np.float32).tiny).all()
    assert (quantize(np.zeros(2, np.float32), params) == 0).all()
