"""One product in a Q/DQ group, whole or with a defect planted, and other tools' output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxslim import runtime

SIZE = 32
OPS = ("Conv", "Gemm", "MatMul")
RIGHT_AXIS = {"Conv": 0, "Gemm": 1, "MatMul": 1}


def group(
    op: str = "Conv",
    *,
    storage: Any = np.uint8,
    axis: int | None = None,
    scales_along: int | None = None,
    relu: str | None = "Relu",
    store: bool = True,
    bias: str | None = "int32",
    bias_scale: float = 1.0,
    readers: int = 1,
    extra_reader: bool = False,
    zero_point: int | None = None,
    add_row: bool = False,
    per_tensor: bool = False,
    copies: int = 1,
) -> onnx.ModelProto:
    """``x`` → Q → DQ → product → Relu → Q → DQ → ``y``; the weight is square, in 7 bits: no CPU saturates.

    Weights have 7 bits, so that kernels without VNNI, which add two products in 16 bits, compute the same.

    Args:
        axis: what the DequantizeLinear of the weight names; ``scales_along`` is the axis they really belong to.
        readers: of the stored input, the product included (the others give more outputs).
        extra_reader: something besides the QuantizeLinear reads the result.
        copies: how many such products stand one behind the other.
    """
    rng = np.random.default_rng(7)
    right = RIGHT_AXIS[op]
    axis = right if axis is None else axis
    along = right if scales_along is None else scales_along
    constants: dict[str, np.ndarray] = {"x_s": np.float32(3.5 / 127), "x_z": storage(128 if storage is np.uint8 else 0)}
    low = 0 if storage is np.uint8 else -128
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_s", "x_z"], ["d0"]),
    ]
    outputs = ["y"]
    step = constants["x_s"]
    for k in range(copies):
        weight = rng.standard_normal((SIZE, SIZE, 3, 3) if op == "Conv" else (SIZE, SIZE)) / (9 if op == "Conv" else 4)
        weight = weight * rng.uniform(0.3, 3, SIZE).reshape([-1 if i == along else 1 for i in range(weight.ndim)])
        others = tuple(i for i in range(weight.ndim) if i != along or per_tensor)
        scale = (np.abs(weight).max(axis=others, keepdims=True) / 63).astype(np.float32)
        flat = scale.reshape(()) if per_tensor else scale.reshape(-1)
        constants |= {f"w{k}_q": np.rint(weight / scale).astype(np.int8), f"w{k}_s": flat}
        constants |= {f"w{k}_z": np.zeros(flat.shape, np.int8)}
        row = rng.standard_normal(SIZE).astype(np.float32)
        bias_step = (step * flat * bias_scale).astype(np.float32)
        constants |= {f"b{k}_q": np.rint(row / bias_step).astype(np.int32), f"b{k}_s": np.asarray(bias_step)}
        constants |= {f"b{k}_z": np.zeros(flat.shape, np.int32), f"b{k}": row, f"row{k}": row}
        nodes.append(helper.make_node("DequantizeLinear", [f"w{k}_q", f"w{k}_s", f"w{k}_z"], [f"w{k}"], axis=axis))
        inputs = [f"d{k}", f"w{k}"]
        if op != "MatMul" and bias == "int32":
            nodes.append(helper.make_node("DequantizeLinear", [f"b{k}_q", f"b{k}_s", f"b{k}_z"], [f"bd{k}"], axis=0))
            inputs.append(f"bd{k}")
        elif op != "MatMul" and bias == "float":
            inputs.append(f"b{k}")
        pads = {"pads": [1, 1, 1, 1]} if op == "Conv" else {}
        nodes.append(helper.make_node(op, inputs, [f"c{k}"], name=f"layer{k}", **pads))
        last = f"c{k}"
        if add_row:
            nodes.append(helper.make_node("Add", [last, f"row{k}"], [f"a{k}"], name=f"add{k}"))
            last = f"a{k}"
        if relu is not None:
            limits = [f"low{k}", f"high{k}"] if relu == "Clip" else []
            constants |= {f"low{k}": np.float32(0), f"high{k}": np.float32(6)} if limits else {}
            nodes.append(helper.make_node(relu, [last, *limits], [f"r{k}"], name=f"relu{k}"))
            last = f"r{k}"
        if extra_reader:
            nodes.append(helper.make_node("Neg", [last], [f"n{k}"]))
            outputs.append(f"n{k}")
        if store:
            step = np.float32(0.04)
            constants |= {f"y{k}_s": step, f"y{k}_z": storage(low if zero_point is None else zero_point)}
            nodes.append(helper.make_node("QuantizeLinear", [last, f"y{k}_s", f"y{k}_z"], [f"y{k}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"y{k}_q", f"y{k}_s", f"y{k}_z"], [f"d{k + 1}"]))
            last = f"d{k + 1}"
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    for k in range(1, readers):
        nodes.append(helper.make_node("Abs", ["d0"], [f"more{k}"]))
        outputs.append(f"more{k}")
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "group",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE, 6, 6] if op == "Conv" else [4, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feed(op: str, seed: int = 0) -> dict[str, np.ndarray]:
    """An input of the model that `group` gives."""
    shape = (1, SIZE, 6, 6) if op == "Conv" else (4, SIZE)
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


# Every defect by name: the rule that it breaks, and the arguments of `group` that plant it.
DEFECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wrong axis named": ("weight-axis", {"axis": "wrong"}),
    "scales along the wrong axis": ("weight-axis", {"axis": "wrong", "scales_along": "wrong"}),
    "wrong bias scale": ("bias-scale", {"bias_scale": 3.0}),
    "s8 with two readers": ("signed-fan-out", {"storage": np.int8, "readers": 2}),
    "symmetric s8 before Relu": ("saturation", {"storage": np.int8, "zero_point": 0}),
    "symmetric s8 before Clip": ("saturation", {"storage": np.int8, "zero_point": 0, "relu": "Clip"}),
    "zero point before Relu": ("saturation", {"zero_point": 20}),
    "range beyond Clip": ("saturation", {"relu": "Clip"}),
    "missing output Q": ("no-store", {"store": False}),
    "second reader of the result": ("several-readers", {"extra_reader": True}),
    "float bias without Q": ("float-bias", {"store": False, "relu": None, "bias": "float"}),
    "row behind a MatMul": ("matmul-add", {"store": False, "relu": None, "add_row": True}),
}


def _can_have(op: str, rule: str) -> bool:
    """Whether a product of this kind can break a rule."""
    only = {
        "float-bias": {"Gemm"},
        "matmul-add": {"MatMul"},
        "several-readers": {"Conv"},
        "bias-scale": {"Conv", "Gemm"},
    }
    return op in only.get(rule, OPS)


# Every operator with every defect that it can have.
PLANTED = [(op, defect) for op in OPS for defect, (rule, _) in DEFECTS.items() if _can_have(op, rule)]


def planted(op: str, defect: str) -> onnx.ModelProto:
    """`group` with a defect, one of `PLANTED`."""
    wrong = 1 - RIGHT_AXIS[op]
    return group(op, **{k: wrong if v == "wrong" else v for k, v in DEFECTS[defect][1].items()})


def outputs(proto: onnx.ModelProto, op: str, *, optimize: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of a model that `group` gave: by its integer kernels, or as the file says."""
    return runtime.load(proto.SerializeToString(), optimize=optimize)(feed(op, seed))


def gap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest relative L2 distance of an output of ``other`` from that of ``one``."""
    assert list(one) == list(other)
    return max(float(np.linalg.norm(other[n] - a) / np.linalg.norm(a)) for n, a in one.items())
