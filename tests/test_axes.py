"""Chains of Reshape and Transpose: the same elements in the same places, from no more than three nodes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from oracles import assert_same, operators

from onnxslim import model as model_io
from onnxslim import symbolic
from onnxslim.atoms import Atoms
from onnxslim.axes import merge_movements
from onnxslim.graph import remove_dead
from onnxslim.shapes import Shapes


def chain(shape: list[int | str], moves: list[list[int] | tuple[int, ...]]) -> onnx.ModelProto:
    """A model of one chain: a list is the target of a Reshape, a tuple the permutation of a Transpose."""
    nodes, weights = [], []
    for k, move in enumerate(moves):
        source, target = ("x" if k == 0 else f"v{k}"), ("y" if k == len(moves) - 1 else f"v{k + 1}")
        if isinstance(move, tuple):
            nodes.append(helper.make_node("Transpose", [source], [target], perm=move))
        else:
            weights.append(numpy_helper.from_array(np.array(move, np.int64), f"t{k}"))
            nodes.append(helper.make_node("Reshape", [source, f"t{k}"], [target]))
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def merged(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto`` with its chain merged until no more can be, nothing else done."""
    model = model_io.load(proto)
    changed = True
    while changed:  # in sweeps, like the pass
        shapes, changed = Shapes(model), False
        for node in list(model.graph):
            shapes.visit(node)
            changed = merge_movements(node, shapes, model.graph) or changed
        remove_dead(model.graph)
    return model_io.to_proto(model)


def same(proto: onnx.ModelProto, result: onnx.ModelProto, **sizes: int) -> None:
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    shape = [sizes.get(d.dim_param, d.dim_value) for d in dims]
    assert_same(proto, result, {"x": np.arange(math.prod(shape), dtype=np.float32).reshape(shape)}, rtol=0)


@pytest.mark.parametrize(
    ("shape", "moves", "expected"),
    [
        # Keys of attention: heads into the batch, transposed there, out of it again.
        (["b", 5, 4, 8], [(0, 2, 1, 3), [-1, 5, 8], (0, 2, 1), [-1, 4, 8, 5]], ["Transpose"]),
        (["b", "s", 4, 8], [(0, 2, 1, 3), (0, 1, 3, 2)], ["Transpose"]),
        # An axis is torn apart and grows together again: the order of a channel shuffle takes all three.
        (["b", 12, 5, 5], [[0, 3, 4, 5, 5], (0, 2, 1, 3, 4), [0, 12, 5, 5]], None),
        # Windows cut out and put back.
        (["b", 8, 8, 3], [[-1, 2, 4, 2, 4, 3], (0, 1, 3, 2, 4, 5), [-1, 4, 4, 3],
                          [-1, 2, 2, 4, 4, 3], (0, 1, 3, 2, 4, 5), [-1, 8, 8, 3]], ["Identity"]),
        # The Transpose moves an axis of size 1 only.
        ([2, 1, 5], [(1, 0, 2), [10]], ["Reshape"]),
        # Boundaries that do not nest: 4 x 6 and 6 x 4.
        ([4, 6], [(1, 0), [4, 6], (1, 0)], None),
        (["b", "s", 8], [[0, 0, 2, 4], (0, 2, 1, 3), (0, 2, 1, 3), [0, 0, 8]], ["Identity"]),
    ],
)  # fmt: skip
def test_chains(shape: list[int | str], moves: list[list[int] | tuple[int, ...]], expected: list[str] | None) -> None:
    proto = chain(shape, moves)
    result = merged(proto)
    assert operators(result) == (operators(proto) if expected is None else expected)
    same(proto, result, b=2, s=3)
    same(proto, result, b=1, s=1)


@st.composite
def chains(draw: st.DrawFn) -> onnx.ModelProto:
    atoms = [draw(st.sampled_from([1, 2, 3, 4])) for _ in range(draw(st.integers(2, 5)))]
    sizes = list(atoms)
    given_shape: list[int | str] = list(sizes)
    named = draw(st.booleans())
    if named:
        given_shape[0] = "b"
    moves: list[list[int] | tuple[int, ...]] = []
    for _ in range(draw(st.integers(2, 6))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(len(sizes))))
            sizes = [sizes[p] for p in perm]
            moves.append(tuple(perm))
            continue
        if draw(st.booleans()) and len(sizes) > 1:
            k = draw(st.integers(0, len(sizes) - 2))
            sizes = [*sizes[:k], sizes[k] * sizes[k + 1], *sizes[k + 2 :]]
        else:
            k = draw(st.integers(0, len(sizes) - 1))
            first = draw(st.sampled_from([d for d in range(1, sizes[k] + 1) if sizes[k] % d == 0]))
            sizes = [*sizes[:k], first, sizes[k] // first, *sizes[k + 1 :]]
        target = list(sizes)
        if draw(st.booleans()):
            target[draw(st.integers(0, len(target) - 1))] = -1
        moves.append(target)
    proto = chain(given_shape, moves)
    proto.doc_string = str(atoms[0])
    return proto


@settings(max_examples=150, deadline=None)
@given(chains())
def test_merged_chain_moves_every_element_to_the_same_place(proto: onnx.ModelProto) -> None:
    result = merged(proto)
    assert len(operators(result)) <= len(operators(proto))
    same(proto, result, b=int(proto.doc_string))
    assert operators(merged(result)) == operators(result)


def test_value_that_is_read_elsewhere_ends_the_chain() -> None:
    proto = chain(["b", 4, 8], [(0, 2, 1), (0, 2, 1)])
    assert operators(merged(proto)) == ["Identity"]
    proto.graph.output.append(helper.make_tensor_value_info("v1", TensorProto.FLOAT, None))
    assert operators(merged(proto)) == ["Transpose", "Transpose"]


def test_atoms_are_cut_alike_everywhere() -> None:
    b = symbolic.named("b")
    atoms = Atoms((b, 12, 5))
    assert atoms.view((b * 3, 20))
    atoms.transpose([1, 0])
    assert atoms.view((4, 5, b, 3))
    assert [[atoms.size[a] for a in axis] for axis in atoms.source] == [[b], [3, 4], [5]]
    assert [[atoms.size[a] for a in axis] for axis in atoms.axes] == [[4], [5], [b], [3]]
    assert not atoms.view((9, b))
