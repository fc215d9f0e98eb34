"""Seconds that `simplify` takes on graphs of growing size: the time per node should stay the same.

    python bench/simplify_scale.py [nodes ...]

The graph is a chain of attention-like blocks as exporters write them: shape arithmetic in front of every Reshape,
Transposes, constants to fold, equal weights, no-ops.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import count_nodes
from onnxslim.passes.simplify import Simplify

WIDTH, HEADS = 16, 4


def block(k: int, x: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """21 nodes that split ``x`` (batch, sequence, width) into heads, mix them and put them together again."""
    n = f"b{k}_"
    make = helper.make_node
    rng = np.random.default_rng(k % 7)
    weights = [
        numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), n + "w"),
        numpy_helper.from_array(np.ones((WIDTH,), np.float32), n + "one"),
        numpy_helper.from_array(np.full((WIDTH, 1), 0.5, np.float32), n + "half"),
        *(numpy_helper.from_array(np.array(v), n + f"i{v}") for v in (0, 1)),
        numpy_helper.from_array(np.array([0]), n + "axis"),
        numpy_helper.from_array(np.array([HEADS, WIDTH // HEADS]), n + "heads"),
        numpy_helper.from_array(np.array([-1]), n + "rest"),
    ]
    nodes = [
        make("Mul", [n + "w", n + "half"], [n + "ws"]),
        make("MatMul", [x, n + "ws"], [n + "p"]),
        make("Mul", [n + "p", n + "one"], [n + "q"]),
        make("Identity", [n + "q"], [n + "r"]),
        make("Shape", [x], [n + "s"]),
        make("Gather", [n + "s", n + "i0"], [n + "g0"]),
        make("Unsqueeze", [n + "g0", n + "axis"], [n + "u0"]),
        make("Shape", [n + "r"], [n + "s1"]),
        make("Gather", [n + "s1", n + "i1"], [n + "g1"]),
        make("Unsqueeze", [n + "g1", n + "axis"], [n + "u1"]),
        make("Concat", [n + "u0", n + "u1", n + "heads"], [n + "target"], axis=0),
        make("Reshape", [n + "r", n + "target"], [n + "split"]),
        make("Transpose", [n + "split"], [n + "t"], perm=[0, 2, 1, 3]),
        make("Relu", [n + "t"], [n + "e"]),
        make("Transpose", [n + "e"], [n + "back"], perm=[0, 2, 1, 3]),
        make("Concat", [n + "u0", n + "u1", n + "rest"], [n + "join"], axis=0),
        make("Reshape", [n + "back", n + "join"], [n + "o"]),
        make("Sigmoid", [n + "o"], [n + "g"]),
        make("Sigmoid", [n + "o"], [n + "h"]),
        make("Mul", [n + "g", n + "h"], [n + "m"]),
        make("Add", [x, n + "m"], [n + "y"]),
    ]
    return nodes, weights, n + "y"


def chain(nodes: int) -> onnx.ModelProto:
    """A model of about ``nodes`` nodes."""
    all_nodes, all_weights, x = [], [], "x"
    for k in range(max(1, nodes // 21)):
        new, weights, x = block(k, x)
        all_nodes += new
        all_weights += weights
    graph = helper.make_graph(
        all_nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", WIDTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", "sequence", WIDTH])],
        all_weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Print the table."""
    print(f"{'nodes':>8} {'after':>8} {'load s':>8} {'simplify s':>11} {'µs per node':>12}")
    for size in [int(text) for text in sys.argv[1:]] or [1000, 5000, 20000]:
        proto = chain(size)
        start = time.perf_counter()
        model = model_io.load(proto)
        loaded = time.perf_counter()
        nodes = count_nodes(model)
        Simplify().apply(model, Context(Data("none", 0, lambda k: {}, []), synthetic=True, threads=1))
        done = time.perf_counter()
        seconds = done - loaded
        print(f"{nodes:8} {count_nodes(model):8} {loaded - start:8.2f} {seconds:11.2f} {1e6 * seconds / nodes:12.0f}")


if __name__ == "__main__":
    main()
