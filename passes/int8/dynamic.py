"""Layers that static ranges cannot serve, on integers with the ranges that their inputs have at every inference."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from onnxslim import dynamic, runtime
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import in_branches, is_op, subgraphs
from onnxslim.passes.dynamic_int8 import Found, search

# Share of what all of int8 may cost the outputs that these layers may take; the others get what is left of it.
SHARE = 0.5


def quantize(
    model: ir.Model,
    names: Collection[str],
    data: Data,
    ctx: Context,
    *,
    fidelity: float,
    measure: bool,
    portable: bool,
) -> Found:
    """Give dynamic ranges, in place, to those of ``names`` that have a kernel for them and are worth it.

    These are LSTM layers, and products in the bodies of loops, whose values nobody sees. What is in the branch of an If
    stays in float where no sample takes the branch.

    Args:
        names: layers without a static integer kernel.
        data: samples that judge.
        fidelity: of all of int8; 0 is no bound.
    """
    suited = _suited(model, names, data, ctx)
    allowed = 1 - SHARE * (1 - fidelity) if fidelity else 0.0
    found = search(model, suited, data, ctx, allowed, measure=measure, portable=portable)
    if found.names:
        dynamic.insert(model, found.names, portable=portable)
    return found


def _suited(model: ir.Model, names: Collection[str], data: Data, ctx: Context) -> list[str]:
    """Those of ``names`` that have a dynamic kernel and that samples run, as far as can be seen."""
    branched = [n for n in in_branches(model.graph) if n.name in names and dynamic.unsuitable(n) is None]
    inside = [n for n in branched if n.graph is not model.graph]
    shown = {v.name: n.name for n in inside for v in n.outputs if v.name and v.dtype is not None}
    feeds = data.feeds() if shown else ()
    taken = {shown[v] for seen in runtime.tap(model, shown, feeds, threads=ctx.threads) for v in shown if seen[v].size}
    looped = [
        n.name or ""
        for loop in model.graph
        if not is_op(loop, "If")
        for body in subgraphs(loop)
        for n in body.all_nodes()
        if n.name in names and dynamic.unsuitable(n) is None
    ]
    return [n.name or "" for n in branched if n.graph is model.graph or n.name in taken] + looped
