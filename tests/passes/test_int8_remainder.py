"""What int8 leaves in float is fused, without disturbing what it does not leave."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxslim import data
from onnxslim.contract import Context, Outcome
from onnxslim.graph import opset
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.int8 import Int8, speed
from onnxslim.passes.int8.remainder import Remainder

sys.path.insert(0, str(Path(__file__).parent))
from test_int8 import build, error, run, samples
from test_int8_accuracy import prepared

SHAPE = (4, 16)
NORMALIZATION = [
    helper.make_node("ReduceMean", ["a"], ["mu"], axes=[-1]),
    helper.make_node("Sub", ["a", "mu"], ["d"]),
    helper.make_node("Mul", ["d", "d"], ["dd"]),
    helper.make_node("ReduceMean", ["dd"], ["var"], axes=[-1]),
    helper.make_node("Add", ["var", "eps"], ["ve"]),
    helper.make_node("Sqrt", ["ve"], ["root"]),
    helper.make_node("Div", ["d", "root"], ["n"]),
]


def normalized() -> ir.Model:
    """Product, normalization as arithmetic, product."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        *NORMALIZATION,
        helper.make_node("MatMul", ["n", "w2"], ["y"], "second"),
    ]
    return build(nodes, weights | {"eps": np.float32(1e-5)}, list(SHAPE))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def context(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> Context:
    return Context(calibration=data.open_data(feeds, data.input_specs(model)), threads=1)


def test_the_layers_in_float_are_fused() -> None:
    model = normalized()
    quantized, outcome = run(model, Int8(measure=False), samples(SHAPE))
    assert outcome.stats["int8_layers"] == 2
    found = operators(quantized)
    assert found["LayerNormalization"] == 1 and not found["ReduceMean"]
    assert found["QuantizeLinear"] == 2, found
    assert error(model, quantized, samples(SHAPE, 20)[-1]) < 0.05


@pytest.mark.parametrize("options", [{"synthetic": True}, {"keep": True}])
def test_so_is_a_model_that_stays_in_float_as_a_whole(options: dict[str, bool]) -> None:
    model = normalized()
    item = Int8(measure=False, keep=("first", "second") if options.pop("keep", False) else ())
    same, outcome = run(model, item, samples(SHAPE), **options)
    assert outcome.stats["int8_layers"] == 0
    assert operators(same) == {"MatMul": 2, "LayerNormalization": 1}
    assert error(model, same, samples(SHAPE)[0]) < 1e-6


def test_a_fusion_that_is_another_function_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = normalized()

    def broken(self: Fuse, model: ir.Model, ctx: Context) -> Outcome:
        for node in model.graph:
            if node.op_type == "Sub":
                node.op_type = "Add"
        return Outcome({"Broken": 1})

    ctx = context(model, samples(SHAPE))
    assert Remainder(model, ctx.calibration, ctx).done
    monkeypatch.setattr(Fuse, "apply", broken)
    remainder = Remainder(model, ctx.calibration, ctx)
    assert not remainder.done and remainder.model is model
    assert operators(remainder.fuse(model.clone())) == operators(model)


def test_layers_are_compared_with_the_fused_model_by_the_names_they_had() -> None:
    """A product that became part of a wider one has no time of its own there."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in ("q", "k", "v")}
    nodes = [helper.make_node("MatMul", ["x", name], [f"x{name}"], name) for name in weights]
    model = build([*nodes, helper.make_node("Sum", ["xq", "xk", "xv"], ["y"])], weights, list(SHAPE))
    feeds = samples(SHAPE)
    ready = prepared(model, feeds)
    remainder = Remainder(model, context(model, feeds).calibration, context(model, feeds))
    assert operators(remainder.model)["MatMul"] == 1
    times = speed._float_times(model, ready, feeds[:2], remainder, context(model, feeds))
    assert all(speed._spent(ready.units[name], times) > 0 for name in ("q", "k", "v"))


@pytest.mark.parametrize("half_first", [False, True])
def test_a_gelu_between_convolutions_stays_whole(half_first: bool) -> None:
    """Its products could run on integers, with the rest of it in float between them."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        n: rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12 for n in ("w1", "w2")
    }
    weights |= {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
    products = [["a", "half", "s", "one_more"], ["a", "one_more", "s", "half"]][1 - half_first]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Div", ["a", "root"], ["d"]),
        helper.make_node("Erf", ["d"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["one_more"]),
        helper.make_node("Mul", products[:2], ["s"]),
        helper.make_node("Mul", products[2:], ["g"]),
        helper.make_node("Conv", ["g", "w2"], ["y"], "second", pads=[1] * 4),
    ]
    shape = (2, 16, 8, 8)
    model = build(nodes, weights, list(shape))
    quantized, outcome = run(model, Int8(measure=False), samples(shape))
    assert outcome.stats["int8_layers"] == 2
    assert operators(quantized)["Gelu"] == 1
    assert not {"Mul", "Erf", "Add", "Div"} & set(operators(quantized))
    assert (opset(quantized), quantized.ir_version) == (20, 9)
    assert error(model, quantized, samples(shape, 20)[-1]) < 0.1
    untouched, _ = run(model, Int8(measure=False, keep=("first", "second")), samples(shape))
    assert opset(untouched) == opset(model)
