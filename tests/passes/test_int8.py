"""`int8`: integer kernels where they pay, the outputs kept, everything left alone named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.errors import UsageError
from onnxslim.noise import noise
from onnxslim.passes import int8
from onnxslim.passes.int8 import Int8
from onnxslim.pipeline import parse
from onnxslim.qdq import missing_kernel
from onnxslim.saturation import saturates_here

sys.path.insert(0, str(Path(__file__).parents[1]))
from strategies import graphs

RNG = np.random.default_rng(0)


def build(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: list[int | str], opset: int = 17) -> ir.Model:
    """A model of ``nodes`` from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model_io.load(onnx.shape_inference.infer_shapes(proto))


def filters(out: int, into: int, size: int = 3) -> np.ndarray:
    """Weights of a Conv that keep the size of their input."""
    return (RNG.standard_normal((out, into, size, size)) / np.sqrt(into * size * size)).astype(np.float32)


def residual(opset: int = 17, clip: bool = False) -> ir.Model:
    """Conv, activation, Conv, Add, activation, mean, Gemm."""
    weights = {"w1": filters(32, 8), "w2": filters(32, 32), "w3": filters(32, 32)}
    weights |= {"b1": RNG.standard_normal(32).astype(np.float32), "g": filters(10, 32, 1).reshape(10, 32)}
    weights |= {"low": np.float32(0), "high": np.float32(6), "gb": RNG.standard_normal(10).astype(np.float32)}

    def activation(source: str, out: str) -> onnx.NodeProto:
        if clip:
            return helper.make_node("Clip", [source, "low", "high"], [out])
        return helper.make_node("Relu", [source], [out])

    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="first", **same),
        activation("c1", "r1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", **same),
        activation("c2", "r2"),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], name="third", **same),
        helper.make_node("Add", ["c3", "r1"], ["s"]),
        activation("s", "r3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "gb"], ["y"], name="head", transB=1),
    ]
    return build(nodes, weights, ["n", 8, 12, 12], opset)


def samples(shape: tuple[int, ...], count: int = 12) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(k).standard_normal(shape).astype(np.float32)} for k in range(count)]


def run(model: ir.Model, item: Int8, feeds: list[dict[str, np.ndarray]], **options: bool) -> tuple[ir.Model, Outcome]:
    """A quantized copy of ``model``."""
    draft = model.clone()
    given = data.open_data(feeds, data.input_specs(model))
    outcome = item.apply(draft, Context(calibration=given, threads=1, **options))  # type: ignore[arg-type]
    onnx.checker.check_model(model_io.to_proto(draft), full_check=True)
    return draft, outcome


def error(model: ir.Model, other: ir.Model, feed: dict[str, np.ndarray]) -> float:
    """Relative L2 error of ``other``."""
    a, b = (next(iter(runtime.load(m)(feed).values())) for m in (model, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def kernels(model: ir.Model) -> list[str]:
    return [n.op_type for n in runtime.optimized(model).graph]


@pytest.mark.parametrize("clip", [False, True])
def test_everything_becomes_integer_kernels(clip: bool) -> None:
    model = residual(clip=clip)
    feeds = samples((2, 8, 12, 12))
    small, outcome = run(model, Int8(measure=False), feeds)
    assert kernels(small).count("QLinearConv") == 3
    assert {"QLinearAdd", "QGemm"} <= set(kernels(small))
    assert not {"Conv", "Gemm", "Relu", "Clip", "Add"} & set(kernels(small))
    assert outcome.stats["layers"] == outcome.stats["int8_layers"] == 4
    assert outcome.stats["integer_kernels"] == {"QLinearConv": 3, "QGemm": 1}
    assert outcome.stats["int8_macs_fraction"] == 1
    assert error(model, small, feeds[-1]) < 0.05
    assert model_io.weight_bytes(small) < 0.35 * model_io.weight_bytes(model)


def test_the_share_of_integers_counts_layers_that_cannot_be() -> None:
    weights = {"w": filters(16, 8), "t": filters(16, 8)}  # ConvTranspose has no integer kernel
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["c", "t"], ["y"], pads=[1, 1, 1, 1]),
    ]
    _, outcome = run(build(nodes, weights, [1, 8, 12, 12]), Int8(measure=False), samples((1, 8, 12, 12)))
    assert outcome.stats["int8_macs_fraction"] == outcome.stats["integer_macs_fraction"] == 0.5


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("wide", [1.0, 40.0], ids=["alike", "other inputs"])
def test_a_weight_that_several_layers_read_is_stored_once(op: str, wide: float) -> None:
    shape = (16, 16, 3, 3) if op == "Conv" else (16, 16)
    weights = {"w": (RNG.standard_normal(shape) / 8).astype(np.float32), "wide": np.float32(wide)}
    x = (1, 16, 12, 12) if op == "Conv" else (64, 16)
    nodes, value = [], "x"
    for k in range(4):
        same = {"pads": [1, 1, 1, 1]} if op == "Conv" else {}
        bias = [f"b{k}"] if op != "MatMul" else []
        weights[f"b{k}"] = RNG.standard_normal(16).astype(np.float32)
        nodes += [
            helper.make_node(op, [value, "w", *bias], [f"c{k}"], **same),
            helper.make_node("Mul", [f"c{k}", "wide"], [f"m{k}"]),
            helper.make_node("Tanh", [f"m{k}"], [f"t{k}"]),
        ]
        value = f"t{k}"
    model = build([*nodes, helper.make_node("Identity", [value], ["y"])], weights, list(x))
    small, outcome = run(model, Int8(measure=False, fidelity=0), samples(x))
    assert outcome.stats["int8_layers"] == 4
    stored = [v for v in small.graph.initializers.values() if v.dtype == ir.DataType.INT8 and v.const_value.size > 100]
    assert len(stored) == 1
    assert error(model, small, samples(x, 13)[-1]) < 0.1 * wide


def test_an_old_opset_is_raised() -> None:
    small, _ = run(residual(opset=12), Int8(measure=False), samples((1, 8, 12, 12)))
    assert small.graph.opset_imports[""] == 13
    assert "QLinearConv" in kernels(small)


@pytest.mark.parametrize("opset", range(21, onnx.defs.onnx_opset_version() + 1))
def test_a_newer_opset_is_quantized_where_the_runtime_can(opset: int) -> None:
    model, runs = residual(opset=opset), missing_kernel(opset) is None
    small, outcome = run(model, Int8(measure=False), samples((1, 8, 12, 12)))
    assert outcome.stats["int8_layers"] == (4 if runs else 0)
    if not runs:
        assert model_io.to_bytes(small) == model_io.to_bytes(model)
        assert {s.reason for s in outcome.skipped} == {missing_kernel(opset)}


def test_without_data_nothing_is_guessed() -> None:
    model = residual()
    small, outcome = run(model, Int8(), samples((1, 8, 12, 12)), synthetic=True)
    assert model_io.to_bytes(small) == model_io.to_bytes(model)
    assert outcome.stats["int8_layers"] == 0
    assert {s.node for s in outcome.skipped} == {"first", "second", "third", "head"}
    assert all("no calibration data" in s.reason for s in outcome.skipped)


def test_kept_layers_are_named() -> None:
    small, outcome = run(residual(), Int8(measure=False, keep=("second",)), samples((1, 8, 12, 12)))
    assert kernels(small).count("QLinearConv") == 2
    assert [(s.node, s.reason) for s in outcome.skipped] == [("second", "asked to stay in float")]


def test_options_are_checked_and_round_trip() -> None:
    item = Int8(fidelity=0.5, measure=False, keep=("a", "b"))
    assert parse(str(item)) == [item]
    with pytest.raises(UsageError, match="fidelity"):
        Int8(fidelity=1.5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(), st.booleans())
def test_any_graph_stays_valid_and_faithful(case: tuple[onnx.ModelProto, dict[str, np.ndarray]], switch: bool) -> None:
    proto, feed = case
    model = model_io.load(proto)
    reference = runtime.load(model)(feed)
    draft, outcome = run(model, Int8(measure=False, fidelity=0.9, equalize=switch), [feed] * 4)
    quantized = bool(outcome.stats["int8_layers"])
    assert quantized == any(n.op_type == "QuantizeLinear" for n in draft.graph)
    got = runtime.load(draft)(feed)
    assert list(got) == list(reference)
    finite = {n: np.isfinite(a) if a.dtype.kind == "f" else np.ones(a.shape, bool) for n, a in reference.items()}

    def varies(name: str) -> bool:
        seen = reference[name][finite[name]]
        return reference[name].dtype.kind != "f" or bool(seen.size and np.ptp(seen) > 1e-3 * np.abs(seen).max())

    # Against the variance of what does not vary, the last bits of an integer kernel's result are much.
    varying = [n for n in reference if varies(n)]
    pair = [reference[n] for n in varying], [got[n] for n in varying]
    assert not varying or noise([pair]) < (0.15 if quantized else 1e-6)
    for name in set(reference).difference(varying):
        np.testing.assert_allclose(got[name][finite[name]], reference[name][finite[name]], rtol=0.02, atol=1e-6)


def test_what_is_infinite_in_places_is_right_elsewhere() -> None:
    weights = {"w": filters(16, 8, 1), "b": RNG.standard_normal(16).astype(np.float32), "v": filters(16, 16, 1)}
    nodes = [
        helper.make_node("Log", ["x"], ["l"]),
        helper.make_node("Conv", ["l", "w", "b"], ["c"]),
        helper.make_node("Conv", ["c", "v", "b"], ["y"]),
    ]
    feeds = [{"x": np.exp(feed["x"])} for feed in samples((1, 8, 12, 12))]
    for feed in feeds:
        feed["x"][..., 0] = 0
    model = build(nodes, weights, [1, 8, 12, 12])
    quantized, outcome = run(model, Int8(measure=False, fidelity=0), feeds)
    assert outcome.stats["int8_layers"] == 2
    exact, found = (runtime.load(m)(feeds[0])["y"][..., 1:] for m in (model, quantized))
    assert np.linalg.norm(exact - found) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_bias_that_dwarfs_the_weights_is_kept(op: str, size: float) -> None:
    weights = {n: (RNG.standard_normal((64, 64)) / 8).astype(np.float32) for n in ("w", "v")}
    weights["w"] *= np.float32(size)
    weights["row"] = RNG.standard_normal(64).astype(np.float32)
    first = [helper.make_node("MatMul", ["x", "w"], ["m"], name="one"), helper.make_node("Add", ["m", "row"], ["a"])]
    if op == "Gemm":
        first = [helper.make_node("Gemm", ["x", "w", "row"], ["a"], name="one")]
    nodes = [
        *first,
        helper.make_node("Mul", ["a", "x"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="two"),
    ]
    model = build(nodes, weights, [16, 64])
    quantized, outcome = run(model, Int8(fidelity=0, measure=False), samples((16, 64)))
    assert outcome.stats["int8_layers"] == 2
    assert error(model, quantized, samples((16, 64))[0]) < 0.05


@pytest.mark.parametrize("portable", [True, False])
def test_what_kernels_do_beyond_the_file_is_measured(portable: bool) -> None:
    """Sums of two large products leave 16 bits, which only some kernels notice; the simulation never does."""
    weights = {"w": (1 + RNG.random((64, 64)) / 50).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="sum")]
    model = build(nodes, weights, [16, 64])
    model.graph.outputs[0].shape = ir.Shape([16, 64])
    feeds = [{"x": np.random.default_rng(k).uniform(0.7, 1, (16, 64)).astype(np.float32)} for k in range(8)]
    draft = model.clone()
    ctx = Context(calibration=data.open_data(feeds, data.input_specs(model)), threads=1)
    outcome = Int8(measure=False, fidelity=0.5, portable=portable).apply(draft, ctx)
    assert outcome.stats["saturating"] == ["sum"]
    damaged = error(model, draft, feeds[0]) > 0.1
    assert damaged == (saturates_here() and not portable)
    assert (outcome.stats["kernel_noise"] > 0.5) == damaged
    told = [line for line in ctx.warnings if "beyond what the file says" in line and "1 layers saturate" in line]
    assert bool(told) == damaged


@pytest.mark.parametrize("portable", [True, False])
def test_weights_that_are_small_already_are_no_remedy(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8.accuracy, "kernel_noise", lambda *_: 0.9)
    monkeypatch.setattr(int8, "saturates_here", lambda: True)
    weights = {"w": (1 + RNG.random((64, 64)) / 50).astype(np.float32)}
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"], name="sum")], weights, [16, 64])
    feeds = [{"x": np.random.default_rng(k).uniform(0.7, 1, (16, 64)).astype(np.float32)} for k in range(8)]
    ctx = Context(calibration=data.open_data(feeds, data.input_specs(model)), threads=1)
    outcome = Int8(measure=False, portable=portable).apply(model, ctx)
    assert outcome.stats["narrowed"] == (["sum"] if portable else [])
    told = next(line for line in ctx.warnings if "90.0% of an output's variance" in line)
    assert ("int8(portable=true)" in told) != portable


def test_products_behind_an_operator_of_another_domain() -> None:
    """What type such an operator gives does not follow from the file; a sample shows it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="one"),
        helper.make_node("QuickGelu", ["a"], ["b"], domain="com.microsoft", name="opaque"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="two"),
    ]
    weights = {n: (RNG.standard_normal((64, 64)) / 8).astype(np.float32) for n in ("w1", "w2")}
    model = build(nodes, weights, [16, 64])
    assert next(n for n in model.graph if n.name == "opaque").outputs[0].type is None
    model.graph.outputs[0].shape = ir.Shape([16, 64])
    quantized, outcome = run(model, Int8(fidelity=0, measure=False, portable=True), samples((16, 64)))
    assert outcome.stats["int8_layers"] == 2
    assert error(model, quantized, samples((16, 64))[0]) < 0.05


def test_a_weight_that_layers_share_is_stored_once() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["first"]),
        helper.make_node("Gemm", ["x", "w", "c"], ["second"]),
        helper.make_node("Mul", ["first", "second"], ["y"]),
    ]
    weights = {"w": RNG.standard_normal((64, 64)).astype(np.float32) / 8}
    weights |= {name: RNG.standard_normal(64).astype(np.float32) / 8 for name in "bc"}
    model = build(nodes, weights, [16, 64])
    quantized, outcome = run(model, Int8(fidelity=0, measure=False), samples((16, 64)))
    assert outcome.stats["int8_layers"] == 2
    stored = [v for v in quantized.graph.initializers.values() if v.const_value is not None and v.const_value.size > 64]
    assert [v.dtype for v in stored] == [ir.DataType.INT8]
    assert error(model, quantized, samples((16, 64))[0]) < 0.05
