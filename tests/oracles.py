"""What a rewritten model is held against: its original, run by ONNX Runtime without any of the runtime's rewrites."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort

from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.data import Data
from onnxslim.pipeline import parse

CONTEXT = Context(Data("none", 0, lambda k: {}, []), synthetic=True, threads=1)


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs, computed on one thread with the optimizations of ONNX Runtime off."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))


def apply(proto: onnx.ModelProto, passes: str) -> tuple[onnx.ModelProto, list[Outcome]]:
    """``proto`` after loading and ``passes`` (as text; nothing is inserted), and what each pass said."""
    model = model_io.load(proto)
    outcomes = [item.apply(model, CONTEXT) for item in parse(passes)] if passes else []
    return model_io.to_proto(model), outcomes


def assert_same(
    original: onnx.ModelProto, rewritten: onnx.ModelProto, feeds: Mapping[str, np.ndarray], rtol: float = 1e-4
) -> None:
    """Same names, types, shapes and values; ``rtol`` is relative to the largest magnitude of each output."""
    want, got = run(original, feeds), run(rewritten, feeds)
    assert list(want) == list(got)
    for name, a in want.items():
        b = got[name]
        assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype}{a.shape} became {b.dtype}{b.shape}"
        if a.dtype.kind not in "fV" or not a.size:
            np.testing.assert_array_equal(a, b)
            continue
        finite = np.isfinite(a)
        np.testing.assert_array_equal(np.where(finite, 0, a), np.where(np.isfinite(b), 0, b), err_msg=name)
        scale = np.abs(a[finite]).max(initial=0.0)
        error = np.abs(a[finite].astype(np.float64) - b[finite].astype(np.float64)).max(initial=0.0)
        assert error <= rtol * scale + 1e-6, f"{name}: off by {error:.2e} where the largest value is {scale:.2e}"


def interface(proto: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    """Inputs and outputs with their types and shapes."""
    return (
        [value.SerializeToString(deterministic=True) for value in proto.graph.input],
        [value.SerializeToString(deterministic=True) for value in proto.graph.output],
    )


def operators(proto: onnx.ModelProto) -> list[str]:
    """Operators of the main graph, in order."""
    return [node.op_type for node in proto.graph.node]


def node_count(proto: onnx.ModelProto) -> int:
    """Nodes, those of subgraphs included."""

    def count(graph: onnx.GraphProto) -> int:
        inner = sum(count(a.g) for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
        return len(graph.node) + inner

    return count(proto.graph)
