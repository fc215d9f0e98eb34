"""`blockwise`, `int4` and `int8_weights`: smaller weights that run as MatMulNBits, rounded for the inputs seen."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.blockwise import Format, Inputs, dequantize, quantize
from onnxslim.contract import Context, Outcome
from onnxslim.errors import UsageError
from onnxslim.graph import opset
from onnxslim.passes.int4 import Int4
from onnxslim.passes.int8_weights import Int8Weights

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_proto

RNG = np.random.default_rng(0)
WIDE = 96


def decoder(opset: int = 17, layers: int = 2) -> onnx.ModelProto:
    """MatMul, row, Relu, Gemm with a transposed weight, over and over: ``x`` (n, 96) to ``y``."""
    nodes, weights, last = [], {}, "x"
    for k in range(layers):
        weights |= {f"w{k}": RNG.standard_normal((WIDE, 160)) / 10, f"r{k}": RNG.standard_normal(160)}
        weights |= {f"g{k}": RNG.standard_normal((WIDE, 160)) / 12, f"b{k}": RNG.standard_normal(WIDE)}
        nodes += [
            helper.make_node("MatMul", [last, f"w{k}"], [f"m{k}"], name=f"matmul{k}"),
            helper.make_node("Add", [f"m{k}", f"r{k}"], [f"a{k}"]),
            helper.make_node("Relu", [f"a{k}"], [f"h{k}"]),
            helper.make_node("Gemm", [f"h{k}", f"g{k}", f"b{k}"], [f"y{k}"], name=f"gemm{k}", transB=1),
        ]
        last = f"y{k}"
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    nodes.append(helper.make_node("ReduceMean", [last], ["mean"], axes=[1], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDE])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in ("y", "mean")],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feeds(count: int = 8) -> list[dict[str, np.ndarray]]:
    """Inputs of few directions, as those of real layers are."""
    mix = np.random.default_rng(5).standard_normal((6, WIDE))
    draws = [np.random.default_rng(k).standard_normal((32, 6)) @ mix for k in range(count)]
    return [{"x": d.astype(np.float32)} for d in draws]


def apply(proto: onnx.ModelProto, item: Int4 | Int8Weights, synthetic: bool = False) -> tuple[ir.Model, Outcome]:
    model = model_io.load(proto)
    samples = data.open_data(feeds(), data.input_specs(model))
    outcome = item.apply(model, Context(calibration=samples, synthetic=synthetic, threads=1))
    onnx.checker.check_model(model_io.to_proto(model), full_check=True)
    return model, outcome


def gap(proto: onnx.ModelProto, model: ir.Model, output: str = "y", optimize: bool = True) -> float:
    one = runtime.load(proto.SerializeToString())(feeds(9)[-1])[output]
    two = runtime.load(model, optimize=optimize)(feeds(9)[-1])[output]
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 5)), elements=st.floats(-8, 8, width=32)),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32]),
)
def test_no_weight_is_off_by_more_than_its_block_allows(weight: np.ndarray, bits: int, block: int) -> None:
    form = Format(bits, block)
    stored, scales, zeros = quantize(weight, form)
    back = dequantize(stored, scales, zeros, form)
    for k in range(0, len(weight), block):
        part = weight[k : k + block]
        span = np.maximum(part.max(0), 0) - np.minimum(part.min(0), 0)
        # A shrunken range is taken only where the whole block gains: never worse than its plain rounding.
        plain = len(part) * np.square(span / form.top / 2 * 2)
        assert (np.square(back[k : k + block] - part).sum(0) <= plain + 1e-9).all()


def test_zero_is_stored_exactly() -> None:
    weight = RNG.standard_normal((64, 8)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.5] = 0
    form = Format(4, 32)
    assert (dequantize(*quantize(weight, form), form)[weight == 0] == 0).all()


def test_rounding_for_the_inputs_is_never_worse_for_them() -> None:
    weight = RNG.standard_normal((96, 40)).astype(np.float32)
    x = np.concatenate([f["x"] for f in feeds()])
    form = Format(4, 32)
    moments = (x.T @ x / len(x)).astype(np.float64)
    errors = [
        float(np.square(x @ (dequantize(*quantize(weight, form, given), form) - weight)).sum())
        for given in (None, Inputs(moments))
    ]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("opset", [12, 17, 21])
@pytest.mark.parametrize("item", [Int4(), Int8Weights(), Int4(block=64)])
def test_every_layer_becomes_one_kernel(opset: int, item: Int4 | Int8Weights) -> None:
    proto = decoder(opset if opset < 18 else 17)
    if opset > 17:
        proto = onnx.version_converter.convert_version(proto, opset)
    model, outcome = apply(proto, item)
    ops = [n.op_type for n in runtime.optimized(model).graph]
    assert ops.count("MatMulNBits") == 4 == outcome.stats["stored"]
    assert "DequantizeLinear" not in ops
    # Behind a Relu, ONNX Runtime merges a Gemm with it first: such a layer is written as MatMulNBits.
    assert outcome.stats["merged_at_load"] == [n.op_type for n in model.graph].count("DequantizeLinear") == 2
    bits = 4 if isinstance(item, Int4) else 8
    assert model_io.weight_bytes(model) < (bits / 32 + 0.06) * model_io.weight_bytes(model_io.load(proto))
    assert gap(proto, model) < (0.2 if bits == 4 else 0.03)


def test_data_round_better_than_none() -> None:
    proto = decoder()
    gaps = [gap(proto, apply(proto, Int4(), synthetic)[0], optimize=False) for synthetic in (False, True)]
    assert gaps[0] < 0.7 * gaps[1]


def test_shared_weights_are_stored_once() -> None:
    proto = decoder(layers=1)
    node = helper.make_node("MatMul", ["x", "w0"], ["again"], name="again")
    proto.graph.node.append(node)
    proto.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["n", 160]))
    model, outcome = apply(proto, Int4())
    assert outcome.stats["stored"] == 3
    # ONNX Runtime does not merge a weight that two layers read: it is written as MatMulNBits takes it, once.
    shapes = [tuple(v.shape or ()) for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert shapes.count((160, 3, 16)) == 1
    assert [n.op_type for n in runtime.optimized(model).graph].count("MatMulNBits") == 3
    assert gap(proto, model, "again") < 0.2


def test_what_cannot_be_stored_is_named() -> None:
    model = model_io.load(tiny_proto())
    samples = data.open_data([{"x": np.zeros((1, 2, 8, 8), np.float32)}], data.input_specs(model))
    outcome = Int4().apply(model, Context(calibration=samples, threads=1))
    assert {s.node: s.reason for s in outcome.skipped} == {
        "conv": "Conv has no kernel for weights in blocks",
        "gemm": "its weight has fewer than 4096 elements",
    }
    assert opset(model) == 17  # nothing to store, nothing to raise
    _, outcome = apply(decoder(layers=1), Int4(keep=("gemm0",)))
    assert [(s.node, s.reason) for s in outcome.skipped] == [("gemm0", "asked to stay in float")]


def test_an_opset_that_cannot_be_raised() -> None:
    old = decoder(layers=1)
    old.opset_import[0].version = 6
    model = model_io.load(old)
    outcome = Int4().apply(model, Context(calibration=data.Data("nothing", 0, lambda k: {}, ()), threads=1))
    assert {s.node for s in outcome.skipped} == {"matmul0", "gemm0"}
    assert all("opset 6" in s.reason for s in outcome.skipped)


@pytest.mark.parametrize("block", [0, 8, 48])
def test_blocks_that_no_kernel_takes(block: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        Int4(block=block)


def test_weights_in_files_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(decoder(), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    model = model_io.load(path)
    weights = [v.const_value for v in model.graph.initializers.values() if (v.name or "").startswith(("w", "g"))]
    assert all(isinstance(w, ir.ExternalTensor) for w in weights)
    samples = data.open_data(feeds(), data.input_specs(model))
    Int4().apply(model, Context(calibration=samples, synthetic=True, threads=1))
    assert all(w.raw is None for w in weights if isinstance(w, ir.ExternalTensor))
    saved = model_io.save(model, tmp_path / "out.onnx")
    assert gap(decoder_from(path), model_io.load(saved)) < 0.3


def decoder_from(path: Path) -> onnx.ModelProto:
    return onnx.load(path)
