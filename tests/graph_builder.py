"""Builds small graphs node by node, with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and random weights; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def c(self, array: object, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.c(np.array(values, np.int64))

    def w(self, *shape: int, name: str = "", low: float = -1) -> str:
        return self.c(self.rng.uniform(low, 1, shape).astype(np.float32), name)

    def op(self, kind: str, *inputs: str, domain: str = "", name: str = "", **attributes: object) -> str:
        return self.ops(kind, 1, *inputs, domain=domain, name=name, **attributes)[0]

    def ops(self, kind: str, n: int, *inputs: str, domain: str = "", name: str = "", **attributes: object) -> list[str]:
        name = name or f"{kind}_{len(self.nodes)}"
        out = [f"{name}_{k}" for k in range(n)]
        self.nodes.append(helper.make_node(kind, list(inputs), out, name=name, domain=domain, **attributes))
        return out

    def conv(self, x: str, cin: int, cout: int, k: int = 3, group: int = 1, name: str = "") -> str:
        pad = [k // 2] * 4
        return self.op("Conv", x, self.w(cout, cin // group, k, k), self.w(cout), pads=pad, group=group, name=name)

    def dense(self, x: str, cin: int, cout: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.w(cin, cout)), self.w(cout))

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def heads(self, x: str, heads: int, width: int, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        """(N, T, heads * width) → (N, heads, T, width)."""
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, heads, width)), perm=list(perm))

    def attend(self, q: str, k: str, v: str) -> str:
        """softmax(q kᵀ) v for (N, heads, T, width)."""
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)

    def join(self, x: str, width: int) -> str:
        """(N, heads, T, width) → (N, T, heads * width)."""
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.ints(0, 0, width))

    def proto(self, *outputs: str, opset: int = 18) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            self.inputs,
            [onnx.ValueInfoProto(name=name, type=onnx.TypeProto(tensor_type={"elem_type": 1})) for name in outputs],
            self.weights,
        )
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def image(b: Builder, channels: int = 3, size: int = 6) -> str:
    return b.input("x", "n", channels, size, size)


def tokens(b: Builder, width: int = 6, length: int | str = "t") -> str:
    return b.input("x", "n", length, width)
