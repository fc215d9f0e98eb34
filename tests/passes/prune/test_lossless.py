"""What can leave without effect is found and leaves; what only looks like it stays."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal

from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.passes.prune import Prune

WIDTH = 12


def _weights() -> dict[str, np.ndarray]:
    return {
        "w1": normal(WIDTH, 3, 3, 3), "b1": normal(WIDTH), "wd": normal(WIDTH, 1, 3, 3), "bd": normal(WIDTH),
        "w2": normal(6, WIDTH, 1, 1), "b2": normal(6), "wg": normal(4, 6), "bg": normal(4),
    }  # fmt: skip


def _cnn(weights: dict[str, np.ndarray], *, pad: int = 0) -> onnx.ModelProto:
    """Conv - Relu - depthwise - Relu - Conv 1x1 (or padded) - Relu - pool - Flatten - Gemm."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 wd bd", "c2", pads=[1] * 4, group=WIDTH),
        node("Relu", "c2", "r2"),
        node("Conv", "r2 w2 b2", "c3", pads=[pad] * 4),
        node("Relu", "c3", "r3"),
        node("GlobalAveragePool", "r3", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f wg bg", "y", transB=1),
    ]
    return net(nodes, {"x": ["n", 3, 8, 8]}, weights, {"y": ["n", 4]})


def _pruned(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes of the weights afterwards, and what the pass counted; outputs must be the same."""
    loaded = model_io.load(model)
    rng = np.random.default_rng(3)
    samples = [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
    ctx = Context(data_io.open_data(samples, data_io.input_specs(loaded)), threads=1)
    outcome = Prune(lossless=True).apply(loaded, ctx)
    before, after = (runtime.load(m, threads=1) for m in (model_io.load(model), loaded))
    for sample in samples:
        np.testing.assert_allclose(after(sample)["y"], before(sample)["y"], rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(value.shape.numpy()) for name, value in loaded.graph.initializers.items() if value.shape}
    return shapes, outcome.stats


def test_nothing_leaves_a_network_without_free_channels() -> None:
    shapes, stats = _pruned(_cnn(_weights()))
    assert shapes == {name: a.shape for name, a in _weights().items()}
    assert stats["dead"] == stats["copies"] == 0


def test_dead_producers_leave() -> None:
    weights = _weights()
    weights["w1"][:3], weights["b1"][:3], weights["bd"][:3] = 0, -1, -1
    shapes, stats = _pruned(_cnn(weights))
    assert stats["dead"] == 3
    assert (shapes["w1"][0], shapes["wd"][0], shapes["w2"][1]) == (9, 9, 9)


def test_what_nobody_reads_leaves_and_what_fed_it_follows() -> None:
    weights = _weights()
    weights["wg"][:, 2] = 0  # nobody reads channel 2 of c3
    weights["w2"][:, 5] = 0
    weights["w2"][2, 7] = 1
    weights["w2"][[0, 1, 3, 4, 5], 7] = 0  # channel 7 of r2 feeds channel 2 alone
    shapes, _ = _pruned(_cnn(weights))
    assert shapes["wg"] == (4, 5)
    assert shapes["w2"] == (5, 10, 1, 1)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_constant_moves_into_the_bias_unless_padding_cuts_it(pad: int) -> None:
    weights = _weights()
    weights["wd"][4], weights["bd"][4] = 0, 2.5  # r2's channel 4 is 2.5 everywhere
    shapes, stats = _pruned(_cnn(weights, pad=pad))
    assert shapes["w2"][1] == (WIDTH if pad else WIDTH - 1)
    assert stats["dead"] == (0 if pad else 1)


def test_copies_are_merged_into_one() -> None:
    weights = _weights()
    for name in ("w1", "b1", "wd", "bd"):
        weights[name][[2, 9]] = weights[name][6]
    shapes, stats = _pruned(_cnn(weights))
    assert stats["copies"] == 2
    assert shapes["wd"][0] == WIDTH - 2


@pytest.mark.parametrize("name", ["w1", "b1", "wd", "bd"])
def test_what_differs_anywhere_is_no_copy(name: str) -> None:
    weights = _weights()
    for key in ("w1", "b1", "wd", "bd"):
        weights[key][2] = weights[key][6]
    weights[name][2] *= np.float32(1.001)
    assert _pruned(_cnn(weights))[0]["wd"][0] == WIDTH


def test_one_channel_stays_where_all_are_free() -> None:
    weights = _weights()
    weights["w2"][:] = 0
    assert _pruned(_cnn(weights))[0]["wd"][0] == 1


def test_bounds_that_are_attributes_count() -> None:
    """Channels that are one number in front of a Clip are another behind it."""
    weights = _weights()
    weights["w1"][[2, 5]], weights["b1"][[2, 5]] = 0, [-2, 9]
    weights["wd"][[2, 5]], weights["bd"][[2, 5]] = 0, [-3, 8]
    model = _cnn(weights)
    for clip in (n for n in model.graph.node if n.op_type == "Relu"):
        clip.op_type = "Clip"
        clip.attribute.extend([onnx.helper.make_attribute("min", 0.0), onnx.helper.make_attribute("max", 6.0)])
    model.opset_import[0].version = 10
    shapes, stats = _pruned(model)
    assert stats["dead"] == 2 and shapes["w1"][0] == WIDTH - 2
