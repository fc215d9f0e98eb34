"""Every node case of the onnx package through the lossless passes: the same outputs, and nothing left to do after."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from node_corpus import cases, loaded, with_constants

from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import count_nodes, opset
from onnxslim.pipeline import parse

# Their outputs are drawn at random, or depend on a seed that only one session knows.
RANDOM = ("bernoulli", "multinomial", "random")


def signature(model: ir.Model) -> list[Any]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(v.name, v.type, None if v.shape is None else tuple(str(d) for d in v.shape)) for v in values]


def run(proto: onnx.ModelProto, inputs: list[Any]) -> list[Any] | None:
    """The outputs in ONNX Runtime, or None where it cannot run the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {value.name: array for value, array in zip(proto.graph.input, inputs, strict=True)}
        return session.run(None, feeds)
    except Exception:  # the binding raises a dozen unrelated types
        return None


def equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == np.float16:
        # ONNX Runtime computes a chain of float16 operators in float32; a constant in the chain is rounded.
        return bool(np.allclose(a, b, rtol=2e-3, atol=2e-3, equal_nan=True))
    if a.dtype.kind in "fc":
        return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool(np.array_equal(a, b))


@functools.cache
def corpus() -> list[tuple[str, ir.Model, list[Any]]]:
    """Every variant of every case that can be loaded: (name, model, inputs)."""
    return [
        (f"{name} (variant {k})", model, arrays)
        for index, (name, proto, inputs, _) in enumerate(cases())
        for k, (case, arrays) in enumerate(with_constants(proto, inputs, index))
        if (model := loaded(case)) is not None
    ]


def fingerprint(model: ir.Model) -> list[Any]:
    """Equal before and after a pass that does nothing (a clone has a fingerprint of its own)."""
    nodes = [(id(n), n.op_type, *map(id, n.inputs), *(v.name for v in n.outputs)) for n in model.graph.all_nodes()]
    return [*nodes, *((v.name, id(v.const_value)) for v in model.graph.initializers.values())]


@pytest.mark.parametrize("text", ["simplify", "simplify,fold,fuse"])
def test_every_node_case_keeps_its_outputs(text: str) -> None:
    passes = parse(text)
    tolerance = 0.0 if text == "simplify" else 1e-5
    context = Context(Data("none", 0, lambda k: {}, []), synthetic=True, threads=1)
    failures, rewritten, compared = [], 0, 0
    for name, source, arrays in corpus():
        model = source.clone()
        nodes, before, untouched = count_nodes(model), signature(model), fingerprint(model)
        for item in passes:
            item.apply(model, context)
        if fingerprint(model) == untouched:
            continue
        rewritten += 1
        if count_nodes(model) > nodes:
            failures.append(f"{name}: {nodes} nodes became {count_nodes(model)}")
        if signature(model) != before:
            failures.append(f"{name}: inputs or outputs changed")
        once = fingerprint(model)
        for item in passes:
            item.apply(model, context)
        if fingerprint(model) != once:
            failures.append(f"{name}: a second application changed something")
        expected = None if any(word in name for word in RANDOM) else run(model_io.to_proto(source), arrays)
        if expected is None:
            continue
        compared += 1
        got = run(model_io.to_proto(model), arrays)
        if got is None or not equal(expected, got, tolerance):
            failures.append(f"{name}: opset {opset(model)}: other outputs")
    assert not failures, "\n".join(failures)
    assert len(cases()) > 1500
    assert rewritten > 400
    assert compared > 300
