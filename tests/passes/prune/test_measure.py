"""What is measured about channels, on operands of any rank."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import node, normal


@pytest.mark.parametrize("passes", ["prune", "prune(ratio=0.3)"])
def test_a_product_of_operands_of_different_ranks_is_measured(passes: str) -> None:
    """The table of an embedding is the weight of the last layer too, as in language models."""
    nodes = [
        node("Gather", "table ids", "rows"),
        node("Transpose", "table", "turned", perm=[1, 0]),
        node("MatMul", "rows turned", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 128])],
        [numpy_helper.from_array(normal(128, 64), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ids = np.random.default_rng(0).integers(0, 128, (12, 6))
    result = onnxslim.optimize(model, passes, {"ids": ids}, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    assert result.report.passes[-1]["stats"]["families"] == 1
    if passes != "prune":
        (table,) = result.proto().graph.initializer
        assert table.dims[0] == 128
        assert table.dims[1] < 64
