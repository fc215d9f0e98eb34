"""Constants per channel between convolutions, as the operator that keeps the layout of the convolutions.

ONNX Runtime's CPU provider runs convolutions, pools and some activations on blocks of channels (NCHWc). Mul and Add by
constants are not among them: the tensor is copied into rows before such a node and into blocks behind it. As a
BatchNormalization with mean 0 and variance 1, ``y = s x + t`` per channel, it becomes a convolution of such blocks.
Done when the graph that the runtime executes then has fewer nodes and no BatchNormalization that it had not before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.errors import ModelError
from onnxslim.linear import along, float64
from onnxslim.passes.fold.affine import Affine, affine
from onnxslim.passes.fuse.work import Work

# With a variance of 1 - EPSILON, both exact in float32, their sum is 1.
EPSILON = 2.0**-16
# What ONNX Runtime can run on blocks of channels; a Mul is the last node of a SiLU.
BEFORE = (
    "Conv", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Mul", "Add", "MaxPool",
    "AveragePool", "Concat",
)  # fmt: skip
BEHIND = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool")


def fuse_shifts(work: Work, ctx: Context) -> None:
    """Replace Mul and Add per channel between convolutions, where that saves copies on the CPU provider."""
    chosen = {chain.y.name for chain in _candidates(work.model)} if ctx.target == "cpu" else set()
    before = _executed(work.model, ctx) if chosen else []
    while chosen:
        draft = Work(work.model.clone(), work.newest)
        made = _replace(draft, chosen)
        after = _executed(draft.model, ctx)
        # What the runtime still executes as BatchNormalization is better off as it was.
        stuck = {made[v.name] for node in after for v in node.outputs if v.name in made and _is_batchnorm(node)}
        if not stuck:
            if 0 < len(after) < len(before):
                _replace(work, chosen)
            return
        chosen -= stuck


def _executed(model: ir.Model, ctx: Context) -> list[ir.Node]:
    """The nodes that ONNX Runtime executes; none when it cannot run the model."""
    try:
        return list(runtime.optimized(model, threads=ctx.threads).graph)
    except ModelError:
        return []


def _is_batchnorm(node: ir.Node) -> bool:
    return g.is_op(node, "BatchNormalization")


def _candidates(model: ir.Model) -> list[Affine]:
    """Chains of Mul and Add by constants per channel between operators on blocks of channels."""
    chains: list[Affine] = []
    for node in model.graph:
        chain = affine(node, float64) if g.is_op(node, "Mul", "Add", "Sub", "Div") else None
        if chain is None:
            continue
        follower = g.only_user(chain.y)
        after = affine(follower, float64) if follower is not None and not _is_batchnorm(follower) else None
        if after is not None and follower is not None and follower.graph is node.graph:
            chain = chain.then(after)
        elif any(node in earlier.nodes for earlier in chains):
            continue
        users = [use.node for use in chain.y.uses()]
        if not users or chain.y.is_graph_output() or not all(g.is_op(user, *BEHIND) for user in users):
            continue
        usable = _per_channel(chain) is not None and chain.finite() and not chain.rounds_on_purpose(ir.DataType.FLOAT)
        if g.is_op(chain.x.producer(), *BEFORE) and usable:
            chains.append(chain)
    return chains


def _per_channel(chain: Affine) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and offset (channels,) of a chain on a float32 tensor (n, channels, h, w) that keeps its shape."""
    shape = g.known_shape(chain.x)
    if shape is None or len(shape) != 4 or shape[1] is None or chain.x.dtype is not ir.DataType.FLOAT:
        return None
    scale, offset = (along(array, -3, shape[1], 4) for array in (chain.scale, chain.offset))
    return (scale, offset) if scale is not None and offset is not None else None


def _replace(work: Work, chosen: set[str | None]) -> dict[str | None, str | None]:
    """Turn the candidates whose results are called ``chosen`` into BatchNormalization; new names of these results."""
    made = {}
    for chain in _candidates(work.model):
        constants = _per_channel(chain)
        if chain.y.name not in chosen or constants is None:
            continue
        one = np.ones_like(constants[0])
        arrays = (*constants, 0 * one, one - EPSILON)
        inputs = [chain.x, *(work.constant(array.astype(np.float32)) for array in arrays)]
        root = chain.nodes[-1]
        node = work.insert("BatchNormalization", inputs, root, {"epsilon": EPSILON})
        name = chain.y.name
        work.replace(root, node)
        made[node.outputs[0].name] = name
        work.done["BatchNormalization"] += 1
    return made
