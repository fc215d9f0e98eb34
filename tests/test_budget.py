"""What a plan leaves is counted without building it: the count is held to that of the model that is really cut."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node, normal

from onnxslim import budget, cost, coupling
from onnxslim import model as model_io


def _cnn() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        node("Conv", "x w1", "c1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 wd", "c2", pads=[1] * 4, group=8),
        node("Conv", "r1 w2", "c3", strides=[2, 2]),
        node("Conv", "c2 w3", "c4", strides=[2, 2]),
        node("Concat", "c3 c4", "c", axis=1),
        node("ConvTranspose", "c wt", "t"),
        node("GlobalAveragePool", "t", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f wg", "y", transB=1),
    ]
    weights = {
        "w1": normal(8, 3, 3, 3), "wd": normal(8, 1, 3, 3), "w2": normal(6, 8, 1, 1), "w3": normal(4, 8, 1, 1),
        "wt": normal(10, 5, 2, 2), "wg": normal(4, 5),
    }  # fmt: skip
    return net(nodes, {"x": [1, 3, 8, 8]}, weights, {"y": [1, 4]}), {"x": normal(1, 3, 8, 8)}


def _attention() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    nodes = [
        *(node("MatMul", f"x w{n}", n) for n in "qkv"),
        *(node("Reshape", f"{n} split", f"{n}s") for n in "qkv"),
        node("Transpose", "qs", "qt", perm=[0, 2, 1, 3]),
        node("Transpose", "ks", "kt", perm=[0, 2, 3, 1]),
        node("Transpose", "vs", "vt", perm=[0, 2, 1, 3]),
        node("MatMul", "qt kt", "s"),
        node("Softmax", "s", "a", axis=-1),
        node("MatMul", "a vt", "o"),
        node("Transpose", "o", "ot", perm=[0, 2, 1, 3]),
        node("Reshape", "ot join", "oj"),
        node("MatMul", "oj wo", "y"),
    ]
    weights = {f"w{n}": normal(6, 16) for n in "qkv"} | {"wo": normal(16, 6)}
    shapes = {"split": np.array([0, 0, 4, 4]), "join": np.array([0, 0, 16])}
    return net(nodes, {"x": [1, 5, 6]}, weights | shapes, {"y": [1, 5, 6]}), {"x": normal(1, 5, 6)}


def _beside_nothing() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Products with a weight that has no elements, over an input of no size, are added to the others."""
    nodes = [
        node("MatMul", "none w0", "m0"),
        node("MatMul", "x w1", "m1"),
        node("Add", "m0 m1", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r w2", "b"),
        node("Relu", "b", "s"),
        node("MatMul", "s w3", "c"),
        node("Relu", "c", "t"),
        node("MatMul", "t w4", "y"),
    ]
    weights = {"w0": normal(0, 8), "w1": normal(6, 8), "w2": normal(8, 7), "w3": normal(7, 5), "w4": normal(5, 4)}
    return net(nodes, {"x": [3, 6], "none": [3, 0]}, weights, {"y": [3, 4]}), {
        "x": normal(3, 6),
        "none": normal(3, 0),
    }


@pytest.mark.parametrize("build", [_cnn, _attention, _beside_nothing])
def test_counts_are_those_of_the_cut_model(build: object) -> None:
    proto, feed = build()  # type: ignore[operator]
    coupled = coupling.analyze(model_io.load(proto), feed, threads=1)
    families = coupled.families
    assert len(families) > 2
    shapes = budget.Shapes(coupled, families)
    counted = [budget.parameters(coupled, families, shapes), budget.macs(coupled, families, shapes, feed)]
    rng = np.random.default_rng(0)
    for _ in range(6):
        removed = [int(rng.integers(0, len(f.atoms))) for f in families]
        cut = model_io.load(proto)
        atoms = np.concatenate([f.atoms[:m] for f, m in zip(families, removed, strict=True)])
        coupling.analyze(cut, feed, threads=1).remove(atoms)
        found = cost.analyze(cut, feed)
        assert [b(removed) for b in counted] == pytest.approx([found.parameters, found.macs])
