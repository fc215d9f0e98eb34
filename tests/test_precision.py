"""`precision`: types follow the schemas, what does not fit stays in float32, casts stand where the two meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper

import onnxslim
from onnxslim import data, inference, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.errors import UsageError
from onnxslim.passes.bf16 import Bf16
from onnxslim.passes.fp16 import Fp16
from onnxslim.precision import FLOAT, convert, kernels

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_proto
from strategies import graphs

HALF, BF = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
RNG = np.random.default_rng(0)


def build(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def square() -> np.ndarray:
    return (RNG.standard_normal((8, 8)) / 3).astype(np.float32)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {node.op_type: node.outputs[0].dtype for node in model.graph}


def check(model: ir.Model) -> None:
    """Every declared type is the one that ONNX's own inference finds."""
    proto = model_io.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    found = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    for node in model.graph:
        for value in node.outputs:
            if value.name in found and value.dtype is not None:
                assert found[value.name] == int(value.dtype), value.name


def apply(model: ir.Model, item: Fp16 | Bf16, feeds: list[dict[str, np.ndarray]]) -> tuple[ir.Model, Outcome]:
    draft = model.clone()
    before = model_io.to_bytes(model)
    outcome = item.apply(draft, Context(calibration=data.open_data(feeds, data.input_specs(model)), threads=1))
    assert model_io.to_bytes(model) == before  # clones share values' types
    check(draft)
    return draft, outcome


def gap(model: ir.Model, other: ir.Model, feed: dict[str, np.ndarray]) -> float:
    one, two = runtime.load(model)(feed), runtime.load(other)(feed)
    assert [(n, a.dtype, a.shape) for n, a in one.items()] == [(n, a.dtype, a.shape) for n, a in two.items()]
    return max(float(np.linalg.norm(two[n] - a) / max(np.linalg.norm(a), 1e-9)) for n, a in one.items())


def test_everything_is_half_and_the_interface_is_not() -> None:
    model = model_io.load(tiny_proto())
    feed = {"x": RNG.standard_normal((3, 2, 8, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(), [feed])
    assert outcome.stats == {"converted": 5, "casts": 2, "weights_stored": 0, "kept": 0}
    assert model_io.weight_bytes(half) == model_io.weight_bytes(model) / 2
    assert 0 < gap(model, half, feed) < 2e-3


def test_types_of_one_variable_change_together_and_others_do_not() -> None:
    """The scales of a Resize are float32 by its schema; Where takes its condition as it is."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
        helper.make_node("Resize", ["u", "", "scales"], ["r"], mode="nearest"),
        helper.make_node("Greater", ["r", "zero"], ["c"]),
        helper.make_node("Where", ["c", "r", "zero"], ["y"]),
    ]
    weights = {"axes": np.array([0, 1]), "scales": np.array([1, 1, 1, 2], np.float32), "zero": np.float32(0.5)}
    model = build(nodes, weights)
    feed = {"x": RNG.standard_normal((2, 8)).astype(np.float32)}
    half, _ = apply(model, Fp16(), [feed])
    assert model_io.load(model_io.to_proto(half)).graph.initializers["scales"].dtype == FLOAT
    assert types(half)["Resize"] == types(half)["Where"] == HALF
    assert gap(model, half, feed) < 2e-3


@pytest.mark.parametrize("number", [1e5, 1e-12])
def test_constants_that_do_not_fit_keep_their_node_in_float(number: float) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "c"], ["y"])]
    model = build(nodes, {"w": square(), "c": np.float32(number)})
    feed = {"x": RNG.standard_normal((2, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(), [feed])
    assert types(half) == {"Cast": FLOAT, "MatMul": HALF, "Add": FLOAT} | {"Cast": types(half)["Cast"]}
    assert any("its constant 'c'" in s.reason for s in outcome.skipped)
    assert np.isfinite(runtime.load(half)(feed)["y"]).all()


def test_values_that_overflow_keep_their_nodes_in_float() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
        helper.make_node("Mul", ["m", "k"], ["big"], name="scale"),
        helper.make_node("Mul", ["big", "back"], ["small"], name="unscale"),
        helper.make_node("MatMul", ["small", "w"], ["y"], name="last"),
    ]
    model = build(nodes, {"w": square(), "k": np.float32(30_000), "back": np.float32(1 / 30_000)})
    feed = {"x": 10 * RNG.standard_normal((4, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(), [feed])
    assert {s.node for s in outcome.skipped} == {"scale", "unscale"}
    assert gap(model, half, feed) < 5e-3
    blind = model.clone()
    convert(blind, HALF, {})
    assert {v.dtype for v in (n.outputs[0] for n in blind.graph) if v.name in ("big", "small")} == {HALF}


def test_asked_to_stay() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="one"),
        helper.make_node("Relu", ["m"], ["y"], name="two"),
    ]
    model = build(nodes, {"w": square()})
    feed = {"x": RNG.standard_normal((2, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(keep=("two",)), [feed])
    assert [s.node for s in outcome.skipped] == ["two"]
    assert types(half)["Relu"] == FLOAT
    with pytest.raises(UsageError, match="samples"):
        Fp16(samples=0)


def test_casts_of_the_model_are_rewritten_and_subgraphs_stay() -> None:
    body = [
        helper.make_graph(
            [helper.make_node(op, ["m"], [f"b{op}"])], op, [], [helper.make_tensor_value_info(f"b{op}", 1, None)]
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("ReduceMax", ["m"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["s"], then_branch=body[0], else_branch=body[1]),
        helper.make_node("Add", ["s", "m"], ["y"]),
    ]
    model = build(nodes, {"w": square(), "zero": np.float32(0)}, ("y", "m"))
    feed = {"x": 3 * RNG.standard_normal((2, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(), [feed])
    assert any("has subgraphs" in s.reason for s in outcome.skipped)
    assert types(half)["MatMul"] == HALF
    assert gap(model, half, feed) < 5e-3


def test_bf16_is_stored_and_computed_in_float32_without_kernels() -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Transpose", ["m"], ["y"], perm=[1, 0])],
        {"w": np.repeat(square(), 8, 1)},
    )
    feed = {"x": RNG.standard_normal((2, 8)).astype(np.float32)}
    probe = kernels(model, BF, "cpu")
    small, outcome = apply(model, Bf16(), [feed])
    matmul = next(n for n in model.graph if n.op_type == "MatMul")
    from onnxslim.precision import _Types

    if not probe(matmul, _Types((0, 1), (0,))):
        assert outcome.stats["converted"] == 0  # the Transpose has a kernel, and alone it would only add casts
        assert outcome.stats["weights_stored"] == 1
        assert [n.op_type for n in runtime.optimized(small).graph] == ["MatMul", "Transpose"]
    assert model_io.weight_bytes(small) == model_io.weight_bytes(model) / 2
    assert 0 < gap(model, small, feed) < 2e-2


def test_unknown_sizes_may_be_negative() -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])], {"w": square()}
    )
    for value in (model.graph.inputs[0], *(node.outputs[0] for node in model.graph)):
        value.shape = ir.Shape([-1, 8])
    half, _ = apply(model, Fp16(), [{"x": RNG.standard_normal((5, 8)).astype(np.float32)}])
    assert types(half)["MatMul"] == HALF


def test_a_kernel_that_refuses_the_type_when_it_runs_is_none() -> None:
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("ScatterElements", ["zeros", "rows", "m"], ["s"], axis=0, reduction="add"),
            helper.make_node("MatMul", ["s", "w"], ["y"]),
        ],
        {
            "w": square(),
            "zeros": np.zeros((3, 8), np.float32),
            "rows": np.repeat(np.array([[0], [2], [2], [1], [0]]), 8, axis=1),
        },
    )
    model_io.forget_shapes(model)
    model.graph.inputs[0].shape = ir.Shape([5, 8])
    inference.run(model)
    feed = {"x": RNG.standard_normal((5, 8)).astype(np.float32)}
    half, outcome = apply(model, Fp16(), [feed])
    assert types(half)["MatMul"] == HALF
    assert any("kernel for ScatterElements" in s.reason for s in outcome.skipped)
    assert gap(model, half, feed) < 5e-3


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_any_graph_stays_valid_and_close(case: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    """Half precision is close to float32 unless the graph amplifies rounding; the float16 of NumPy's inputs tells."""
    proto, feed = case
    model = model_io.load(proto)
    reference = runtime.load(model)(feed)
    # What rounding the inputs alone to float16 does, and the weights: a graph that amplifies that is not held to less.
    rounded = {n: a.astype(np.float16).astype(np.float32) for n, a in feed.items()}
    moved = runtime.load(model)(rounded)
    half, _ = apply(model, Fp16(), [feed])
    got = runtime.load(half, optimize=False)(feed)
    for name, want in reference.items():
        assert got[name].dtype == want.dtype
        assert got[name].shape == want.shape
        if want.dtype.kind != "f" or not np.isfinite(want).all():
            continue
        scale = np.linalg.norm(want) + 1e-3 * np.sqrt(want.size)
        amplified = np.linalg.norm(moved[name] - want) / scale
        assert np.linalg.norm(got[name] - want) / scale < max(0.02, 30 * amplified)


@pytest.mark.parametrize("chosen", [Fp16(keep_io=False), Fp16(keep_io=False, keep=("Gemm", "Conv"))])
def test_inputs_and_outputs_in_half_precision(chosen: Fp16) -> None:
    """The casts at the border go where the inside computes in the type, and stand there where it does not."""
    model = model_io.load(tiny_proto())
    feed = {"x": RNG.standard_normal((2, 2, 8, 8)).astype(np.float32)}
    want = runtime.load(tiny_proto().SerializeToString())(feed)["y"]
    half, _ = apply(model, chosen, [feed])
    check(half)
    assert [v.dtype for v in (*half.graph.inputs, *half.graph.outputs)] == [HALF, HALF]
    assert [v.name for v in (*half.graph.inputs, *half.graph.outputs)] == ["x", "y"]
    session = runtime.load(half)
    assert session.session.get_inputs()[0].type == "tensor(float16)"
    got = session(feed)["y"]  # the sample is converted
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)


def test_an_input_that_would_overflow_keeps_its_type() -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], {})
    half, outcome = apply(model, Fp16(keep_io=False), [{"x": np.full((1, 8), 1e5, np.float32)}])
    assert [v.dtype for v in (*half.graph.inputs, *half.graph.outputs)] == [FLOAT, FLOAT]
    assert any(s.node == "x" and "1e+05" in s.reason for s in outcome.skipped)


def test_sequences_keep_their_type() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,8] x) => (seq(float[2,4]) t, float[2,4] y) {
            y = MatMul(x, w) z = Neg(y) t = SequenceConstruct(y, z) }""")
    weight = RNG.standard_normal((8, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = model_io.load(proto)
    x = RNG.standard_normal((2, 8)).astype(np.float32)
    half, _ = apply(model, Fp16(keep_io=False), [{"x": x}])
    assert [type(v.type).__name__ for v in half.graph.outputs] == ["SequenceType", "TensorType"]
    assert [half.graph.inputs[0].dtype, half.graph.outputs[0].dtype, half.graph.outputs[1].dtype] == [HALF, FLOAT, HALF]
    got = runtime.load(half)({"x": x})
    for array in (got["y"], got["t"][0], -got["t"][1]):
        np.testing.assert_allclose(array, x @ weight, rtol=0.02, atol=0.05)


def test_only_a_pass_that_says_so_may_change_the_interface() -> None:
    batches = [{"x": RNG.standard_normal((1, 2, 8, 8)).astype(np.float32)} for _ in range(4)]
    result = onnxslim.optimize(tiny_proto(), "fp16(keep_io=false)", calibration=batches, bench=False)
    assert result.exit_code == 0
    assert result.model.graph.inputs[0].dtype == HALF
    (output,) = result.report.fidelity["outputs"]  # type: ignore[index]
    assert 0 < output["relative_l2"] < 0.01
    assert any("'y' is float16, in the original float32" in line for line in result.report.warnings)


def test_a_pass_that_does_not_say_so_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fp16, "retypes", False)
    result = onnxslim.optimize(tiny_proto(), "fp16(keep_io=false)", bench=False)
    assert result.model.graph.inputs[0].dtype == FLOAT
    assert any("changes the type of 'x'" in line for line in result.report.warnings)


def _moved(perm: list[int]) -> ir.Model:
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["b"]),
        helper.make_node("Transpose", ["b"], ["t"], perm=perm),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    sizes = [8] * (len(perm) - 1)
    return build(nodes, {"w": square(), "sizes": np.array([-1, *sizes], np.int64)})


@pytest.mark.parametrize(
    ("perm", "stays"),
    [([1, 0, 2], True), ([1, 2, 0], True), ([1, 2, 0, 3], True), ([1, 2, 3, 0], True), ([0, 2, 1], False),
     ([2, 1, 0], False), ([0, 2, 1, 3], False), ([1, 0, 2, 3], False)],
)  # fmt: skip
def test_what_onnx_runtime_cannot_load_stays(perm: list[int], stays: bool, tmp_path: Path) -> None:
    model = _moved(perm)
    convert(model, HALF, {})
    assert types(model)["Transpose"] == (FLOAT if stays else HALF)
    assert types(model)["MatMul"] == HALF
    model_io.save(model, tmp_path / "half.onnx")
    code = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "half.onnx")], check=True)
