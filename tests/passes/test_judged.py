"""Passes that may lose something lose as much of a model that gives labels as of the same model that gives scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxslim

sys.path.insert(0, str(Path(__file__).parents[1]))
import nets
from nets import net, node, normal

PASSES = (
    "int8(measure=false)",
    "dynamic_int8(measure=false)",
    "cluster(bits=3, fidelity=0.8)",
    "sparsify",
    "prune(tolerance=0.2)",
    "prune(ratio=0.3)",
)


def _weight(*shape: int) -> np.ndarray:
    return (normal(*shape) / np.sqrt(shape[-2])).astype(np.float32)


def _model(*, lstm: bool, labels: bool) -> onnx.ModelProto:
    """Three layers; a few large numbers in the first weight make it a hard one."""
    first = _weight(32, 96)
    first[:, 0] *= 60
    weights = {"w1": first, "w2": _weight(96, 96), "w3": _weight(96, 24)}
    nodes = [node("MatMul", "x w1", "h1"), node("Tanh", "h1", "r1"), node("MatMul", "r1 w2", "h2")]
    if lstm:
        weights |= {"wl": _weight(1, 96, 384).transpose(0, 2, 1), "rl": _weight(1, 384, 96), "one": np.array([1])}
        nodes += [
            node("Unsqueeze", "h2 one", "steps"),
            node("LSTM", "steps wl rl", "each last", hidden_size=96),
            node("Squeeze", "each one", "flat"),
            node("Squeeze", "flat one", "r2"),
        ]
    else:
        nodes.append(node("Relu", "h2", "r2"))
    nodes += [node("MatMul", "r2 w3", "scores"), node("ArgMax", "scores", "label", axis=1, keepdims=0)]
    model = net(nodes if labels else nodes[:-1], {"x": [16, 32]}, weights, [])
    output = ("label", TensorProto.INT64, [16]) if labels else ("scores", TensorProto.FLOAT, [16, 24])
    model.graph.output.append(helper.make_tensor_value_info(*output))
    return model


@pytest.mark.parametrize(("passes", "lstm"), [*((passes, False) for passes in PASSES), (PASSES[0], True)])
def test_labels_lose_what_scores_lose(passes: str, lstm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, told = [{"x": part} for part in normal(24, 16, 32)], []
    for labels in (False, True):
        monkeypatch.setattr(nets, "RNG", np.random.default_rng(0))
        result = onnxslim.optimize(_model(lstm=lstm, labels=labels), passes, samples, bench=False, threads=1)
        assert result.exit_code == 0, result.report.warnings
        name = passes.partition("(")[0]
        stats = next(p for p in result.report.passes if p["name"] == name)["stats"]
        told.append({k: v for k, v in stats.items() if k.startswith(("fidelity", "error_", "removed", "int8_layers"))})
    scores, labelled = told
    assert scores
    assert labelled == pytest.approx(scores, rel=1e-3)
    lost = [1 - v if k == "fidelity" else v for k, v in scores.items() if k.startswith(("fidelity", "error_"))]
    assert min(lost) > 0, "nothing is lost that could be told"
