"""Layers that static ranges cannot serve: LSTM and the bodies of loops, on integers with dynamic ranges inside int8."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import data, runtime, timing
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.noise import noise
from onnxslim.passes.int8 import Int8

WIDTH, HIDDEN = 16, 24


def weights(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


CONSTANTS = {
    "in": weights(WIDTH, WIDTH), "w": weights(1, 4 * HIDDEN, WIDTH), "r": weights(1, 4 * HIDDEN, HIDDEN),
    "out": weights(HIDDEN, 10), "loop": weights(10, 10), "one": np.array([1], np.int64), "three": np.array(3),
}  # fmt: skip


def lstm(source: str, name: str = "lstm") -> list[onnx.NodeProto]:
    """From (steps, batch, WIDTH) to (steps, batch, HIDDEN)."""
    return [
        helper.make_node("LSTM", [source, "w", "r"], [f"{name}_all"], name=name, hidden_size=HIDDEN),
        helper.make_node("Squeeze", [f"{name}_all", "one"], [f"{name}_y"]),
    ]


def looped(source: str, target: str, body_node: onnx.NodeProto) -> onnx.NodeProto:
    """Three times the same from ``state`` to ``next``."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["again"], ["on"]), body_node], "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["p", "q", "r"]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["p", "q", "r"]),
        ],
    )  # fmt: skip
    return helper.make_node("Loop", ["three", "", source], [target], name="loop", body=body)


def build(nodes: list[onnx.NodeProto], **flags: int) -> ir.Model:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 2, WIDTH])]
    inputs += [helper.make_tensor_value_info(flag, TensorProto.BOOL, []) for flag in flags]
    read = {name for node in nodes for name in node.input} | {"w", "r", "one", "loop"}
    constants = [numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in read]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["u", "v", "w"])
    graph = helper.make_graph(nodes, "g", inputs, [y], constants)
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def network() -> ir.Model:
    """MatMul, LSTM, MatMul, and a loop around a MatMul."""
    body = helper.make_node("MatMul", ["state", "loop"], ["next"], name="inner")
    return build([
        helper.make_node("MatMul", ["x", "in"], ["a"], name="first"), *lstm("a"),
        helper.make_node("MatMul", ["lstm_y", "out"], ["b"], name="last"), looped("b", "y", body),
    ])  # fmt: skip


def samples(count: int = 16, **flags: bool) -> list[dict[str, np.ndarray]]:
    more = {name: np.array(value) for name, value in flags.items()}
    return [
        {"x": np.random.default_rng(k).standard_normal((5, 2, WIDTH)).astype(np.float32)} | more for k in range(count)
    ]


def run(model: ir.Model, item: Int8, feeds: list[dict[str, np.ndarray]]) -> tuple[ir.Model, Outcome]:
    draft = model.clone()
    outcome = item.apply(draft, Context(data.open_data(feeds, data.input_specs(model)), threads=1))
    onnx.checker.check_model(model_io.to_proto(draft), full_check=True)
    return draft, outcome


def lost(model: ir.Model, other: ir.Model, feeds: list[dict[str, np.ndarray]]) -> float:
    """Share of the variance of the outputs."""
    one, two = runtime.load(model), runtime.load(other)
    return noise([(runtime.arrays(one(f)), runtime.arrays(two(f))) for f in feeds])


def test_what_has_a_dynamic_kernel_runs_on_integers_with_the_rest() -> None:
    model, feeds = network(), samples()
    small, outcome = run(model, Int8(measure=False), feeds)
    assert outcome.stats["layers"] == outcome.stats["int8_layers"] == 4
    assert outcome.stats["dynamic"] == ["lstm", "inner"]
    assert outcome.stats["int8_macs_fraction"] == outcome.stats["integer_macs_fraction"] == 1
    assert outcome.stats["integer_kernels"]["DynamicQuantizeLSTM"] == 1
    assert not outcome.skipped
    # Told of the whole, against the model in float, with what few samples leave open.
    assert 1e-6 < lost(model, small, feeds[-4:]) < 1.5 * (1 - outcome.stats["fidelity"]) < 0.01
    assert model_io.weight_bytes(small) < 0.4 * model_io.weight_bytes(model)


def test_recurrent_layers_alone() -> None:
    model, feeds = build([*lstm("x"), helper.make_node("Identity", ["lstm_y"], ["y"])]), samples()
    small, outcome = run(model, Int8(measure=False), feeds)
    assert outcome.stats["dynamic"] == ["lstm"]
    assert outcome.stats["fidelity"] < 1
    assert 0 < lost(model, small, feeds) < 0.005


@pytest.mark.parametrize("options", [{"keep": ("lstm", "inner")}, {"target": "openvino"}, {"fidelity": 0.9999999}])
def test_they_stay_in_float_with_a_reason(options: dict[str, object]) -> None:
    model = network()
    small, outcome = run(model, Int8(measure=False, **options), samples())  # type: ignore[arg-type]
    assert {"lstm", "inner"} <= {s.node for s in outcome.skipped}
    assert "LSTM" in [n.op_type for n in small.graph.all_nodes()]
    why = {"keep": "asked to stay", "target": "has no static integer kernel", "fidelity": "variance"}
    assert why[next(iter(options))] in next(s.reason for s in outcome.skipped if s.node == "lstm")


def test_what_is_not_faster_stays_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = lambda s, *_, **__: timing.Comparison([], [1.0] * len(s), [(1.0, 1.0)] * len(s))  # noqa: E731
    monkeypatch.setattr(runtime, "compare_models", alike)
    _, outcome = run(network(), Int8(), samples())
    assert all("not faster" in s.reason for s in outcome.skipped if s.node in ("lstm", "inner"))
    assert "lstm" in {s.node for s in outcome.skipped}


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_no_sample_takes_stays_in_float(taken: bool) -> None:
    branches = {
        f"{kind}_branch": helper.make_graph(
            lstm("x", kind), kind, [], [helper.make_tensor_value_info(f"{kind}_y", TensorProto.FLOAT, ["u", "v", "w"])]
        )
        for kind in ("then", "else")
    }
    model = build([helper.make_node("If", ["ask"], ["y"], name="choose", **branches)], ask=1)
    feeds = samples(ask=taken)
    small, outcome = run(model, Int8(measure=False), feeds)
    assert outcome.stats["dynamic"] == ["then" if taken else "else"]
    assert [s.node for s in outcome.skipped] == ["else" if taken else "then"]
    assert 0 < lost(model, small, feeds) < 0.005
    assert lost(model, small, samples(ask=not taken)) < 1e-9


def test_a_loop_has_no_ranges_and_says_so() -> None:
    body = helper.make_node("Conv", ["state", "filter"], ["next"], name="inner", pads=[1, 1])
    nodes = [
        helper.make_node("Constant", [], ["filter"], value=numpy_helper.from_array(weights(2, 2, 3))),
        looped("x", "y", body),
    ]
    _, outcome = run(build(nodes), Int8(measure=False), samples())
    assert [(s.node, s.reason) for s in outcome.skipped] == [
        ("inner", "in the body of a Loop, where no ranges are seen")
    ]
