"""`dynamic_int8`: integer kernels without calibration data, kept where they are faster and close."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxslim import cost, data, integer, runtime, timing
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.errors import UsageError
from onnxslim.graph import constant
from onnxslim.passes.dynamic_int8 import DynamicInt8
from onnxslim.pipeline import parse
from onnxslim.quantization import may_saturate
from onnxslim.saturation import saturates_here

RNG = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",), opset: int = 17
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", "n", 32])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def products(opset: int = 17) -> ir.Model:
    """Two MatMul that read the same value, a row behind one, and a Gemm."""
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["xq"], name="query"),
        helper.make_node("MatMul", ["x", "k"], ["xk"], name="key"),
        helper.make_node("Add", ["xk", "row"], ["xr"]),
        helper.make_node("Mul", ["xq", "xr"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"], axis=2),
        helper.make_node("Gemm", ["f", "g", "b"], ["y"], name="head", transB=1),
    ]
    constants = {"q": weights(32, 48), "k": weights(32, 48), "row": weights(1, 48)[0]}
    return build(nodes, constants | {"g": weights(10, 48), "b": weights(1, 10)[0]}, opset=opset)


def lstm(directions: int = 1, outputs: int = 3, **attributes: object) -> ir.Model:
    nodes = [
        helper.make_node(
            "LSTM", ["x", "w", "r", "b", "", "h"], ["y", "yh", "yc"][:outputs], name="lstm", hidden_size=24,
            direction="forward" if directions == 1 else "bidirectional", **attributes,
        )
    ]  # fmt: skip
    constants = {"w": weights(directions, 96, 32), "r": weights(directions, 96, 24), "b": weights(directions, 192)}
    constants["h"] = np.zeros((directions, 2, 24), np.float32)
    return build(nodes, constants, ("y", "yh", "yc")[:outputs])


def apply(model: ir.Model, item: DynamicInt8, **options: str) -> tuple[ir.Model, Outcome]:
    draft = model.clone()
    feeds = [{"x": np.random.default_rng(k).standard_normal((5, 2, 32)).astype(np.float32)} for k in range(4)]
    samples = data.open_data(feeds, data.input_specs(model))
    outcome = item.apply(draft, Context(calibration=samples, synthetic=True, threads=1, **options))  # type: ignore[arg-type]
    onnx.checker.check_model(model_io.to_proto(draft), full_check=True)
    return draft, outcome


def gap(model: ir.Model, other: ir.Model) -> float:
    feed = {"x": np.random.default_rng(77).standard_normal((7, 2, 32)).astype(np.float32)}
    one, two = runtime.load(model)(feed), runtime.load(other)(feed)
    assert [(n, a.shape) for n, a in one.items()] == [(n, a.shape) for n, a in two.items()]
    return max(float(np.linalg.norm(two[n] - a) / np.linalg.norm(a)) for n, a in one.items())


@pytest.mark.parametrize("opset", [11, 17])
def test_products_run_on_integers(opset: int) -> None:
    model = products(opset)
    small, outcome = apply(model, DynamicInt8(measure=False))
    assert outcome.stats["int8_layers"] == outcome.stats["layers"] == 3
    assert integer.prove(small).fraction == 1
    assert [n.op_type for n in small.graph].count("DynamicQuantizeLinear") == 2  # the shared input once
    assert 0 < gap(model, small) < 0.03
    assert model_io.weight_bytes(small) < 0.4 * model_io.weight_bytes(model)


@pytest.mark.parametrize(("directions", "outputs"), [(1, 3), (2, 3), (1, 1)])
def test_lstm(directions: int, outputs: int) -> None:
    model = lstm(directions, outputs)
    small, outcome = apply(model, DynamicInt8(measure=False))
    assert outcome.stats["int8_layers"] == 1
    assert [n.op_type for n in small.graph] == ["DynamicQuantizeLSTM"]
    feed = {"x": np.zeros((5, 2, 32), np.float32)}
    assert cost.analyze(small, feed).macs == cost.analyze(model, feed).macs > 0
    assert 0 < gap(model, small) < 0.05


def test_inside_a_subgraph() -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", f"w{k}"], [f"m{k}"], name=f"in{k}")], f"b{k}", [],
            [helper.make_tensor_value_info(f"m{k}", TensorProto.FLOAT, None)],
        )
        for k in range(2)
    ]  # fmt: skip
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    model = build(nodes, {"zero": np.float32(0), "w0": weights(32, 48), "w1": weights(32, 48)})
    small, outcome = apply(model, DynamicInt8(measure=False))
    assert outcome.stats["int8_layers"] == 2
    assert 0 < gap(model, small) < 0.03
    # The float products are gone, and their weights with them.
    assert not [n for n in runtime.optimized(small).graph.all_nodes() if n.op_type == "MatMul"]
    assert model_io.weight_bytes(small) < 0.35 * model_io.weight_bytes(model)


def test_layers_that_are_slower_stay_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def profile(model: ir.Model, feeds: object, **_: object) -> dict[str, float]:
        quantized = any(n.op_type == "MatMulInteger" for n in model.graph)
        return {"query": 2.0 if quantized else 1.0, "key": 1.0 if quantized else 2.0, "head": 1.0}

    def latency(sources: list[ir.Model], *_: object, **__: object) -> timing.Comparison:
        speeds = [1.0, 1.111, 2.0][: len(sources)]
        return timing.Comparison([], speeds, [(speed, speed) for speed in speeds])

    monkeypatch.setattr(runtime, "profile", profile)
    monkeypatch.setattr(runtime, "compare_models", latency)
    small, outcome = apply(products(), DynamicInt8())
    assert outcome.stats["int8_layers"] == 2
    assert outcome.stats["speedup"] == {"all": 1.111, "restored": 2.0}
    assert {s.node for s in outcome.skipped} == {"query"}
    assert "slower on integers" in outcome.skipped[0].reason
    assert [n.op_type for n in small.graph].count("MatMulInteger") == 2


def test_nothing_is_kept_that_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = lambda s, *_, **__: timing.Comparison([], [1.0] * len(s), [(1.0, 1.0)] * len(s))  # noqa: E731
    monkeypatch.setattr(runtime, "compare_models", alike)
    model = products()
    small, outcome = apply(model, DynamicInt8())
    assert outcome.stats["int8_layers"] == 0
    assert all("not faster" in s.reason for s in outcome.skipped)
    assert model_io.to_bytes(small) == model_io.to_bytes(model)


def test_layers_that_cost_fidelity_go_back_first() -> None:
    """One outlier among the inputs of a layer takes the steps of all the others."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"], name="fine"),
        helper.make_node("Mul", ["xa", "spike"], ["s"]),
        helper.make_node("MatMul", ["s", "b"], ["y"], name="fragile"),
    ]
    spike = np.ones(48, np.float32)
    spike[0] = 1e4
    second = weights(48, 32)
    second[0] = 0
    model = build(nodes, {"a": weights(32, 48), "spike": spike, "b": second})
    _, outcome = apply(model, DynamicInt8(measure=False))
    assert [s.node for s in outcome.skipped] == ["fragile"]
    assert "variance" in outcome.skipped[0].reason
    assert outcome.stats["int8_layers"] == 1
    assert outcome.stats["fidelity"] > 0.98
    _, outcome = apply(model, DynamicInt8(measure=False, fidelity=0))
    assert outcome.stats["int8_layers"] == 2


@pytest.mark.parametrize("make", [products, lstm])
def test_portable_weights_are_small(make: Callable[[], ir.Model]) -> None:
    """So that no two products leave 16 bits, whatever the inputs are."""
    model = make()
    for portable in (False, True, None):
        small, outcome = apply(model, DynamicInt8(measure=False, fidelity=0, portable=portable))
        assert outcome.stats["portable"] == (saturates_here() if portable is None else portable)
        stored = [constant(v) for v in small.graph.initializers.values() if (v.name or "").endswith("_quantized")]
        assert stored
        for array in stored:
            assert array is not None
            rows = np.swapaxes(array, -1, -2)
            pairs = np.arange(rows.shape[-1] // 2 * 2).reshape(-1, 2)
            saturates = [may_saturate(matrix, pairs) for matrix in rows.reshape(-1, *rows.shape[-2:])]
            assert any(saturates) == (not outcome.stats["portable"])
        assert gap(model, small) < (0.03 if portable is not False or not saturates_here() else 0.1)


def test_options() -> None:
    item = DynamicInt8(keep=("query",), measure=False)
    assert parse(str(item)) == [item]
    _, outcome = apply(products(), item)
    assert [(s.node, s.reason) for s in outcome.skipped] == [("query", "asked to stay in float")]
    _, outcome = apply(products(), DynamicInt8(), target="cuda")
    assert all("CUDA" in s.reason for s in outcome.skipped)
    _, outcome = apply(lstm(outputs=1, input_forget=1), DynamicInt8(measure=False))
    assert "input_forget" in outcome.skipped[0].reason
    with pytest.raises(UsageError, match="fidelity"):
        DynamicInt8(fidelity=1.0)
