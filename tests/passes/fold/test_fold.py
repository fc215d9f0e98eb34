"""fold as a whole."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import BN, batchnorm, fold, net, node, normal
from oracles import CONTEXT, apply, assert_same, operators, run

from onnxslim import model as model_io
from onnxslim import runtime, verify
from onnxslim.data import input_specs, open_data
from onnxslim.pipeline import parse


def test_the_demo_model_loses_all_its_batch_normalizations() -> None:
    root = Path(__file__).parents[3]
    model = onnx.load(root / "models" / "fmnist_cnn.onnx")
    images = np.load(root / "models" / "fmnist_calib.npz")[model.graph.input[0].name][:8]
    simplified, _ = apply(model, "simplify")
    result, outcomes = apply(simplified, "fold")
    assert operators(simplified).count("BatchNormalization") == 9
    assert "BatchNormalization" not in operators(result)
    assert outcomes[0].stats == {"after Conv": 9}
    assert outcomes[0].skipped == []
    for k in range(len(images)):
        assert_same(model, result, {model.graph.input[0].name: images[k : k + 1]})


def test_operator_sets_without_numpy_broadcasting_are_left_alone() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", broadcast=1, axis=1)]
    model = net(nodes, {"x": [1, 4, 4]}, {"w": normal(4, 4, 1), "k": normal(4)}, opset=6)
    loaded, _ = apply(model, "")
    result, _ = apply(model, "fold")
    if loaded.opset_import[0].version < 7:
        assert operators(result) == ["Conv", "Mul"]


def test_names_and_declared_shapes_of_outputs_stay() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "m"), node("Add", "m k")]
    model = net(
        nodes, {"x": ["batch", 4, "time"]}, {"w": normal(3, 4, 1), "k": normal(3, 1)}, {"y": ["batch", 3, "time"]}
    )
    result = fold(model, {"x": normal(2, 4, 6)})
    assert [o.name for o in result.graph.output] == ["y"]
    assert [d.dim_param or d.dim_value for d in result.graph.output[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        "time",
    ]
    assert run(result, {"x": normal(3, 4, 2)})["y"].shape == (3, 3, 2)


def test_long_networks_are_folded_whole() -> None:
    depth = 300
    nodes, parts, at = [], {}, "x"
    for k in range(depth):
        nodes += [node("Conv", f"{at} w{k}", f"c{k}"), node("BatchNormalization", f"c{k} {BN}", f"n{k}")]
        nodes.append(node("Relu", f"n{k}", f"r{k}"))
        parts[f"w{k}"] = normal(2, 2, 1)
        at = f"r{k}"
    model = net(nodes, {"x": [1, 2, 3]}, {**parts, **batchnorm(2)}, (at,))
    result, outcomes = apply(model, "fold")
    assert outcomes[0].stats["after Conv"] == depth
    assert operators(result) == ["Conv", "Relu"] * depth


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "nodes"), [("efficientnet_lite0", 94), ("minilm_l6", 218), ("ppocrv4_rec", 263), ("ppocrv4_det", 211)]
)
def test_real_models_keep_their_outputs(name: str, nodes: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from models import zoo

    entry = zoo.load_models()[name]
    model = model_io.load(entry.path)
    original = runtime.load(model, threads=1)
    samples = open_data(entry.folder / entry.calibration, input_specs(model)).spread(2)
    for item in parse("simplify,fold"):
        item.apply(model, CONTEXT)
    assert sum(1 for _ in model.graph.all_nodes()) <= nodes
    fidelity, _ = verify.measure(verify.Reference(original, samples), runtime.load(model, threads=1))
    assert fidelity.broken() is None
