"""Channels that are removed are channels that are masked: the same outputs, for every structure of channels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim import coupling, runtime
from onnxslim import model as model_io
from onnxslim.coupling import Coupling
from onnxslim.errors import ModelError
from onnxslim.graph import constant

# bench/ is no installed package: it is imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from coupled_graphs import CASES, Case
from graph_builder import Builder, image, tokens

from bench.oracle import TOLERANCE, difference, some_units


def feed(proto: onnx.ModelProto, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    free = {"n": batch, "t": 5}
    return {
        v.name: rng.standard_normal(
            [free[d.dim_param] if d.dim_param else d.dim_value for d in v.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for v in proto.graph.input
    }


def analyze(proto: onnx.ModelProto) -> Coupling:
    return coupling.analyze(model_io.load(proto), feed(proto, 1), threads=1)


def why(proto: onnx.ModelProto, weight: str) -> str:
    """Nothing of this weight can leave; the reason."""
    return analyze(proto).frozen()[weight]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_removed_is_masked(case: Case) -> None:
    proto = case.build()
    coupled = analyze(proto)
    families = coupled.families
    assert sorted(len(f.atoms) for f in families) == case.widths
    before = model_io.to_bytes(coupled.model)
    rng = np.random.default_rng(1)
    trials = [some_units([family], rng, 0) for family in families]
    trials += [some_units(families, rng, share) for share in (0, 0.5, 0.99)]
    feeds = [feed(proto, 1), feed(proto, 3, seed=1)]
    for atoms in trials:
        assert difference(coupled, atoms, feeds[0], feeds) <= TOLERANCE
    assert model_io.to_bytes(coupled.model) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_weight_of_a_family_shrinks(case: Case) -> None:
    proto = case.build()
    for k, family in enumerate(analyze(proto).families):
        pruned = analyze(proto)
        before = {name: tuple(v.shape) for name, v in pruned.model.graph.initializers.items()}
        pruned.remove(pruned.families[k].atoms[:1])
        assert family.weights and family.sites
        for value, axis in family.weights:
            now = constant(pruned.model.graph.initializers[value.name])
            assert now is not None and now.shape[axis] < before[value.name][axis]
        cut = {value.name for value, _ in family.weights}
        for name, value in pruned.model.graph.initializers.items():
            if name in before and name not in cut:
                assert tuple(value.shape) == before[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_mask_is_felt(case: Case) -> None:
    proto = case.build()
    coupled = analyze(proto)
    sample = feed(proto, 1)
    plain = runtime.load(coupled.model, threads=1)(sample)
    for family in coupled.families:
        masked = coupled.model.clone()
        coupling.mask(masked, coupled.sites, coupled.removed(family.atoms[:-1]))
        outputs = runtime.load(masked, threads=1)(sample)
        assert any(not np.allclose(plain[name], outputs[name]) for name in plain)


def test_everything_of_an_axis_cannot_be_removed() -> None:
    b = Builder()
    coupled = analyze(b.proto(b.conv(b.conv(image(b), 3, 8), 8, 2)))
    with pytest.raises(ModelError, match="leaves nothing of axis"):
        coupled.remove(coupled.families[0].atoms)


def test_inputs_and_outputs_keep_their_shapes() -> None:
    b = Builder()
    x = b.conv(image(b), 3, 8, name="first")
    coupled = analyze(b.proto(b.conv(x, 8, 2), x))
    assert not coupled.families
    assert coupled.frozen()["w0"] == "graph output first_0"
    b = Builder()
    coupled = analyze(b.proto(b.conv(image(b), 3, 2)))
    assert not coupled.families and not coupled.sites


def test_an_output_that_declares_another_rank_keeps_it() -> None:
    b = Builder()
    model = b.proto(b.op("Flatten", b.conv(b.conv(image(b), 3, 8), 8, 2)))
    declared = model.graph.output[0].type.tensor_type.shape.dim
    del declared[:]
    declared.add().dim_value = 1
    coupled = analyze(model)
    coupled.remove(coupled.families[0].atoms[:3])
    weight = next(v for v in coupled.labels if v.name == "w0")
    assert coupled.model.graph.outputs[0].shape == [1]
    assert np.shape(constant(weight))[0] == 5


def frozen_by(middle: Callable[[Builder, str], str], channels: int = 8) -> tuple[list[int], str]:
    """Conv 3 → 8, then ``middle``, then Conv → 2: the widths that can be cut, and why the first kernel stays."""
    b = Builder()
    x = middle(b, b.conv(image(b), 3, 8))
    coupled = analyze(b.proto(b.conv(x, channels, 2)))
    return [len(f.atoms) for f in coupled.families], coupled.frozen().get("w0", "")


def test_an_operator_without_a_rule_freezes_what_it_reads() -> None:
    b = Builder()
    x = b.conv(b.conv(image(b), 3, 8), 8, 6)
    x = b.op("FusedMatMul", x, b.w(6, 4), domain="com.microsoft", name="strange")
    coupled = analyze(b.proto(b.conv(x, 6, 2)))
    assert [len(f.atoms) for f in coupled.families] == [8]
    assert coupled.frozen()["w3"] == coupled.frozen()["w4"] == "FusedMatMul strange: no rule for this operator"


def test_an_operator_that_cannot_run_is_an_error() -> None:
    b = Builder()
    x = b.op("Strange", b.conv(image(b), 3, 8), domain="com.foo", name="strange")
    with pytest.raises(ModelError, match="Strange"):
        analyze(b.proto(b.conv(x, 8, 2)))


def test_what_a_subgraph_captures_stays() -> None:
    b = Builder()
    x = b.conv(b.conv(image(b), 3, 8), 8, 4)
    bodies = []
    for kind in ("Relu", "Neg"):
        out = helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)
        bodies.append(helper.make_graph([helper.make_node(kind, [x], [out.name])], kind, [], [out]))
    positive = b.op("Greater", b.op("ReduceSum", "x", keepdims=0), b.c(np.float32(0)))
    y = b.op("If", positive, name="either", then_branch=bodies[0], else_branch=bodies[1])
    coupled = analyze(b.proto(b.conv(y, 4, 2)))
    assert [len(f.atoms) for f in coupled.families] == [8]
    assert coupled.frozen()["w3"] == "If either: a branch that the sample leaves out"


def test_what_a_loop_reads_stays_and_the_rest_is_cut() -> None:
    """A weight that only the body reads, and the channels that it captures, carry a reason; others leave."""
    b = Builder()
    x = b.dense(b.dense(tokens(b, length=5), 6, 8), 8, 4)
    inner = b.w(4, 4, name="inner")
    kinds = {"i": TensorProto.INT64, "go": TensorProto.BOOL}
    inputs = [helper.make_tensor_value_info(n, k, []) for n, k in kinds.items()]
    state, out, stay = (
        helper.make_tensor_value_info(n, k, None)
        for n, k in (("state", TensorProto.FLOAT), ("out", TensorProto.FLOAT), ("stay", TensorProto.BOOL))
    )
    nodes = [
        helper.make_node("MatMul", ["state", inner], ["product"]),
        helper.make_node("Add", ["product", x], ["out"]),
        helper.make_node("Identity", ["go"], ["stay"]),
    ]
    body = helper.make_graph(nodes, "body", [*inputs, state], [stay, out])
    y = b.op("Loop", b.c(np.int64(3)), "", b.op("Mul", x, b.c(np.float32(2))), name="again", body=body)
    coupled = analyze(b.proto(b.dense(y, 4, 2)))
    assert [len(f.atoms) for f in coupled.families] == [8]
    why = "Loop again: channels are not followed through its body"
    assert coupled.frozen()["inner"] == why
    assert coupled.frozen()["w3"] == why  # the bias of what the loop starts from, of which nothing can leave


@pytest.mark.parametrize(
    ("read", "stays"),
    [
        (lambda b, shape: b.op("Gather", shape, b.ints(0)), False),
        (lambda b, shape: b.op("Slice", shape, b.ints(2), b.ints(4)), False),
        (lambda b, shape: b.op("Gather", shape, b.ints(0, 1)), True),
        (lambda b, shape: b.op("Slice", shape, b.ints(-3), b.ints(2**62)), True),
        (lambda b, shape: shape, True),
    ],
    ids=["batch", "extent", "channels", "from channels on", "all"],
)
def test_a_size_that_is_read_at_run_time_stays(read: Callable[[Builder, str], str], stays: bool) -> None:
    def middle(b: Builder, x: str) -> str:
        sizes = b.op("Cast", read(b, b.op("Shape", x, name="sizes")), to=TensorProto.FLOAT)
        return b.op("Mul", x, b.op("ReduceMean", sizes, keepdims=0))

    widths, why = frozen_by(middle)
    assert widths == ([] if stays else [8])
    assert why == ("Shape sizes: its size is read at run time" if stays else "")


def test_what_has_the_sizes_of_a_tensor_that_cannot_be_cut_stays() -> None:
    def middle(b: Builder, x: str) -> str:
        like = b.op("Softmax", b.conv(x, 8, 8), axis=1)
        return b.op("Reshape", x, b.op("Shape", like), name="shaped")

    widths, why = frozen_by(middle)
    assert widths == []
    assert why == "Reshape shaped: has the size of an axis that cannot be cut"


def test_sizes_of_something_that_does_not_shrink_keep_their_axes() -> None:
    def middle(b: Builder, x: str) -> str:
        ones = b.op("Expand", b.ints(1), b.op("Shape", x, name="sizes"))
        return b.op("Mul", x, b.op("ReduceMean", b.op("Cast", ones, to=TensorProto.FLOAT), keepdims=0))

    widths, why = frozen_by(middle)
    assert widths == []
    assert why == "Shape sizes: its size is read at run time"


def test_a_target_that_is_computed_freezes_the_axis_it_sizes() -> None:
    def middle(b: Builder, x: str) -> str:
        sizes = b.op("Mul", b.op("Cast", b.op("Shape", "x"), to=TensorProto.INT64), b.ints(1, 1, 1, 1))
        channels = b.op("Div", b.op("Mul", b.op("Gather", sizes, b.ints(1)), b.ints(8)), b.ints(3))
        target = b.op("Concat", b.ints(0), channels, b.ints(6, 6), axis=0)
        return b.op("Reshape", x, target, name="target")

    assert frozen_by(middle) == ([], "Reshape target: its size is computed at run time")


@pytest.mark.parametrize(
    ("middle", "channels", "reason"),
    [
        (
            lambda b, x: b.op("Pad", x, b.ints(0, 1, 0, 0, 0, 1, 0, 0), mode="edge", name="act"),
            10,
            "Pad act: padded or cropped by a number of its own slices",
        ),
        (
            lambda b, x: b.op("Pad", x, b.ints(0, -1, 0, 0, 0, -1, 0, 0), name="act"),
            6,
            "Pad act: padded or cropped by a number of its own slices",
        ),
        (lambda b, x: b.op("Softmax", x, axis=1, name="act"), 8, "Softmax act: normalized over this axis"),
        (lambda b, x: b.op("LRN", x, size=3, name="act"), 8, "LRN act: normalized over its neighbours"),
        (
            lambda b, x: b.op("LayerNormalization", x, b.w(8, 6, 6), axis=1, name="act"),
            8,
            "LayerNormalization act: normalized over this axis",
        ),
        (
            lambda b, x: b.op("Mul", x, b.op("ReduceMax", x, b.ints(1), name="act")),
            8,
            "ReduceMax act: reduced or pooled along this axis",
        ),
        (
            lambda b, x: b.op(
                "Gather", b.w(6, 6), b.op("ArgMax", x, axis=3, keepdims=0, name="index"), name="act", axis=0
            ),
            8,
            "Gather act: its values decide where the data goes",
        ),
    ],
    ids=["pad edge", "crop", "softmax", "lrn", "layer norm", "reduce", "indices"],
)
def test_what_mixes_channels_keeps_them(middle: Callable[[Builder, str], str], channels: int, reason: str) -> None:
    assert frozen_by(middle, channels) == ([], reason)


def _layer_norm(b: Builder, x: str) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(1), name="mean"))
    spread = b.op("ReduceMean", b.op("Pow", centred, b.c(np.float32(2))), b.ints(1), name="variance")
    return b.op("Div", centred, b.op("Sqrt", b.op("Add", spread, b.c(np.float32(1e-5)))))


def _rms_norm(b: Builder, x: str) -> str:
    level = b.op("ReduceMean", b.op("Mul", x, x), b.ints(1), name="variance")
    return b.op("Div", x, b.op("Sqrt", b.op("Add", level, b.c(np.float32(1e-5)))))


@pytest.mark.parametrize(("middle", "name"), [(_layer_norm, "mean"), (_rms_norm, "variance")])
def test_a_norm_in_single_operators_keeps_its_axis_like_the_operator(
    middle: Callable[[Builder, str], str], name: str
) -> None:
    assert frozen_by(middle) == ([], f"ReduceMean {name}: normalized over this axis")


def test_a_mean_that_shrinks_again_takes_no_second_factor() -> None:
    b = Builder()
    x = b.conv(image(b), 3, 8)
    proto = b.proto(b.conv(b.op("Mul", x, b.op("ReduceMean", x, b.ints(1))), 8, 2))
    coupled = analyze(proto)
    masked = coupled.model.clone()
    coupling.mask(masked, coupled.sites, coupled.removed(coupled.families[0].atoms[:4]))
    for _ in range(2):
        coupled.remove(coupled.families[0].atoms[:2])
        coupled = coupling.analyze(coupled.model, feed(proto, 1), threads=1)
    assert [node.op_type for node in coupled.model.graph].count("Mul") == 2
    expected, got = (runtime.load(m, threads=1)(feed(proto, 2))["Conv_3_0"] for m in (masked, coupled.model))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_positions_on_an_axis_that_grows_with_the_input_keep_it() -> None:
    b = Builder()
    x = b.op("Reshape", b.dense(tokens(b), 6, 4), b.ints(0, -1))  # (n, t * 4)
    last = b.op("Slice", x, b.ints(-8), b.ints(2**62), b.ints(1), name="last")
    proto = b.proto(b.op("MatMul", last, b.w(8, 2)))
    assert why(proto, "w1") == "Slice last: cut by positions on an axis whose length depends on the input"
