"""Affine maps into the linear operators beside them.

With ``L(x) = W x + b`` and ``A(x) = s x + t`` per channel (`onnxslim.linear`, `onnxslim.passes.fold.affine`):

* after:  ``A(L(x)) = (diag(s) W) x + (s b + t)``. Always exact.
* before: ``L(A(x)) = (W diag(s)) x + (b + W t)``. Exact when every output sees all taps (no zero padding) or ``t = 0``.
* before a padded operator with ``t != 0``: ``L(s x + t) = (W diag(s)) (x + t / s)``, padding included, for ``s != 0``.

An operator without room for a bias (MatMul) leaves one Add behind it, or becomes Gemm where its operands are matrices.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import Linear, along, view
from onnxslim.passes.fold.affine import Affine, affine, chain_after, chain_before, keeps_shape, limits
from onnxslim.passes.fold.edit import Edit, representable
from onnxslim.passes.fold.work import Work, multiply

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LIGHT = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")


@dataclasses.dataclass(frozen=True, eq=False)
class Rewrite:
    """A linear operator with the affine maps around it absorbed: new matrix and bias, and what must be added behind.

    ``matrix`` and ``bias`` are None where nothing changes; ``rest`` is an offset for which the operator has no room.
    """

    linear: Linear
    matrix: np.ndarray | None
    bias: np.ndarray | None
    rest: np.ndarray | None
    after: tuple[ir.Node, ...]

    @property
    def becomes_gemm(self) -> bool:
        """Whether ``rest`` finds room because the MatMul is turned into Gemm."""
        return self.rest is not None and gemm_fits(self.linear)

    @property
    def turned(self) -> ir.Node | None:
        """The last node of the chain behind the operator, when it becomes the Add of ``rest``."""
        return self.after[-1] if self.rest is not None and self.after and not self.becomes_gemm else None

    @property
    def added(self) -> int:
        """Nodes that stand behind the operator afterwards."""
        return int(self.rest is not None and not self.becomes_gemm)


def gemm_fits(linear: Linear) -> bool:
    """True for a MatMul of two matrices, data of rank 2 for certain: only then is Gemm the same operation."""
    shape = g.known_shape(linear.x)
    return linear.node.op_type == "MatMul" and not linear.kernel and shape is not None and len(shape) == 2


def rewrite(work: Work, linear: Linear, before: Affine | None, after: Affine | None) -> Rewrite | str:
    """``after(linear(before(x)))`` as one linear operator, or the reason why that is not possible."""
    read = work.weights.read
    bias = linear.bias_vector(read)
    if bias is None:
        return "the bias of the linear operator is no constant per output channel"
    old = linear.matrix(read(linear.w))
    matrix, old_bias = old, bias
    dtype = linear.w.dtype
    assert dtype is not None
    if before is not None:
        if not linear.linear_input:
            return f"{linear.node.op_type} is not linear in its input"
        scale, offset = (along(a, linear.in_axis, linear.inputs, linear.rank) for a in (before.scale, before.offset))
        if scale is None or offset is None:
            return "its constant varies along another axis than the input channels of the linear operator"
        blocks = (linear.groups, 1, matrix.shape[2], 1)
        if before.shifts:
            assert linear.uniform, "what zero padding does not see is kept out of the chain"
            if _too_large(offset, dtype):
                return "its offset is so large that the sum would lose precision"
            sums = np.einsum("goik,gi->go", matrix, offset.reshape(linear.groups, -1)).reshape(-1)
            bias = bias + linear.gain * sums
        if before.scales:
            matrix = multiply(matrix, scale.reshape(blocks))
    if after is not None:
        scale, offset = (along(a, linear.out_axis, linear.outputs, linear.rank) for a in (after.scale, after.offset))
        assert scale is not None and offset is not None, "chain_after gives constants per output channel only"
        if after.scales:
            matrix = multiply(matrix, scale.reshape(linear.groups, -1, 1, 1))
        bias = scale * bias + offset
    if matrix is not old and not representable(matrix, dtype):
        return f"its weight times the scale is too small or too large for {dtype.name.lower()}"
    rest: np.ndarray | None = None
    if linear.bias is None and np.any(bias):
        # Only a chain behind the operator: its own constant, which may be a scalar, is the offset.
        rest = after.offset if after is not None and (before is None or not before.shifts) else linear.spread(bias)
    moved = isinstance(linear.shift, np.ndarray) and matrix is not old
    changed = linear.bias is not None and (moved or not np.array_equal(bias, old_bias))
    keeps_none = linear.b is None and not np.any(bias)
    return Rewrite(
        linear,
        matrix if matrix is not old else None,
        bias if changed and not keeps_none else None,
        rest,
        after.nodes if after is not None else (),
    )


def record(work: Work, edit: Edit, change: Rewrite) -> int:
    """Write ``change`` down in ``edit``; returns the position of the constant for `place`, -1 when it needs none."""
    linear = change.linear
    node, dtype = linear.node, linear.w.dtype
    assert dtype is not None
    if change.turned is not None:
        edit.drop(change.after[:-1])
        edit.turn(change.turned, "Add", linear.y)
    elif change.after:
        edit.drop(change.after)
        edit.redirect(change.after[-1].outputs[0], linear.y)
    if change.matrix is not None:
        edit.give(node, linear.weight, linear.layout(change.matrix), dtype)
    if change.bias is not None and linear.bias is not None:
        matrix = change.matrix if change.matrix is not None else linear.matrix(work.weights.read(linear.w))
        stored_as = linear.b.dtype if linear.b is not None and linear.b.dtype is not None else dtype
        edit.give(node, linear.bias, linear.stored_bias(change.bias, matrix), stored_as)
    if change.rest is None:
        return -1
    if change.added and change.turned is None:
        edit.expect("Add", linear.y.name, linear.y)
    return edit.make(change.rest, dtype)


def place(work: Work, change: Rewrite, constants: list[ir.Value], position: int) -> None:
    """Rewire the graph around ``change`` after its constants were written."""
    linear = change.linear
    node = linear.node
    if node.op_type == "Gemm" and change.bias is not None:
        node.attributes.pop("beta", None)
    if change.turned is not None:
        work.turn(change.turned, "Add", linear.y, constants[position])
        return
    if change.after:
        work.bypass(change.after[-1].outputs[0], linear.y)
    if change.rest is None:
        return
    if change.becomes_gemm:
        node.op_type = "Gemm"
        node.resize_inputs(3)
        node.replace_input_with(2, constants[position])
        return
    work.add_after(linear.y, "Add", constants[position])


def absorb_after(work: Work, kinds: tuple[str, ...]) -> None:
    """Fold the affine chains behind the operators of these ``kinds``."""
    for node in work.nodes():
        if node.op_type in kinds:
            while _absorb_one_after(work, node):
                pass


def _absorb_one_after(work: Work, node: ir.Node) -> bool:
    linear = view(node)
    if linear is None:
        return False
    chains = _chains(work, linear)
    for chain in reversed(chains):
        change = rewrite(work, linear, None, chain)
        if isinstance(change, str):
            work.stays(chain.nodes[0], change)
            continue
        if not _pays(len(chain.nodes), [change], chain):
            continue
        siblings = _siblings(work, linear) if change.matrix is not None else []
        for changes in ([change, *siblings], [change]) if siblings else ([change],):
            reason = _commit(work, changes, "after", ())
            if reason is None:
                return True
            work.stays(chain.nodes[0], reason)
    return False


def _chains(work: Work, linear: Linear) -> list[Affine]:
    chains = chain_after(linear.y, work.weights.read, linear.out_axis, linear.outputs, linear.rank)
    return [c for c in chains if c.finite()]


def _siblings(work: Work, linear: Linear) -> list[Rewrite]:
    """The same fold at the other users of a shared weight, when all of them allow it."""
    changes: list[Rewrite] = []
    for use in linear.w.uses():
        if use.node is linear.node:
            continue
        other = view(use.node)
        if other is None or use.idx != other.weight:
            return []
        chains = _chains(work, other)
        change = rewrite(work, other, None, chains[-1]) if chains else "nothing behind it"
        if isinstance(change, str):
            return []
        changes.append(change)
    return changes


def _pays(removed: int, changes: list[Rewrite], chain: Affine, residual: int = 0) -> bool:
    """Fewer nodes; or as many, when a BatchNormalization becomes an Add."""
    saved = removed - residual - sum(change.added for change in changes)
    return saved > 0 or (saved == 0 and any(g.is_op(node, "BatchNormalization") for node in chain.nodes))


def _commit(work: Work, changes: list[Rewrite], rule: str, dropped: tuple[ir.Node, ...]) -> str | None:
    edit = work.edit()
    edit.drop(dropped)
    positions = [record(work, edit, change) for change in changes]
    reason = edit.refusal()
    if reason is not None:
        return reason
    for change in changes:
        name = "gemm" if change.becomes_gemm and change.matrix is None else f"{rule} {change.linear.node.op_type}"
        work.done[name] += 1
    constants = edit.commit()
    for change, position in zip(changes, positions, strict=True):
        place(work, change, constants, position)
    edit.finish()
    return None


def absorb_before(work: Work, kinds: tuple[str, ...]) -> None:
    """Fold the affine chains in front of the operators of these ``kinds``, when every reader of the chain can."""
    for node in work.nodes():
        # What reads a node tells sooner than its constants that there is nothing to do.
        linears = _readers(node, kinds)
        if linears and affine(node, work.weights.read) is not None:
            for chain in chain_before(node.outputs[0], work.weights.read):
                reason = _absorb_chain_before(work, chain, linears)
                if reason is None:
                    break
                work.stays(node, reason)


def _readers(node: ir.Node, kinds: tuple[str, ...]) -> list[Linear]:
    """All that read the result of ``node``, where they are linear operators of these ``kinds``; else none."""
    value = node.outputs[0] if node.outputs else None
    if value is None or value.is_graph_output():
        return []
    linears: list[Linear] = []
    for use in value.uses():
        linear = view(use.node) if use.node.op_type in kinds and use.node.graph is node.graph else None
        if linear is None or use.idx != linear.data:
            return []
        linears.append(linear)
    return linears


def _absorb_chain_before(work: Work, chain: Affine, linears: list[Linear]) -> str | None:
    """Fold ``chain`` into all of ``linears``; the reason when that is not possible."""
    dtype = linears[0].w.dtype
    if not chain.finite() or dtype is None:
        return "its constants leave the range of their type"
    if not _shape_known(chain, linears):
        return "its constant may broadcast the input to a larger shape"
    left = chain
    offset: np.ndarray | None = None
    if chain.shifts and not all(linear.uniform for linear in linears):
        if not np.all(chain.scale):
            return "zero padding does not see its offset"
        # What padding cannot see stays in front, as x + t / s.
        offset = np.asarray(chain.offset / chain.scale)
        left = dataclasses.replace(chain, offset=np.array(0.0))
        # An offset alone stays as it is, also where it is written as a BatchNormalization.
        if not (chain.scales or len(chain.nodes) > 1):
            return "zero padding does not see its offset"
    changes: list[Rewrite] = []
    removed = len(chain.nodes)
    for linear in linears:
        after = _chains(work, linear)[-1:] if linear.bias is None and left.shifts else []
        change = rewrite(work, linear, left, after[0] if after else None)
        if isinstance(change, str):
            return change
        removed += len(change.after)
        changes.append(change)
    if not _pays(removed, changes, chain, residual=int(offset is not None)):
        if offset is not None:
            return "the zero padding of the operator behind it does not see its offset"
        return "the operator behind it has no room for its offset"
    edit = work.edit()
    position = -1
    if offset is None:
        edit.drop(chain.nodes)
        edit.redirect(chain.y, chain.x)
    else:
        edit.drop(chain.nodes[:-1])
        edit.turn(chain.nodes[-1], "Add", chain.x)
        position = edit.make(offset, dtype)
    positions = [record(work, edit, change) for change in changes]
    reason = edit.refusal()
    if reason is not None:
        return reason
    for change in changes:
        work.done[f"before {change.linear.node.op_type}"] += 1
    constants = edit.commit()
    if offset is None:
        g.replace(chain.y, chain.x)
    else:
        work.turn(chain.nodes[-1], "Add", chain.x, constants[position])
    for change, at in zip(changes, positions, strict=True):
        place(work, change, constants, at)
    edit.finish()
    return None


def _shape_known(chain: Affine, linears: list[Linear]) -> bool:
    """Whether the input of ``chain`` has the shape of its result."""
    # All but MatMul tell that their data has two axes at least; the vector that a MatMul reads may come from a scalar.
    return keeps_shape(chain) or (chain.shape == (1,) and linears[0].node.op_type != "MatMul")


def _too_large(offset: np.ndarray, dtype: ir.DataType) -> bool:
    """True when ``W x + W t`` would cancel: the data minus a mean far larger than its spread."""
    eps = limits(dtype).eps
    return float(np.max(np.abs(offset), initial=0.0)) * eps > max(1e-4, 8 * eps)
