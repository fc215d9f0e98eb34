"""simplify, mechanism by mechanism: what must go, what must stay, and the same bits from what is left."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import CONTEXT, apply, assert_same, interface, node_count, operators

from onnxslim import model as model_io
from onnxslim.passes.simplify import Simplify

RNG = np.random.default_rng(0)


def build(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return proto


def feeds(proto: onnx.ModelProto, seed: int, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs; ``sizes`` give the named dimensions (3 where not said)."""
    rng = np.random.default_rng(seed)
    result = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or sizes.get(d.dim_param, 3) for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        result[value.name] = np.asarray(rng.normal(size=shape) * 3).astype(dtype)
    return result


def check(proto: onnx.ModelProto, expected: list[str], **sizes: int) -> onnx.ModelProto:
    """``proto`` becomes ``expected`` (in any order), computes the same bits, and is not changed a second time."""
    result, _ = apply(proto, "simplify")
    assert sorted(operators(result)) == sorted(expected)
    assert interface(result) == interface(apply(proto, "")[0])
    for seed in range(2):
        assert_same(proto, result, feeds(proto, seed, **sizes), rtol=0)
        assert_same(proto, result, feeds(proto, seed, **{k: v + 2 for k, v in sizes.items()}), rtol=0)
    again, (outcome,) = apply(result, "simplify")
    assert not outcome.stats
    assert operators(again) == operators(result)
    return result


NO_OPS = [
    ("a = Identity(x)", {}),
    ("a = Cast<to=1>(x)", {}),
    ("a = Dropout(x)", {}),
    ("a = Transpose<perm=[0, 1, 2]>(x)", {}),
    ("b = Transpose<perm=[1, 0, 2]>(x) a = Transpose<perm=[1, 0, 2]>(b)", {}),
    ("s = Shape(x) a = Reshape(x, s)", {}),
    ("a = Reshape(x, s)", {"s": np.array([0, -1, 4])}),
    ("b = Reshape(x, s) a = Reshape(b, t)", {"s": np.array([-1, 4]), "t": np.array([-1, 3, 4])}),
    ("b = Unsqueeze(x, k) a = Squeeze(b, k)", {"k": np.array([1])}),
    ("a = Slice(x, s, e)", {"s": np.array([0, 0]), "e": np.array([2**62, 3])}),
    ("a = Pad(x, p)", {"p": np.zeros(6, np.int64)}),
    ("a = Expand(x, s)", {"s": np.array([1, 3, 1])}),
    ("a = Tile(x, s)", {"s": np.array([1, 1, 1])}),
    ("a = Concat<axis=1>(x)", {}),
    ("a = Mul(one, x)", {"one": np.ones((3, 1), np.float32)}),
    ("a = Div(x, one)", {"one": np.float32(1)}),
    ("a = Sub(x, zero)", {"zero": np.zeros(4, np.float32)}),
    ("a = Add(x, zero)", {"zero": np.float32(-0.0)}),
    ("a = Max(x)", {}),
    ("b = Neg(x) a = Neg(b)", {}),
    ("b = Gather<axis=1>(x, i) a = Identity(b)", {"i": np.array([0, 1, 2])}),
    ("b = Cast<to=11>(x) a = Cast<to=1>(b)", {}),
    ("a = ReduceSum(x, k)", {"k": np.array([], np.int64)}),
    ("b = Unsqueeze(x, k) c = ReduceMean<axes=[0]>(b) a = Squeeze(c, k)", {"k": np.array([0])}),
]


@pytest.mark.parametrize(("text", "weights"), NO_OPS, ids=[text for text, _ in NO_OPS])
def test_what_changes_nothing_goes(text: str, weights: dict[str, np.ndarray]) -> None:
    text = text.replace("ReduceSum(", "ReduceSum<noop_with_empty_axes=1>(")
    proto = build("(float[n, 3, 4] x) => (float[a, b, c] y) { " + text + " y = Sin(a) }", **weights)
    check(proto, ["Sin"], n=2)


KEPT = [
    ("a = Add(x, k)", {"k": np.float32(0)}),  # turns -0 into +0
    ("a = Mul(x, k)", {"k": np.ones((1, 1, 1, 1), np.float32)}),
    ("a = Transpose<perm=[1, 0, 2]>(x)", {}),
    ("a = Slice(x, s, e, k, t)", {k: np.array([v]) for k, v in zip("sekt", (-1, -(2**62), 0, -1), strict=True)}),
    ("a = Pad(x, p)", {"p": np.array([1, 0, 0, -1, 0, 0])}),
    ("b = Cast<to=10>(x) a = Cast<to=1>(b)", {}),
    ("c = Cast<to=11>(x) d = Cast<to=8>(c) a = Cast<to=1>(d)", {}),  # text shows more digits of a double
    ("a = Squeeze(x, none)", {"none": np.zeros(0, np.int64)}),
    ("a = Resize(x, none, k)", {"none": np.zeros(0, np.float32), "k": np.array([1, 1.1, 1], np.float32)}),
    ("a = LpPool<kernel_shape=[1]>(x)", {}),
    ("q = QuantizeLinear(x, k) a = DequantizeLinear(q, k)", {"k": np.float32(0.1)}),
]


@pytest.mark.parametrize(("text", "weights"), KEPT, ids=[text for text, _ in KEPT])
def test_what_changes_something_stays(text: str, weights: dict[str, np.ndarray]) -> None:
    proto = build("(float[n, 3, 4] x) => (float[a] y) { " + text + " y = Sin(a) }", **weights)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    check(proto, operators(proto), n=2)


def test_a_computed_target_becomes_a_constant_one() -> None:
    proto = build(
        """(float[batch, sequence, 12] x) => (float[batch, a, sequence, b] y) {
            s = Shape(x)
            n = Gather(s, zero)
            m = Gather(s, one)
            p = Unsqueeze(n, axis)
            q = Unsqueeze(m, axis)
            t = Concat<axis=0>(p, q, heads)
            r = Reshape(x, t)
            y = Transpose<perm=[0, 2, 1, 3]>(r)
        }""",
        zero=np.array(0),
        one=np.array(1),
        axis=np.array([0]),
        heads=np.array([3, 4]),
    )
    result = check(proto, ["Reshape", "Transpose"], batch=2, sequence=5)
    assert numpy_helper.to_array(result.graph.initializer[0]).tolist() == [0, 0, 3, 4]


def test_a_target_with_two_sizes_out_of_place_stays_computed() -> None:
    proto = build(
        """(float[n, m, 12] x) => (float[m, n, 12] y) {
            s = Shape(x)
            t = Gather(s, order)
            y = Reshape(x, t)
        }""",
        order=np.array([1, 0, 2]),
    )
    check(proto, ["Shape", "Gather", "Reshape"], n=2, m=5)


def test_a_value_that_others_read_is_not_computed_twice() -> None:
    proto = build(
        """(float[n, 3, 4] x) => (float[n, 4] y, float[n, 1, 4] z) {
            a = ReduceMax<axes=[1]>(x)
            y = Squeeze(a, k)
            z = Sin(a)
        }""",
        k=np.array([1]),
    )
    check(proto, ["ReduceMax", "Squeeze", "Sin"], n=2)


def test_sizes_that_must_be_computed_take_few_nodes() -> None:
    proto = build(
        """(float[batch, sequence, 12] x) => (float[batch, sequence, 5] y) {
            s = Shape(x)
            n = Gather(s, zero)
            m = Gather(s, one)
            p = Unsqueeze(n, axis)
            q = Unsqueeze(m, axis)
            t = Concat<axis=0>(p, q, five)
            y = ConstantOfShape(t)
        }""",
        zero=np.array(0),
        one=np.array(1),
        axis=np.array([0]),
        five=np.array([5]),
    )
    check(proto, ["Shape", "Concat", "ConstantOfShape"], batch=2, sequence=4)


def test_sizes_that_double_become_scales() -> None:
    proto = build(
        """(float[n, 3, h, w] x) => (float[n, 3, a, b] y) {
            s = Shape(x)
            c = Slice(s, k0, k2, k0)
            d = Slice(s, k2, k4, k0)
            e = Mul(d, k2)
            t = Concat<axis=0>(c, e)
            y = Resize<mode="nearest">(x, none, none, t)
        }""",
        k0=np.array([0]),
        k2=np.array([2]),
        k4=np.array([4]),
        none=np.zeros(0, np.float32),
    )
    check(proto, ["Resize"], n=1, h=4, w=5)


def test_a_decided_branch_takes_the_place_of_its_if() -> None:
    proto = build(
        """(float[n, 4] x) => (float[a, b] y, float[c, d] z) {
            s = Shape(x)
            r = Size(s)
            two = Equal(r, k)
            y, z = If(two) <
                then_branch = yes () => (float[p, q] a, float[p, q] b) { t = Sin(x) a = Exp(t) b = Identity(x) },
                else_branch = no () => (float[p, q] c, float[p, q] d) { c = Neg(x) d = Cos(x) }
            >
        }""",
        k=np.array(2),
    )
    check(proto, ["Sin", "Exp", "Identity"], n=2)


def test_branches_with_the_same_names_can_both_be_inlined() -> None:
    branch = "then_branch = yes () => (float[n] a) { t = Sin(x) a = Exp(t) }"
    branch += ", else_branch = no () => (float[n] b) { b = Neg(x) }"
    proto = build(
        "(float[n] x) => (float[n] y) { p = If(on) < "
        + branch
        + " > q = If(on) < "
        + branch.replace("Exp", "Abs")
        + " > y = Sub(p, q) }",
        on=np.array(True),
    )
    check(proto, ["Sin", "Exp", "Abs", "Sub"], n=2)


def test_a_loop_stays_and_its_body_is_simplified() -> None:
    proto = build(
        """(float[4] x) => (float[4] y) {
            y = Loop<body = body (int64 i, bool c, float[4] v) => (bool d, float[4] w) {
                d = Identity(c)
                k = Exp(u)
                l = Mul(one, v)
                m = Identity(l)
                w = Mul(m, k)
            }>(trips, go, x)
        }""",
        trips=np.array(3),
        go=np.array(True),
        u=np.array([1, 2, 3, 4], np.float32),
        one=np.float32(1),
    )
    result = check(proto, ["Loop"])
    assert node_count(result) == 1 + 2 + 1  # Identity of the condition; v has no shape there, so Mul by one stays


def test_captured_values_survive() -> None:
    proto = build(
        """(bool c, float[4] x) => (float[4] y) {
            t = Identity(x)
            u = Sin(t)
            y = If(c) <
                then_branch = yes () => (float[4] a) { a = Mul(u, t) },
                else_branch = no () => (float[4] b) { b = Identity(u) }
            >
        }"""
    )
    result, _ = apply(proto, "simplify")
    assert sorted(operators(result)) == ["If", "Sin"]
    for value in (True, False):
        assert_same(proto, result, {"c": np.array(value), "x": np.arange(4, dtype=np.float32)}, rtol=0)


def test_inputs_and_outputs_that_are_the_same_tensor_keep_their_names() -> None:
    proto = build("(float[n] x) => (float[n] y, float[n] z) { y = Identity(x) t = Identity(x) z = Identity(t) }")
    check(proto, ["Identity", "Identity"], n=2)


def test_optional_outputs_that_nobody_reads_go() -> None:
    proto = build(
        """(float[1, 1, 8, 8] x) => (float[1, 1, 7, 7] y) {
            p, i = MaxPool<kernel_shape=[2, 2]>(x)
            y = Sin(p)
        }"""
    )
    result = check(proto, ["MaxPool", "Sin"])
    assert len(result.graph.node[0].output) == 1


def test_optional_outputs_that_are_read_stay() -> None:
    proto = build(
        """(float[1, 1, 8, 8] x) => (float[1, 1, 7, 7] y, int64[1, 1, 7, 7] z) {
            y, i = MaxPool<kernel_shape=[2, 2]>(x)
            z = Neg(i)
        }"""
    )
    check(proto, ["MaxPool", "Neg"])


def test_slices_that_leave_a_gap_stay() -> None:
    proto = build(
        """(float[n, 3] x) => (float[n, 1] y, float[n, 1] z) {
            y = Slice(x, k0, k1, k1)
            z = Slice(x, k1, k2, k1)
        }""",
        **{f"k{k}": np.array([k]) for k in range(3)},
    )
    check(proto, ["Slice", "Slice"], n=2)


PAIRS = [
    ("b = Slice(x, k0, k1, k0) a = Slice(b, k1, k2, k1)", ["Slice"]),
    ("b = Slice(x, k1, k2, k1) a = Squeeze(b, k1)", ["Gather"]),
    ("b = Gather<axis=1>(x, s1) a = Unsqueeze(b, k1)", ["Gather"]),
    ("b = Sin(x) c = Concat<axis=1>(b, x) a = Concat<axis=1>(x, c, b)", ["Concat", "Sin"]),
    ("b = ReduceSum(x, k1) a = Squeeze(b, k1)", ["ReduceSum"]),
    ("b = ReduceMean<axes=[1], keepdims=0>(x) a = Unsqueeze(b, k1)", ["ReduceMean"]),
    ("b = ArgMax<axis=1>(x) c = Squeeze(b, k1) a = Cast<to=1>(c)", ["ArgMax", "Cast"]),
    ("b = Reshape(x, r) a = Unsqueeze(b, k1)", ["Reshape"]),
    ("b = Transpose<perm=[1, 0, 2]>(x) a = Transpose<perm=[2, 1, 0]>(b)", ["Transpose"]),
    ("n = Less(x, x) o = Not(n) b = Sin(x) a = Where(o, b, x)", ["Less", "Sin", "Where"]),
    ("b = Slice(x, k0, k1, k1) c = Slice(x, k1, k3, k1) a = Concat<axis=1>(c, b)", ["Split", "Concat"]),
    ("s = Shape(x) b = Expand(f, s) a = Add(x, b)", ["Add"]),
    ("b = Cast<to=11>(x) a0 = Cast<to=7>(b) a = Cast<to=1>(a0)", ["Cast", "Cast"]),
]


@pytest.mark.parametrize(("text", "expected"), PAIRS, ids=[text for text, _ in PAIRS])
def test_two_nodes_that_are_one(text: str, expected: list[str]) -> None:
    proto = build(
        "(float[n, 3, 4] x) => (float y) { " + text + " y = Tan(a) }",
        **{f"k{k}": np.array([k]) for k in range(4)},
        s1=np.array(1),
        r=np.array([-1, 12]),
        f=np.float32(2),
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    check(proto, [*expected, "Tan"], n=2)


FOLLOWERS = {
    "Cast": ["y = Cast<to=11>(r)"],
    "Concat": ["y = Concat<axis=0>(r, r)"],
    "Flatten": ["y = Flatten<axis=0>(r)"],
    "Gather": ["y = Gather<axis=0>(r, zero)"],
    "Neg": ["y = Neg(r)"],
    "ReduceSum": ["y = ReduceSum(r, axes)"],
    "Reshape": ["y = Reshape(r, flat)"],
    "Slice": ["y = Slice(r, axes, flat, axes)"],
    "Split": ["y, z = Split<axis=0>(r, halves)"],
    "Squeeze": ["u = Unsqueeze(r, axes)", "y = Squeeze(u, axes)"],
    "Transpose": ["y = Transpose<perm=[1, 0]>(r)"],
    "Unsqueeze": ["y = Unsqueeze(r, axes)"],
    "Where": ["y = Where(mask, r, r)"],
}


@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("producer", ["RandomNormal", "RandomUniform"])
def test_a_value_made_of_nothing_can_be_read_by_anything(producer: str, follower: str) -> None:
    lines = [f"r = {producer}<shape=[2, 3]>()", *FOLLOWERS[follower]]
    kind = "double" if follower == "Cast" else "float"
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (bool[2, 3] mask) => ({kind} y)
        <int64 zero = {{0}}, int64[1] axes = {{0}}, int64[1] flat = {{-1}}, int64[2] halves = {{1, 1}}>
        {{ {" ".join(lines)} }}"""
    )
    result, _ = apply(model, "simplify,fold,fuse")
    assert operators(result)[0] == producer


def test_metadata_is_kept() -> None:
    proto = build("(float[n] x) => (float[n] y) { a = Identity(x) y = Sin(a) }")
    onnx.helper.set_model_props(proto, {"charset": "abc"})
    proto.doc_string, proto.producer_name = "about", "somebody"
    result, _ = apply(proto, "simplify")
    assert {p.key: p.value for p in result.metadata_props} == {"charset": "abc"}
    assert (result.doc_string, result.producer_name) == ("about", "somebody")


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 21])
def test_old_and_new_forms_of_the_operators(opset: int) -> None:
    axes = "k" if opset >= 13 else ""
    attribute = "" if opset >= 13 else "<axes=[0]>"
    call = f"Unsqueeze{attribute}(x{', ' + axes if axes else ''})"
    back = f"Squeeze{attribute}(u{', ' + axes if axes else ''})"
    proto = build(
        f"(float[n, 4] x) => (float[n, 4] y) {{ u = {call} v = {back} s = Shape(v) r = Reshape(v, s) y = Exp(r) }}",
        opset,
        **({"k": np.array([0])} if axes else {}),
    )
    check(proto, ["Exp"], n=2)


def test_the_last_step_has_a_number_that_old_operators_know() -> None:
    nodes = "a = Slice<starts=[-1], ends=[9], axes=[1]>(x) y = Squeeze<axes=[1]>(a)"
    text = f"(float[n, 5, 4] x) => (float[n, 4] y) {{ {nodes} }}"
    result = check(build(text, 9), ["Gather"], n=2)
    assert [numpy_helper.to_array(t).item() for t in result.graph.initializer] == [4]


def test_what_was_done_is_counted_and_what_was_left_is_named() -> None:
    proto = build(
        """(float[n, 64] x) => (float[n, 64] y) {
            e = Expand(w, s)
            i = Identity(x)
            a = MatMul(i, e)
            b = MatMul(i, e)
            y = Sub(a, b)
        }""",
        w=np.ones((1, 64), np.float32),
        s=np.array([64, 64]),
    )
    model = model_io.load(proto)
    outcome = Simplify().apply(model, CONTEXT)
    assert outcome.stats["no_ops"] == 1
    assert outcome.stats["merged"] == 1
    assert [s.node for s in outcome.skipped] == ["e"]


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("efficientnet_lite0", 111),
        ("minilm_l6", 218),
        ("ppocrv4_rec", 390),
        ("ppocrv4_det", 330),
        ("nudenet_320n", 310),
    ],
)
def test_real_models_are_left_with_few_nodes(name: str, nodes: int) -> None:
    path = Path("~/.cache/onnxslim/zoo").expanduser() / name / "model.onnx"
    model = model_io.load(path)
    Simplify().apply(model, CONTEXT)
    assert sum(1 for _ in model.graph.all_nodes()) <= nodes
