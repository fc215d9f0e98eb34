"""Rules of products, recurrent layers, attention and the other operators with a formula of their own."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim import symbolic
from onnxslim.shape_elementwise import broadcast_shapes
from onnxslim.shape_rules import NOTHING, Call, Fact, Shape, anything, rule
from onnxslim.symbolic import Dim


@rule("MatMul", "MatMulInteger")
def matmul(call: Call) -> Sequence[Fact | None]:
    """numpy.matmul."""
    a, b = call.shape(0), call.shape(1)
    return [Fact(_matmul_shape(a, b))]


@rule("QLinearMatMul")
def qlinear_matmul(call: Call) -> Sequence[Fact | None]:
    """numpy.matmul of the inputs 0 and 3."""
    return [Fact(_matmul_shape(call.shape(0), call.shape(3)))]


def _matmul_shape(a: Shape | None, b: Shape | None) -> Shape | None:
    if not a or not b:
        return None
    batch = broadcast_shapes([a[:-2], b[:-2]])
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return None if batch is None else (*batch, *rows, *columns)


@rule("Gemm")
def gemm(call: Call) -> Sequence[Fact | None]:
    """(M, N)."""
    a, b = call.shape(0), call.shape(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return [Fact(anything(2))]
    return [Fact((a[1 if call.attr("transA", 0) else 0], b[0 if call.attr("transB", 0) else 1]))]


@rule("com.microsoft::MatMulNBits")
def matmul_n_bits(call: Call) -> Sequence[Fact | None]:
    """N columns, whatever the form in which they are stored."""
    a = call.shape(0)
    return [NOTHING if not a else Fact((*a[:-1], int(call.attr("N"))))]


@rule("Einsum")
def einsum(call: Call) -> Sequence[Fact | None]:
    """The sizes of the letters after the arrow."""
    equation = str(call.attr("equation")).replace(" ", "")
    if "." in equation or "->" not in equation:
        return [NOTHING]
    left, right = equation.split("->")
    sizes: dict[str, Dim] = {}
    for letters, fact in zip(left.split(","), call.facts, strict=False):
        if fact is None or fact.shape is None or len(fact.shape) != len(letters):
            return [NOTHING]
        for letter, dim in zip(letters, fact.shape, strict=True):
            sizes[letter] = symbolic.broadcast(sizes.get(letter, 1), dim)
    return [Fact(tuple(sizes[letter] for letter in right))]


@rule("LSTM", "GRU", "RNN")
def recurrent(call: Call) -> Sequence[Fact | None]:
    """(sequence, directions, batch, hidden), and the last states."""
    x, weights = call.shape(0), call.shape(2)
    if x is None or weights is None or len(x) != 3 or len(weights) != 3:
        return []
    directions, hidden = weights[0], weights[2]
    if call.attr("layout", 0):
        batch, length = x[0], x[1]
        return [Fact((batch, length, directions, hidden)), *[Fact((batch, directions, hidden))] * 2]
    length, batch = x[0], x[1]
    return [Fact((length, directions, batch, hidden)), *[Fact((directions, batch, hidden))] * 2]


@rule("GridSample")
def grid_sample(call: Call) -> Sequence[Fact | None]:
    """(N, C) of the input and the spatial sizes of the grid."""
    x, grid = call.shape(0), call.shape(1)
    return [NOTHING if x is None or grid is None else Fact((*x[:2], *grid[1:-1]))]


@rule("Attention")
def attention(call: Call) -> Sequence[Fact | None]:
    """(batch, heads, queries, value size), or (batch, queries, heads * value size)."""
    q, v = call.shape(0), call.shape(2)
    if q is None or v is None:
        return [NOTHING]
    if len(q) == 4:
        return [Fact((*q[:3], v[3]))]
    size = symbolic.quotient([v[2], call.attr("q_num_heads")], [call.attr("kv_num_heads")])
    return [NOTHING if size is None else Fact((*q[:2], size))]


@rule("STFT")
def stft(call: Call) -> Sequence[Fact | None]:
    """(batch, frames, frequencies, 2)."""
    return [Fact(anything(4))]
