"""Runs of elementwise nodes with constants, rewritten as at most one Mul and one Add.

``c * (a x + b) + d = (c a) x + (c b + d)`` whatever shapes the constants have; a scale of 1 or an offset of 0 needs no
node where its constant does not broadcast x to a larger shape. Left alone: constants whose product takes more bytes
than they do or loses precision among the subnormal numbers, offsets so large that they round x on purpose, and the
constants of patterns that ONNX Runtime fuses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fold.affine import Affine, affine, keeps_shape, protected, rounding
from onnxslim.passes.fold.edit import faithful
from onnxslim.passes.fold.work import Work


def merge_chains(work: Work) -> None:
    """Shorten every run of elementwise nodes with constants."""
    apart: set[ir.Node] = set()  # nodes that round on purpose: none of them starts or continues a run
    for node in work.nodes():
        # The longest part that can be merged, from the front; the rest is seen when its own first node comes.
        parts = list(itertools.accumulate(_run(work, node, apart), Affine.then))
        for part in reversed(parts):
            if _merge(work, part):
                break


def _run(work: Work, node: ir.Node, apart: set[ir.Node]) -> Iterator[Affine]:
    """The run of elementwise nodes that starts with ``node``, up to those that are ``apart``, which grows."""
    steps: list[Affine] = []
    at: ir.Node | None = node
    while at is not None and not g.is_op(at, "BatchNormalization") and not protected(at):
        step = affine(at, work.weights.read)
        if step is None or at.graph is not node.graph:
            break
        steps.append(step)
        at = g.only_user(at.outputs[0])
    apart.update(steps[k].nodes[0] for k in rounding(steps))
    return itertools.takewhile(lambda step: step.nodes[0] not in apart, steps)


def _merge(work: Work, chain: Affine) -> bool:
    dtype = chain.y.dtype or chain.x.dtype
    if dtype is None or not chain.finite():
        return False
    steps: list[tuple[str, np.ndarray]] = []
    if chain.scales:
        if not faithful(chain.scale, dtype):
            return False
        steps.append(("Mul", chain.scale))
    if chain.shifts:
        steps.append(("Add", chain.offset))
    if len(steps) >= len(chain.nodes):
        return False
    needed = np.broadcast_shapes((), *(array.shape for _, array in steps))
    if needed != chain.shape and not keeps_shape(chain):
        return False
    if not steps and chain.y.is_graph_output() and (chain.x.producer() is None or chain.x.is_graph_output()):
        return False  # an Identity would take the place of the node
    kept = chain.nodes[len(chain.nodes) - len(steps) :]
    edit = work.edit(strict=True)
    edit.drop(chain.nodes[: len(chain.nodes) - len(steps)])
    for node, (op_type, _) in zip(kept, steps, strict=True):
        edit.turn(node, op_type, chain.x if node is kept[0] else kept[0].outputs[0])
    positions = [edit.make(array, dtype) for _, array in steps]
    if not steps:
        edit.redirect(chain.y, chain.x)
    if edit.refusal() is not None:
        return False
    work.done["chains"] += 1
    constants = edit.commit()
    value = chain.x
    for node, (op_type, _), position in zip(kept, steps, positions, strict=True):
        work.turn(node, op_type, value, constants[position])
        value = node.outputs[0]
        value.shape = chain.y.shape if value is chain.y or keeps_shape(chain) else None
    if not steps:
        g.replace(chain.y, chain.x)
    edit.finish()
    return True
