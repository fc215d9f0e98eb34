"""`profiles` and what `int8` makes for each: where the pairs stand and how numbers are stored."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim import data, pipeline, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.graph import constant
from onnxslim.passes.int8 import Int8
from onnxslim.profiles import CPU, PROFILES, REFUSED
from onnxslim.quantization import dequantize, may_saturate, quantize
from onnxslim.saturation import neighbours

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from test_int8 import error, kernels, residual, samples


@pytest.mark.parametrize("name", PROFILES)
@given(low=st.floats(-100, 100), high=st.floats(-100, 100))
def test_ranges_are_covered_and_zero_is_exact(name: str, low: float, high: float) -> None:
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    params = PROFILES[name].params(low, high)
    assert params.zero_point.dtype == (np.int8 if PROFILES[name].signed else np.uint8)
    values = np.array([low, high, 0.0])
    back = dequantize(quantize(values, params), params)
    assert np.abs(back - values).max() <= float(params.scale) * 0.501 + 1e-6
    assert back[2] == 0
    if PROFILES[name].symmetric:
        assert params.zero_point == 0


def test_signed_and_unsigned_store_the_same_numbers() -> None:
    values = np.linspace(-3, 5, 200)
    results = [dequantize(quantize(values, p), p) for p in (PROFILES[n].params(-3, 5) for n in ("cpu", "cpu-arm"))]
    np.testing.assert_array_equal(*results)


def apply(model: ir.Model, item: Int8, target: str = "cpu") -> tuple[ir.Model, Outcome, list[str]]:
    draft = model.clone()
    given = data.open_data(samples((2, 8, 12, 12)), data.input_specs(model))
    ctx = Context(calibration=given, threads=1, target=target)
    outcome = item.apply(draft, ctx)
    return draft, outcome, ctx.warnings


def pairs(model: ir.Model) -> dict[str, list[str]]:
    """What stands in front of every QuantizeLinear and behind every DequantizeLinear of an activation."""
    stored = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    read = [n for n in model.graph if n.op_type == "DequantizeLinear" and constant(n.inputs[0]) is None]
    return {
        "from": [p.op_type if (p := n.inputs[0].producer()) else "input" for n in stored],  # type: ignore[union-attr]
        "to": sorted(use.node.op_type for n in read for use in n.outputs[0].uses()),
    }


def zeros(model: ir.Model) -> list[np.ndarray]:
    """Zero points of the activations."""
    found = [constant(n.inputs[2]) for n in model.graph if n.op_type == "QuantizeLinear"]
    return [z for z in found if z is not None]


def test_arm_stores_the_same_in_s8() -> None:
    model = residual()
    one, _, _ = apply(model, Int8(measure=False, portable=False))
    two, outcome, _ = apply(model, Int8(measure=False, target="cpu-arm"))
    assert pairs(one) == pairs(two)
    assert all(z.dtype == np.int8 for z in zeros(two))
    assert [int(a) - 128 for a in zeros(one)] == [int(b) for b in zeros(two)]
    feed = samples((2, 8, 12, 12))[0]
    results = [next(iter(runtime.load(m, optimize=False)(feed).values())) for m in (one, two)]
    np.testing.assert_array_equal(*results)
    assert ("integer_kernels" in outcome.stats) == PROFILES["cpu-arm"].here


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_pairs_in_front_of_products_only(target: str) -> None:
    model = residual()
    small, outcome, warnings = apply(model, Int8(fidelity=0.9, target=target), "cpu")
    assert outcome.stats["int8_layers"] == 4
    # The residual is read as it is stored, or the kernel that computes it could not store it.
    assert pairs(small)["to"] == ["Add", "Conv", "Conv", "Conv", "Gemm"]
    assert "Conv" not in pairs(small)["from"]  # what follows a product is merged into it
    assert [n.op_type for n in small.graph].count("Relu") == 3
    biases = [n.inputs[2] for n in small.graph if n.op_type in ("Conv", "Gemm") and len(n.inputs) > 2]
    assert all(constant(b) is not None and constant(b).dtype == np.float32 for b in biases)  # type: ignore[union-attr]
    symmetric = target == "tensorrt"
    assert all((z.dtype == np.int8 and z == 0) == symmetric for z in zeros(small))
    assert error(model, small, samples((2, 8, 12, 12))[-1]) < 0.06
    if target not in runtime.PROVIDERS or not runtime.available(target):
        assert any("not measured" in line for line in warnings)


def test_the_target_of_the_run_is_taken() -> None:
    model = residual()
    one, _, _ = apply(model, Int8(measure=False), "openvino")
    two, _, _ = apply(model, Int8(measure=False, target="openvino"))
    assert model_io.to_bytes(one) == model_io.to_bytes(two)
    assert pairs(one) != pairs(apply(model, Int8(measure=False))[0])


def test_cuda_is_refused_with_the_alternatives() -> None:
    model = residual()
    small, outcome, _ = apply(model, Int8(target="cuda"))
    assert model_io.to_bytes(small) == model_io.to_bytes(model)
    assert {s.reason for s in outcome.skipped} == {REFUSED["cuda"]}
    assert "fp16" in REFUSED["cuda"]
    assert "int4" in REFUSED["cuda"]


@pytest.mark.parametrize("text", ["int8(target=cpu-arm)", "int8(target='cpu-arm', portable=true)"])
def test_names_with_hyphens_are_words(text: str) -> None:
    (item,) = pipeline.parse(text)
    assert isinstance(item, Int8)
    assert item.target == "cpu-arm"
    assert pipeline.parse(str(item)) == [item]


def of_one_sign() -> ir.Model:
    """Weights of "second" have one sign and inputs above zero add up; neighbours elsewhere have opposite signs."""
    model = residual()
    signs = {"w2": 1, "w1": (-1) ** np.arange(8), "w3": (-1) ** np.arange(32)}
    for value in model.graph.initializers.values():
        if value.name in signs:
            array = constant(value)
            assert array is not None
            even = np.full_like(array, 0.05) if value.name == "w2" else np.abs(array)
            turned = even * np.reshape(signs[value.name], (-1, 1, 1))
            value.const_value = ir.tensor(turned.astype(np.float32), name=value.name)
    return model


@pytest.mark.parametrize("target", PROFILES)
def test_smaller_weights_where_kernels_add_two_products_in_sixteen(target: str) -> None:
    _, outcome, _ = apply(of_one_sign(), Int8(measure=False, equalize=False, portable=True, target=target))
    assert ("second" in outcome.stats["narrowed"]) == (target in ("cpu", "openvino"))


def test_smaller_weights_only_where_sums_leave_sixteen() -> None:
    """Neighbours of opposite signs cancel and keep their 8 bits."""
    model = of_one_sign()
    _, first, warnings = apply(model, Int8(measure=False, equalize=False, portable=False))
    assert "second" in first.stats["saturating"]
    assert not {"first", "third"} & set(first.stats["saturating"])
    assert first.stats["narrowed"] == []
    assert any("VNNI" in line for line in warnings)
    safe, outcome, warnings = apply(model, Int8(measure=False, equalize=False, portable=True))
    assert not any("VNNI" in line for line in warnings)
    assert outcome.stats["narrowed"] == outcome.stats["saturating"] == first.stats["saturating"]
    for node in safe.graph:
        if node.name in ("first", "second", "third"):
            dq = node.inputs[1].producer()  # type: ignore[union-attr]
            stored = constant(dq.inputs[0])  # type: ignore[union-attr]
            assert stored is not None
            pairs = neighbours(node, stored.shape, 0)
            if node.name in outcome.stats["narrowed"]:
                assert not may_saturate(stored.reshape(len(stored), -1), pairs)
            else:
                assert np.abs(stored).max() == 127
    assert kernels(safe).count("QLinearConv") == 3
    assert error(model, safe, samples((2, 8, 12, 12))[-1]) < 0.06
    assert CPU.here
