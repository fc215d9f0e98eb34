"""`repair_qdq`: every planted defect is repaired, and the model then computes on integers what its file said."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim import data, integer, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.passes.repair_qdq import RepairQdq

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import tiny_proto
from qdq_nets import DEFECTS, OPS, PLANTED, feed, gap, group, outputs, planted


def repair(proto: onnx.ModelProto, op: str, synthetic: bool = False) -> tuple[onnx.ModelProto, Outcome]:
    """A repaired copy."""
    model = model_io.load(proto)
    samples = data.open_data([feed(op, k) for k in range(6)], data.input_specs(model))
    outcome = RepairQdq().apply(model, Context(calibration=samples, synthetic=synthetic, threads=1))
    repaired = model_io.to_proto(model)
    onnx.checker.check_model(repaired, full_check=True)
    return repaired, outcome


def distance(one: onnx.ModelProto, other: onnx.ModelProto, op: str, optimized: tuple[bool, bool]) -> float:
    """`gap` between two models, each with or without the integer kernels of the runtime."""
    return gap(*(outputs(p, op, optimize=o, seed=99) for p, o in zip((one, other), optimized, strict=True)))


@pytest.mark.parametrize(("op", "defect"), PLANTED)
def test_every_planted_defect_is_repaired(op: str, defect: str) -> None:
    proto = planted(op, defect)
    repaired, outcome = repair(proto, op)
    assert outcome.stats["rules_repaired"] == outcome.stats["rules_found"]
    assert DEFECTS[defect][0] in outcome.stats["rules_found"]
    assert outcome.stats["integer_macs_fraction"] == 1
    proof = integer.prove(model_io.load(repaired))
    assert proof.fraction == 1
    assert not proof.wrong
    if defect != "wrong axis named":  # there, the file does not say what was meant
        assert distance(proto, repaired, op, (False, True)) < 0.03


@pytest.mark.parametrize("op", OPS)
def test_a_wrongly_named_axis_is_told_from_wrong_scales(op: str) -> None:
    """The integers fill their range along the axis that the scales belong to."""
    proto = planted(op, "wrong axis named")
    repaired, _ = repair(proto, op)
    assert distance(group(op), repaired, op, (False, True)) < 0.005
    assert distance(proto, repaired, op, (False, False)) > 0.05


@pytest.mark.parametrize("op", OPS)
def test_u8_from_s8_changes_no_value(op: str) -> None:
    proto = planted(op, "s8 with two readers")
    repaired, _ = repair(proto, op)
    assert distance(proto, repaired, op, (False, False)) < 1e-6


def test_parameters_shared_through_moves_and_biases_follow() -> None:
    """Behind the Relu the values move, and the next layer's bias has a scale made of the old one."""
    proto = group("Conv", storage=np.int8, zero_point=0, copies=2)
    pooled = onnx.ModelProto()
    pooled.CopyFrom(proto)
    nodes = pooled.graph.node
    index = next(k for k, n in enumerate(nodes) if n.name == "layer1")
    nodes[index].input[0] = "pooled_d"
    constants = ["y0_s", "y0_z"]
    nodes.insert(index, onnx.helper.make_node("MaxPool", ["d1"], ["pooled"], kernel_shape=[2, 2]))
    nodes.insert(index + 1, onnx.helper.make_node("QuantizeLinear", ["pooled", *constants], ["pooled_q"]))
    nodes.insert(index + 2, onnx.helper.make_node("DequantizeLinear", ["pooled_q", *constants], ["pooled_d"]))
    repaired, outcome = repair(pooled, "Conv")
    assert outcome.stats["integer_macs_fraction"] == 1
    ops = [n.op_type for n in runtime.optimized(model_io.load(repaired)).graph]
    assert "NhwcMaxPool" in ops
    assert ops.count("DequantizeLinear") == 1
    assert distance(pooled, repaired, "Conv", (False, True)) < 0.02


def test_without_data_no_range_is_guessed() -> None:
    proto = group("Conv", store=False)
    repaired, outcome = repair(proto, "Conv", synthetic=True)
    assert outcome.stats["repaired"] == 0
    (skip,) = outcome.skipped
    assert skip.node == "layer0"
    assert "no calibration data" in skip.reason
    assert distance(proto, repaired, "Conv", (True, True)) == 0


@pytest.mark.parametrize("op", OPS)
def test_a_sound_model_stays_as_it_is(op: str) -> None:
    proto = group(op)
    model = model_io.load(proto)
    repaired, outcome = repair(proto, op)
    assert outcome.stats["found"] == 0
    assert len(repaired.graph.node) == len(list(model.graph))
    assert distance(proto, repaired, op, (True, True)) == 0


@pytest.mark.parametrize("op, defect", [("Gemm", "float bias without Q"), ("MatMul", "row behind a MatMul")])
def test_a_bias_that_32_bits_do_not_hold_stays(op: str, defect: str) -> None:
    """The weights of one channel are almost zero, and so is the scale that its bias would need."""
    proto = planted(op, defect)
    scale = next(t for t in proto.graph.initializer if t.name == "w0_s")
    scales = onnx.numpy_helper.to_array(scale).copy()
    scales[3] = 1e-12
    scale.CopyFrom(onnx.numpy_helper.from_array(scales, "w0_s"))
    repaired, outcome = repair(proto, op)
    assert outcome.stats["repaired"] == 0
    assert ["does not fit in 32 bits" in skip.reason for skip in outcome.skipped] == [True]
    assert distance(proto, repaired, op, (False, True)) < 0.005


def test_readers_in_a_branch_are_no_reason_to_fail() -> None:
    """The result is stored inside an If only; and behind another, where a Relu follows, with a scale per channel."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 32, 6, 6] x, bool p) => (float[1, 32, 6, 6] y, float[1, 32, 6, 6] z) {
            q = QuantizeLinear(x, s, zero) d = DequantizeLinear(q, s, zero) w = DequantizeLinear(wq, s, wzero)
            z = Conv <pads=[1, 1, 1, 1]> (d, w)
            y = If (p) <
                then_branch = t () => (float[1, 32, 6, 6] a) {
                    e = QuantizeLinear(z, s, zero) a = DequantizeLinear(e, s, zero) },
                else_branch = f () => (float[1, 32, 6, 6] b) { b = Neg(z) }
            > }"""
    proto = onnx.parser.parse_model(text)
    weights = {"s": np.float32(0.1), "zero": np.uint8(128), "wzero": np.int8(0)}
    weights["wq"] = np.random.default_rng(0).integers(-9, 9, (32, 32, 3, 3)).astype(np.int8)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    model = model_io.load(proto)
    given = [{**feed("Conv", k), "p": np.array(True)} for k in range(2)]
    outcome = RepairQdq().apply(model, Context(calibration=data.open_data(given, data.input_specs(model)), threads=1))
    assert outcome.stats["repaired"] == 0
    want, got = (runtime.load(m)(given[0]) for m in (proto.SerializeToString(), model))
    assert gap(want, got) < 0.01


def test_a_model_that_does_not_load_is_left_with_the_reason() -> None:
    proto = group("Gemm")
    proto.graph.node.append(onnx.helper.make_node("Odd", ["y"], ["odd"], domain="nobody"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("odd", onnx.TensorProto.FLOAT, None))
    proto.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    model = model_io.load(proto)
    samples = data.open_data([feed("Gemm")], data.input_specs(model))
    outcome = RepairQdq().apply(model, Context(calibration=samples, threads=1))
    assert outcome.stats == {"found": 0, "repaired": 0}
    assert "cannot be seen" in outcome.skipped[0].reason and "Odd" in outcome.skipped[0].reason


def test_a_float_model_stays_as_it_is() -> None:
    repaired, outcome = repair_tiny()
    assert repaired.SerializeToString() == model_io.to_proto(model_io.load(tiny_proto())).SerializeToString()
    assert "no DequantizeLinear" in outcome.skipped[0].reason


def repair_tiny() -> tuple[onnx.ModelProto, Outcome]:
    model = model_io.load(tiny_proto())
    x = {"x": np.zeros((1, 2, 8, 8), np.float32)}
    outcome = RepairQdq().apply(model, Context(calibration=data.open_data([x], data.input_specs(model))))
    return model_io.to_proto(model), outcome
