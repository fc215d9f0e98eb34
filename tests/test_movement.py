"""Operators that move data, told by where each element of their output comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim.movement import Axis, blocks, copies


def moved(kind: str, *shapes: tuple[int, ...], args: tuple[Any, ...] = (), n: int = 1, **attributes: Any) -> list[Any]:
    inputs = [ir.Value(name=f"i{k}") for k in range(len(shapes) + len(args))]
    node = ir.node(kind, inputs, attributes, num_outputs=n)
    return copies(node, shapes, [None if a is None else np.asarray(a) for a in args], 18)


def index(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + np.prod(shape, dtype=int)).reshape(shape)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = index(2, 6, 4)
PADDED = ((0, 0), (1, 2), (0, 0))
IMAGE = index(2, 8, 2, 3)


def _depth_to_space(x: np.ndarray, crd: bool) -> np.ndarray:
    n, c, h, w = x.shape
    if crd:
        return x.reshape(n, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    return x.reshape(n, 2, 2, c // 4, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


@pytest.mark.parametrize(
    ("kind", "x", "args", "attributes", "expected"),
    [
        ("Reshape", X, [i64(0, -1)], {}, [X.reshape(2, 24)]),
        ("Transpose", X, [], {"perm": [2, 0, 1]}, [X.transpose(2, 0, 1)]),
        ("Flatten", X, [], {"axis": 2}, [X.reshape(12, 4)]),
        ("Squeeze", X[:1], [i64(0)], {}, [X[0]]),
        ("Unsqueeze", X, [i64(-1)], {}, [X[..., None]]),
        ("Slice", X, [i64(1), i64(6), i64(1), i64(2)], {}, [X[:, 1:6:2]]),
        ("Slice", X, [i64(-1), i64(-(2**62)), i64(-2), i64(-2)], {}, [X[:, ::-2]]),
        ("Split", X, [i64(1, 5)], {"axis": 1}, [X[:, :1], X[:, 1:]]),
        ("Gather", X, [i64(3, -1, 3)], {"axis": 1}, [X[:, [3, 5, 3]]]),
        ("Gather", X, [np.int64(2)], {"axis": 2}, [X[:, :, 2]]),
        ("Expand", X[:, :1], [i64(2, 3, 4)], {}, [np.broadcast_to(index(2, 1, 4), (2, 3, 4))]),
        ("Tile", X, [i64(1, 2, 1)], {}, [np.tile(X, (1, 2, 1))]),
        ("Pad", X, [i64(0, 1, 0, 0, 2, 0)], {}, [np.pad(X, PADDED, constant_values=-1)]),
        (
            "Pad",
            X,
            [i64(0, 1, 0, 0, 2, 0), np.float32(7)],
            {},
            [np.pad(X, PADDED, constant_values=-1)],
        ),
        ("Pad", X, [i64(0, 1, 0, 0, 2, 0), None], {}, [np.pad(X, PADDED, constant_values=-1)]),
        ("Pad", X, [i64(1, 2), None, i64(1)], {}, [np.pad(X, PADDED, constant_values=-1)]),
        ("Pad", X, [i64(0, 1, 0, 0, 2, 0)], {"mode": "reflect"}, [np.pad(X, PADDED, "reflect")]),
        ("Pad", X, [i64(0, 1, 0, 0, 2, 0)], {"mode": "edge"}, [np.pad(X, PADDED, "edge")]),
        ("DepthToSpace", IMAGE, [], {"blocksize": 2}, [_depth_to_space(IMAGE, False)]),
        ("DepthToSpace", IMAGE, [], {"blocksize": 2, "mode": "CRD"}, [_depth_to_space(IMAGE, True)]),
    ],
)
def test_copies_are_what_numpy_says(
    kind: str, x: np.ndarray, args: list[np.ndarray], attributes: dict[str, Any], expected: list[np.ndarray]
) -> None:
    found = moved(kind, x.shape, args=tuple(args), n=len(expected), **attributes)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_space_to_depth_undoes_depth_to_space() -> None:
    (there,) = moved("DepthToSpace", IMAGE.shape, blocksize=2)
    (back,) = moved("SpaceToDepth", there.shape, blocksize=2)
    np.testing.assert_array_equal(there.ravel()[back], IMAGE)


def test_inputs_are_numbered_through() -> None:
    (found,) = moved("Concat", (2, 3), (2, 5), axis=1)
    np.testing.assert_array_equal(found, np.concatenate([index(2, 3), index(2, 5, start=6)], axis=1))


def described(kind: str, shape: tuple[int, ...], fixed: set[int], **given: Any) -> list[tuple[list[int], list[int]]]:
    (indices,) = moved(kind, shape, **given)
    found, _, _ = blocks(indices, [shape], {Axis(0, axis) for axis in fixed})
    return [([a.axis for a in block.sources], block.outputs) for block in found]


def test_a_head_split_is_one_axis_into_two() -> None:
    assert described("Reshape", (2, 5, 12), {0, 1}, args=(i64(0, 0, 3, 4),)) == [([2], [2, 3])]
    (indices,) = moved("Reshape", (2, 5, 12), args=(i64(0, 0, 3, 4),))
    (block,), uncut, stuck = blocks(indices, [(2, 5, 12)], {Axis(0, 0), Axis(0, 1)})
    np.testing.assert_array_equal(block.rows[0], [[k, k // 4, k % 4] for k in range(12)])
    assert uncut == {0, 1} and not stuck


def test_a_head_merge_is_two_axes_into_one() -> None:
    assert described("Reshape", (2, 5, 3, 4), {0, 1}, args=(i64(0, 0, 12),)) == [([2, 3], [2])]


def test_axes_that_do_not_meet_are_apart() -> None:
    assert described("Transpose", (2, 3, 4), {0}, perm=[2, 0, 1]) == [([1], [2]), ([2], [0])]


def test_an_axis_that_stays_has_no_say_in_what_it_is_merged_with() -> None:
    assert described("Flatten", (2, 3, 4), {0, 2}) == [([1], [1])]
    (indices,) = moved("Flatten", (2, 3, 4))
    (block,), uncut, _ = blocks(indices, [(2, 3, 4)], {Axis(0, 0), Axis(0, 2)})
    np.testing.assert_array_equal(block.rows[0], [[k // 4, k] for k in range(12)])
    assert block.origins == {1: {Axis(0, 1), Axis(0, 2)}} and uncut == {0}


def test_a_dropped_axis_keeps_what_is_used_of_it() -> None:
    (indices,) = moved("Gather", (2, 6, 4), args=(np.int64(3),), axis=1)
    found, _, stuck = blocks(indices, [(2, 6, 4)], {Axis(0, 0)})
    assert [block.outputs for block in found] == [[1]]
    assert {axis: used.tolist() for axis, used in stuck.items()} == {Axis(0, 1): [3]}


def test_joined_tensors_share_a_block() -> None:
    (indices,) = moved("Concat", (2, 3), (2, 5), axis=1)
    (block,), uncut, _ = blocks(indices, [(2, 3), (2, 5)], {Axis(0, 0), Axis(1, 0)})
    assert block.sources == [Axis(0, 1), Axis(1, 1)] and block.outputs == [1] and uncut == {0}
    np.testing.assert_array_equal(block.rows[0], [[k, k] for k in range(3)])
    np.testing.assert_array_equal(block.rows[1], [[k, k + 3] for k in range(5)])
