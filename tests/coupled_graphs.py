"""Small graphs, one per structure in which channels are coupled, with what must be removable from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from graph_builder import Builder, image, tokens
from onnx import TensorProto, helper


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and the number of units of every family in it, ascending."""

    build: Callable[[], onnx.ModelProto]
    widths: list[int]

    @property
    def name(self) -> str:
        return self.build.__name__


CASES: list[Case] = []


def case(*widths: int, opset: int = 18) -> Callable[[Callable[[Builder], str]], Callable[[Builder], str]]:
    """Register a graph whose function returns its output, with the number of units of every family."""

    def register(function: Callable[[Builder], str]) -> Callable[[Builder], str]:
        def build() -> onnx.ModelProto:
            b = Builder()
            return b.proto(function(b), opset=opset)

        build.__name__ = function.__name__
        CASES.append(Case(build, sorted(widths)))
        return function

    return register


@case(8, 6)
def conv_chain(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    x = b.op("BatchNormalization", x, b.w(8), b.w(8), b.w(8), b.w(8, low=0.5))
    x = b.op("MaxPool", b.conv(b.relu(x), 8, 6), kernel_shape=[2, 2], strides=[2, 2])
    return b.conv(x, 6, 4)


@case(8, 5)
def residual(b: Builder) -> str:
    stem = b.conv(image(b), 3, 8)
    x = b.conv(b.relu(b.conv(stem, 8, 5)), 5, 8)
    return b.conv(b.relu(b.op("Add", x, stem)), 8, 2)


@case(8, 4)
def depthwise_separable(b: Builder) -> str:
    x = b.conv(b.relu(b.conv(image(b), 3, 8)), 8, 8, group=8)
    return b.conv(b.relu(b.conv(x, 8, 4, 1)), 4, 2)


@case(4, 2)
def depthwise_multiplier(b: Builder) -> str:
    # The two outputs of a channel leave with it (4), or one of the two in every group (2).
    x = b.conv(b.conv(image(b), 3, 4), 4, 8, group=4)
    return b.conv(x, 8, 2)


@case(4, 3, 2)
def grouped_conv(b: Builder) -> str:
    # Whole groups (4), positions within the groups of the input (2) and of the output (3).
    return b.conv(b.relu(b.conv(b.conv(image(b), 3, 8), 8, 12, group=4)), 12, 2)


@case(6, 5)
def conv_transpose(b: Builder) -> str:
    x = b.op("ConvTranspose", b.conv(image(b), 3, 6), b.w(6, 5, 2, 2), b.w(5), strides=[2, 2])
    return b.conv(x, 5, 2)


@case(2, 3, 4)
def conv_transpose_grouped(b: Builder) -> str:
    x = b.op("ConvTranspose", b.conv(image(b), 3, 6), b.w(6, 4, 2, 2), b.w(8), strides=[2, 2], group=2)
    return b.conv(x, 8, 2)


@case(4, 5)
def flatten_with_extent(b: Builder) -> str:
    x = b.op("Flatten", b.relu(b.conv(image(b), 3, 4)))
    return b.op("Gemm", b.relu(b.op("Gemm", x, b.w(144, 5), b.w(5))), b.w(2, 5), transB=1)


@case(4)
def reshape_with_extent(b: Builder) -> str:
    return b.op("MatMul", b.op("Reshape", b.conv(image(b), 3, 4), b.ints(-1, 144)), b.w(144, 2))


@case(4)
def channels_last_flatten(b: Builder) -> str:
    x = b.op("Transpose", b.conv(image(b), 3, 4), perm=[0, 2, 3, 1])
    return b.op("MatMul", b.op("Reshape", x, b.ints(0, -1)), b.w(144, 2))


@case(8)
def squeeze_whatever(b: Builder) -> str:
    x = b.op("GlobalAveragePool", b.conv(image(b), 3, 8))
    return b.op("MatMul", b.op("Squeeze", b.op("Concat", x, x, axis=0)), b.w(8, 2))


@case(2, 4)
def channel_shuffle(b: Builder) -> str:
    x = b.op("Reshape", b.conv(image(b), 3, 8), b.ints(0, 2, 4, 6, 6))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3, 4]), b.ints(0, 8, 6, 6))
    return b.conv(x, 8, 2)


@case(4, 4, 3)
def dense_block(b: Builder) -> str:
    a = b.relu(b.conv(image(b), 3, 4))
    c = b.relu(b.conv(a, 4, 3))
    d = b.op("Concat", a, c, axis=1)
    e = b.op("Concat", d, b.conv(d, 7, 4), axis=1)
    return b.conv(e, 11, 2)


@case(4, 4, 3)
def c2f(b: Builder) -> str:
    left, right = b.ops("Split", 2, b.conv(image(b), 3, 8), b.ints(4, 4), axis=1)
    x = b.op("Add", right, b.conv(b.relu(b.conv(right, 4, 3)), 3, 4))
    return b.conv(b.op("Concat", left, right, x, axis=1), 12, 2)


@case(2, 3, 5)
def uneven_split(b: Builder) -> str:
    parts = b.ops("Split", 3, b.conv(image(b), 3, 10), b.ints(2, 3, 5), axis=1)
    outs = [b.conv(part, n, 2) for part, n in zip(parts, (2, 3, 5), strict=True)]
    return b.op("Sum", *outs)


@case(4, 4)
def sliced_halves(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    left = b.op("Slice", x, b.ints(0), b.ints(4), b.ints(1))
    right = b.op("Slice", x, b.ints(-4), b.ints(2**63 - 1), b.ints(1))
    return b.op("Add", b.conv(left, 4, 2), b.conv(right, 4, 2))


@case(4, 4)
def sliced_with_steps(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    even = b.op("Slice", x, b.ints(0), b.ints(8), b.ints(1), b.ints(2))
    odd = b.op("Slice", x, b.ints(-1), b.ints(-(2**62)), b.ints(-3), b.ints(-2))
    return b.op("Add", b.conv(even, 4, 2), b.conv(odd, 4, 2))


@case(3, 5)
def gathered_channels(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    some = b.op("Gather", x, b.ints(6, 0, -5), axis=1)
    return b.op("Add", b.conv(x, 8, 2), b.conv(some, 3, 2))


@case(8, 3)
def squeeze_excite(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    s = b.op("Tanh", b.conv(b.op("GlobalAveragePool", x), 8, 3, 1))
    return b.conv(b.op("Mul", x, b.op("Sigmoid", b.conv(s, 3, 8, 1))), 8, 2)


@case(8)
def prelu(b: Builder) -> str:
    return b.conv(b.op("PRelu", b.conv(image(b), 3, 8), b.w(8, 1, 1)), 8, 2)


@case(4)
def group_norm_exported(b: Builder) -> str:
    x = b.op("Reshape", b.conv(image(b), 3, 8), b.ints(0, 4, -1))
    x = b.op("Reshape", b.op("InstanceNormalization", x, b.w(4), b.w(4)), b.ints(0, 8, 6, 6))
    return b.conv(b.op("Add", b.op("Mul", x, b.w(8, 1, 1)), b.w(8, 1, 1)), 8, 2)


@case(4)
def group_norm_of_any_size(b: Builder) -> str:
    """As TorchScript exports it for images of any size: the result gets the shape that went in."""
    y = b.conv(image(b), 3, 8)
    x = b.op("Reshape", y, b.ints(0, 4, -1))
    x = b.op("Reshape", b.op("InstanceNormalization", x, b.w(4), b.w(4)), b.op("Shape", y))
    return b.conv(b.op("Add", b.op("Mul", x, b.w(8, 1, 1)), b.w(8, 1, 1)), 8, 2)


@case(8)
def expanded_like_another(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    pooled = b.op("GlobalAveragePool", x)
    return b.conv(b.op("Sub", x, b.op("Expand", pooled, b.op("Shape", x))), 8, 2)


@case(8, 4)
def resized_to_another(b: Builder) -> str:
    """As TorchScript exports an interpolation to the size of a skip connection."""
    skip = b.conv(image(b), 3, 4)
    low = b.op("MaxPool", b.conv(skip, 4, 8), kernel_shape=[2, 2], strides=[2, 2])
    own = b.op("Slice", b.op("Shape", low), b.ints(0), b.ints(2))
    extent = b.op("Cast", b.op("Gather", b.op("Shape", skip), b.ints(2, 3)), to=TensorProto.INT32)
    sizes = b.op("Concat", own, b.op("Cast", extent, to=TensorProto.INT64), axis=0)
    return b.conv(b.op("Concat", b.op("Resize", low, "", "", sizes), skip, axis=1), 12, 2)


@case(8)
def multiplied_by_ones(b: Builder) -> str:
    x = b.conv(image(b), 3, 8)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    return b.conv(b.op("Mul", x, b.op("ConstantOfShape", b.op("Shape", x), value=one)), 8, 2)


@case(4, opset=21)
def group_norm(b: Builder) -> str:
    x = b.op("GroupNormalization", b.conv(image(b), 3, 8), b.w(8), b.w(8), num_groups=4)
    return b.conv(x, 8, 2)


@case(8)
def instance_norm(b: Builder) -> str:
    return b.conv(b.op("InstanceNormalization", b.conv(image(b), 3, 8), b.w(8), b.w(8)), 8, 2)


@case(3)
def depth_to_space(b: Builder) -> str:
    return b.conv(b.op("DepthToSpace", b.conv(image(b), 3, 12), blocksize=2), 3, 2)


@case(3)
def depth_to_space_crd(b: Builder) -> str:
    return b.conv(b.op("DepthToSpace", b.conv(image(b), 3, 12), blocksize=2, mode="CRD"), 3, 2)


@case(3)
def space_to_depth(b: Builder) -> str:
    return b.conv(b.op("SpaceToDepth", b.conv(image(b), 3, 3), blocksize=2), 12, 2)


@case(3)
def pixel_shuffle_exported(b: Builder) -> str:
    x = b.op("Reshape", b.conv(image(b), 3, 12), b.ints(0, 3, 2, 2, 6, 6))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 1, 4, 2, 5, 3]), b.ints(0, 3, 12, 12))
    return b.conv(x, 3, 2)


@case(3, 4, 4)
def attention(b: Builder) -> str:
    # Heads leave as such (3); the widths of queries and keys (4) and of values (4) are cut evenly in all heads.
    x = tokens(b)
    q, k, v = (b.heads(b.dense(x, 6, 12), 3, 4) for _ in range(3))
    return b.dense(b.join(b.attend(q, k, v), 12), 12, 6)


@case(3, 4, 4)
def attention_fused_split(b: Builder) -> str:
    parts = b.ops("Split", 3, b.dense(tokens(b), 6, 36), b.ints(12, 12, 12), axis=2)
    q, k, v = (b.heads(part, 3, 4) for part in parts)
    return b.dense(b.join(b.attend(q, k, v), 12), 12, 6)


@case(3, 4)
def attention_fused_gather(b: Builder) -> str:
    # (N, T, 3, heads, width) is a rectangle: queries, keys and values have one width.
    x = b.op("Reshape", b.dense(tokens(b), 6, 36), b.ints(0, 0, 3, 3, 4))
    x = b.op("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", x, b.c(np.int64(i)), axis=0) for i in range(3))
    return b.dense(b.join(b.attend(q, k, v), 12), 12, 6)


@case(3, 4, 4)
def attention_over_merged_heads(b: Builder) -> str:
    x = tokens(b, length=5)
    q, k, v = (b.op("Reshape", b.heads(b.dense(x, 6, 12), 3, 4), b.ints(-1, 5, 4)) for _ in range(3))
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    x = b.op("Reshape", b.op("MatMul", scores, v), b.ints(-1, 3, 5, 4))
    return b.dense(b.join(x, 12), 12, 6)


@case(2, 2, 4, 4)
def grouped_queries(b: Builder) -> str:
    # 2 key-value heads with 2 queries each.
    x = tokens(b, length=5)
    q = b.heads(b.dense(x, 6, 16), 4, 4)
    k, v = (
        b.op(
            "Reshape",
            b.op("Expand", b.op("Unsqueeze", b.heads(b.dense(x, 6, 8), 2, 4), b.ints(2)), b.ints(1, 2, 2, 5, 4)),
            b.ints(-1, 4, 5, 4),
        )
        for _ in range(2)
    )
    return b.dense(b.join(b.attend(q, k, v), 16), 16, 6)


@case(3, 2, 4)
def rotary(b: Builder) -> str:
    # Rotated pairs (i, i + 2) leave together: 2 of them; the values keep their own width (4).
    x = tokens(b, length=5)
    q, k, v = (b.heads(b.dense(x, 6, 12), 3, 4) for _ in range(3))
    cos, sin = (b.c(np.tile(b.rng.standard_normal((5, 2)), 2).astype(np.float32)) for _ in range(2))

    def turn(y: str) -> str:
        first = b.op("Slice", y, b.ints(0), b.ints(2), b.ints(3))
        second = b.op("Slice", y, b.ints(2), b.ints(2**63 - 1), b.ints(3))
        turned = b.op("Concat", b.op("Neg", second), first, axis=-1)
        return b.op("Add", b.op("Mul", y, cos), b.op("Mul", turned, sin))

    return b.dense(b.join(b.attend(turn(q), turn(k), v), 12), 12, 6)


@case(3, 4)
def einsum(b: Builder) -> str:
    y = b.op("Einsum", tokens(b), b.w(6, 3, 4), equation="ntc,chd->nthd")
    return b.op("Einsum", b.relu(y), b.w(3, 4, 5), equation="nthd,hde->nte")


@case(8)
def lstm_input(b: Builder) -> str:
    x = b.op("Transpose", b.relu(b.dense(tokens(b), 6, 8)), perm=[1, 0, 2])
    return b.op("LSTM", x, b.w(1, 20, 8), b.w(1, 20, 5), b.w(1, 40), hidden_size=5)


@case(8)
def resize_scales(b: Builder) -> str:
    scales = b.c(np.array([1, 1, 2, 2], np.float32))
    return b.conv(b.op("Resize", b.conv(image(b), 3, 8), "", scales), 8, 2)


@case(8)
def resize_sizes(b: Builder) -> str:
    batch = b.op("Slice", b.op("Shape", "x"), b.ints(0), b.ints(1))
    sizes = b.op("Concat", batch, b.ints(8, 12, 12), axis=0)
    return b.conv(b.op("Resize", b.conv(image(b), 3, 8), "", "", sizes), 8, 2)


@case(8)
def pad_space(b: Builder) -> str:
    x = b.op("Pad", b.conv(image(b), 3, 8), b.ints(0, 0, 1, 1, 0, 0, 2, 2), mode="reflect")
    return b.conv(x, 8, 2)


@case(4)
def pad_channels(b: Builder) -> str:
    x = b.op("Pad", b.relu(b.conv(image(b), 3, 4)), b.ints(0, 2, 0, 0, 0, 2, 0, 0), b.c(np.float32(0.5)))
    return b.conv(x, 8, 2)


@case(8)
def shared_weight(b: Builder) -> str:
    x, w = b.dense(tokens(b), 6, 8), b.w(8, 5)
    return b.op("Add", b.op("MatMul", x, w), b.op("MatMul", b.relu(x), w))


@case(8)
def weight_on_the_left(b: Builder) -> str:
    x = b.op("Transpose", b.dense(tokens(b), 6, 8), perm=[0, 2, 1])
    return b.op("MatMul", b.w(5, 8), x)


@case(8, 4)
def transposed_weight(b: Builder) -> str:
    x = b.dense(tokens(b), 6, 8)
    x = b.op("MatMul", x, b.op("Transpose", b.w(4, 8), perm=[1, 0]))
    return b.dense(x, 4, 3)


@case(3, 4, 4)
def sizes_joined(b: Builder) -> str:
    """Reshape targets as exporters write them: the batch and length of the input joined with constants."""
    x = tokens(b)
    shape = b.op("Shape", x)
    batch, length = (b.op("Gather", shape, b.ints(k)) for k in range(2))
    split = b.op("Concat", batch, length, b.ints(3, 4), axis=0)
    q, k, v = (b.op("Transpose", b.op("Reshape", b.dense(x, 6, 12), split), perm=[0, 2, 1, 3]) for _ in range(3))
    merged = b.op("Concat", batch, length, b.ints(12), axis=0)
    x = b.op("Reshape", b.op("Transpose", b.attend(q, k, v), perm=[0, 2, 1, 3]), merged)
    return b.dense(x, 12, 6)


@case(4)
def tiled(b: Builder) -> str:
    x = b.op("Tile", b.conv(image(b), 3, 4), b.ints(1, 2, 1, 1))
    return b.conv(x, 8, 2)


@case(8, 5)
def hidden_units(b: Builder) -> str:
    x = b.op("Transpose", b.dense(tokens(b), 6, 8), perm=[1, 0, 2])
    y = b.op("LSTM", x, b.w(1, 20, 8), b.w(1, 20, 5), b.w(1, 40), hidden_size=5)
    return b.dense(b.op("Squeeze", y, b.ints(1)), 5, 3)


@case(5)
def hidden_units_of_two_directions(b: Builder) -> str:
    """One unit leaves both directions; the output joins them, and the last state is read too."""
    x = b.op("Transpose", tokens(b), perm=[1, 0, 2])
    weights = b.w(2, 15, 6), b.w(2, 15, 5), b.w(2, 30)
    y, last = b.ops("GRU", 2, x, *weights, direction="bidirectional", linear_before_reset=1, hidden_size=5)
    joined = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, 10))
    first = b.dense(b.op("Transpose", joined, perm=[1, 0, 2]), 10, 3)
    return b.op(
        "Add", first, b.op("Unsqueeze", b.dense(b.op("ReduceSum", last, b.ints(0), keepdims=0), 5, 3), b.ints(1))
    )


@case(4)
def hidden_units_with_a_state_of_zeros(b: Builder) -> str:
    """The initial state as exporters write it: zeros of a shape that is joined from the batch and a constant."""
    x = tokens(b)
    batch = b.op("Gather", b.op("Shape", x), b.ints(0))
    state = b.op("ConstantOfShape", b.op("Concat", b.ints(1), batch, b.ints(4), axis=0))
    x = b.op("Transpose", x, perm=[1, 0, 2])
    y = b.op("RNN", x, b.w(1, 4, 6), b.w(1, 4, 4), b.w(1, 8), "", state, hidden_size=4)
    return b.dense(b.op("Squeeze", y, b.ints(1)), 4, 3)


@case(8)
def cut_at_a_place_known_at_run_time(b: Builder) -> str:
    """The end of the slice is read from another input; the channels, on another axis, may leave."""
    x = b.dense(tokens(b), 6, 8)
    end = b.op("Gather", b.op("Shape", x), b.ints(1))
    return b.dense(b.op("Slice", x, b.ints(0), end, b.ints(1)), 8, 3)


@case(8)
def global_response_norm(b: Builder) -> str:
    """The mean over the channels divides by as many as before, whatever has left."""
    x = b.op("Transpose", b.conv(image(b), 3, 8), perm=[0, 2, 3, 1])
    energy = b.op("ReduceL2", x, b.ints(1, 2))
    response = b.op("Div", energy, b.op("Add", b.op("ReduceMean", energy, b.ints(-1)), b.c(np.float32(0.1))))
    x = b.op("Add", b.op("Add", b.op("Mul", b.w(8), b.op("Mul", x, response)), b.w(8)), x)
    return b.dense(x, 8, 2)


@case(4, 8, opset=13)
def mean_and_sum_over_channels(b: Builder) -> str:
    """One reduction over a fixed and two cut axes, one whose axes are an attribute, one that drops its axis."""
    x = b.heads(b.op("Sigmoid", b.dense(tokens(b, length=5), 6, 32)), 8, 4)  # (n, 8, 5, 4)
    level = b.op("Mul", b.op("ReduceMean", x, axes=[1, 2, 3]), b.c(np.float32(3)))
    x = b.op("Div", x, b.op("Add", level, b.op("ReduceMean", x, axes=[-1])))
    total = b.op("Unsqueeze", b.op("ReduceSum", x, b.ints(3), keepdims=0), b.ints(3))
    return b.dense(b.join(b.op("Div", x, total), 32), 32, 3)


@case(4, 3)
def cosine_attention(b: Builder) -> str:
    """Queries and keys of length 1."""
    x = tokens(b, length=5)
    q, k, v = b.dense(x, 6, 4), b.dense(x, 6, 4), b.dense(x, 6, 3)
    q = b.op("Div", q, b.op("ReduceL2", q, b.ints(-1)))
    k = b.op("Div", k, b.op("Sqrt", b.op("ReduceSumSquare", k, b.ints(-1))))
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    return b.dense(b.op("MatMul", scores, v), 3, 2)


@case(4, 6, 3)
def repeated_for_every_sample(b: Builder) -> str:
    """Tables of positions, tiled as often as the batch is large; their channels are those of the queries."""
    x = tokens(b, length=5)
    joined = b.op("Concat", b.op("Gather", b.op("Shape", x), b.ints(0)), b.ints(1, 1), axis=0)
    read = b.op("Shape", b.op("ReduceMax", x, b.ints(1, 2)))
    for width, repeats in ((4, joined), (3, read)):
        table = b.op("Tile", b.op("Unsqueeze", b.dense(b.w(5, 6), 6, width), b.ints(0)), repeats)
        scores = b.op("MatMul", b.dense(x, 6, width), b.op("Transpose", table, perm=[0, 2, 1]))
        x = b.dense(b.op("Softmax", scores, axis=-1), 5, 6)
    return x


@case(8)
def sampled_on_a_grid(b: Builder) -> str:
    x = image(b)
    grid = b.op("Tanh", b.op("Transpose", b.conv(x, 3, 2), perm=[0, 2, 3, 1]))
    return b.conv(b.op("GridSample", b.conv(x, 3, 8), grid, padding_mode="border"), 8, 2)
