"""Refit what is left: every linear layer is asked to give the original outputs from the inputs it now gets.

With t the output that a layer should give and z the observation it now gets (K: the columns that stay), both centred:

    min over V of E|t - V z_K|² + λ|V - M_K|²
    V = (E[t z_Kᵀ] + λ M_K)(E[z_K z_Kᵀ] + λI)⁻¹,   b' = b + t̄ - V z̄_K

t is what the original layer gave, M x; where the output is added to a value computed before (a residual stream), t also
makes up for what that value has lost. Layers are refitted in the order of the graph, so that each corrects what the
ones before it could not (channel pruning by least squares: He et al., arXiv:1707.06168). Nothing is cut here: removed
columns become 0, which is the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from scipy import linalg

from onnxslim.calibration import Moments
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.frontier import Frontier
from onnxslim.graph import constant, set_constant
from onnxslim.passes.prune.layers import Layer

MEMORY = 400_000_000  # bytes of second moments, and as many of targets, held at a time
TURNS = 64  # layers are refitted in this many turns, at most, where memory allows it
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ relative to the mean variance; which one, held-out samples decide
STILL = 1e-3  # share of the mean square below which a variance is not told from noise
ROWS = 8  # observations per column, and at least 8192


def refit(
    original: ir.Model,
    pruned: ir.Model,
    layers: Sequence[Layer],
    removed: Callable[[Layer], np.ndarray],
    fit: Data,
    held_out: Data,
    ctx: Context,
) -> int:
    """Refit ``layers`` (in graph order) of ``pruned`` in place; returns how many changed.

    Args:
        original: the model to imitate, same nodes and value names.
        pruned: the masked model.
        removed: bool per channel of a layer.
        held_out: samples that choose λ for each layer, infinity (only the bias moves) among the choices.
    """
    changed = 0
    turns = _turns(layers, lambda layer: 16 * layer.columns**2, -(-len(layers) // TURNS))
    parts = [part for part in (fit, held_out) if len(part)]
    wanted, given = ([Frontier(part, threads=ctx.threads) for part in parts] for _ in range(2))
    targets: dict[Layer, _Targets] = {}
    for k, turn in enumerate(ctx.progress.track(turns, total=len(turns), label="reconstruct")):
        if turn[0] not in targets:
            ahead = _together(turns[k:], lambda x: 4 * _limit(x, fit) * len(fit) * x.outputs)
            behind = turns[k + len(ahead)][0].place(original) if k + len(ahead) < len(turns) else 0
            targets = _targets(original, [layer for turn in ahead for layer in turn], wanted, fit, behind)
        moments = {layer: [Moments() for _ in parts] for layer in turn}
        residuals = [name for layer in turn if (name := targets[layer].residual)]
        for p, frontier in enumerate(given):
            frontier.advance(pruned, turn[0].place(pruned))
            for s, z in enumerate(frontier.tap(pruned, [*(x.data for x in turn), *residuals])):
                for layer in turn:
                    limit = _limit(layer, fit)
                    target = targets[layer].rows[p][s]
                    if name := targets[layer].residual:
                        target = target - layer.output_rows(z[name], limit, s)
                    moments[layer][p].add(layer.rows(z[layer.data], limit, s), target)
        for layer in turn:
            targets.pop(layer)
            changed += _solve(original, pruned, layer, moments.pop(layer), removed(layer))
    return changed


@dataclasses.dataclass
class _Targets:
    """What a layer should give: per part of the data and sample, rows (n, out), with the residual added to them."""

    residual: str | None
    rows: list[list[np.ndarray]]


def _targets(
    original: ir.Model, layers: Sequence[Layer], frontiers: Sequence[Frontier], fit: Data, behind: int
) -> dict[Layer, _Targets]:
    """Run the original once for many layers, up to the node ``behind`` them."""
    result = {}
    for layer in layers:
        result[layer] = _Targets(None if layer.shared else layer.residual(), [[] for _ in frontiers])
    names = [layer.data if layer.shared else layer.output for layer in layers]
    residuals = [targets.residual for targets in result.values() if targets.residual]
    for p, frontier in enumerate(frontiers):
        for s, x in enumerate(frontier.tap(original, [*names, *residuals], behind)):
            for layer, name in zip(layers, names, strict=True):
                limit = _limit(layer, fit)
                rows = layer.rows(x[name], limit, s) if layer.shared else layer.output_rows(x[name], limit, s)
                if residual := result[layer].residual:
                    rows = rows + layer.output_rows(x[residual], limit, s)
                result[layer].rows[p].append(np.asarray(rows, np.float32))
    return result


def _limit(layer: Layer, data: Data) -> int:
    """Observations per sample."""
    return max(-(-max(ROWS * layer.columns, 8192) // max(len(data), 1)), 32)


def _turns(layers: Sequence[Layer], size: Callable[[Layer], int], most: int) -> list[list[Layer]]:
    """Consecutive layers, at most ``most`` of them and `MEMORY` bytes of ``size`` together."""
    turns: list[list[Layer]] = []
    used = 0
    for layer in layers:
        need = size(layer)
        if not turns or len(turns[-1]) >= most or used + need > MEMORY:
            turns.append([])
            used = 0
        turns[-1].append(layer)
        used += need
    return turns


def _together(turns: Sequence[list[Layer]], size: Callable[[Layer], int]) -> Sequence[list[Layer]]:
    """The first of ``turns``, as many as have `MEMORY` bytes of ``size`` together, and at least one."""
    used = np.cumsum([sum(map(size, turn)) for turn in turns])
    return turns[: max(1, int(np.searchsorted(used, MEMORY, side="right")))]


@dataclasses.dataclass
class _Normal:
    """The normal equations of one layer: centred where it has a bias to move."""

    t: np.ndarray
    z: np.ndarray
    tz: np.ndarray
    zz: np.ndarray

    @classmethod
    def of(cls, moments: Moments, centred: bool, columns: int) -> _Normal:
        if centred:
            return cls(moments.mean("x"), moments.mean("z"), moments.covariance("xz"), moments.covariance("zz"))
        tz = moments.second("xz")
        return cls(np.zeros(len(tz)), np.zeros(columns), tz, moments.second("zz"))

    def loss(self, matrix: np.ndarray) -> float:
        """E|t - V z|² less E|t|², which no V changes."""
        used = np.flatnonzero(matrix.any(axis=0))
        some = matrix[:, used]
        # Losses are compared with each other: what float32 leaves out makes no choice better or worse.
        product = some.astype(np.float32) @ self.zz[np.ix_(used, used)].astype(np.float32)
        return float(np.sum(product * some) - 2 * np.sum(some * self.tz[:, used]))


def _fitted(normal: _Normal, old: np.ndarray, keep: np.ndarray, ridge: float) -> np.ndarray | None:
    """V with zeros where not ``keep``; None where λ is too small for the equations to say anything."""
    kept = normal.zz[np.ix_(keep, keep)]
    kept.flat[:: len(kept) + 1] += ridge
    right = normal.tz[:, keep] + ridge * old[:, keep]
    try:
        # The transpose of a symmetric matrix is itself, and in the order of LAPACK.
        factor = linalg.cho_factor(kept.T, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:
        return None
    solved = linalg.cho_solve(factor, right.T, overwrite_b=True, check_finite=False)
    if not np.isfinite(solved).all():
        return None
    result = np.zeros_like(old)
    result[:, keep] = solved.T
    return result


def _solve(original: ir.Model, pruned: ir.Model, layer: Layer, moments: Sequence[Moments], removed: np.ndarray) -> bool:
    keep = ~removed[layer.channel]
    if any(m.empty for m in moments) or not keep.any():
        return False
    bias = layer.bias(pruned)
    matrix = layer.matrix(original)
    equations = [_Normal.of(m, bias is not None, layer.columns) for m in moments]
    fit, judge = equations[0], equations[-1]
    # For a shared layer t is the original observation x itself and V mixes channels: x ≈ V z_K, the same for every tap.
    old = np.eye(layer.channels) if layer.shared else layer.matrix(pruned)
    old = np.where(keep, old, 0.0)
    # An input that hardly varies about its mean says nothing about slopes, however exactly it can be fitted.
    variance = np.diag(fit.zz)[keep]
    scale = max(float(np.mean(variance)), STILL * float(np.mean(variance + fit.z[keep] ** 2)), 1e-12)
    best, fitted = judge.loss(old), old
    for ridge in RIDGES:
        trial = _fitted(fit, old, keep, ridge * scale)
        if trial is not None and (loss := judge.loss(trial)) < best:
            best, fitted = loss, trial
    if layer.shared:
        taps = matrix.reshape(len(matrix), layer.channels, layer.taps)
        new = np.einsum("oct,ck->okt", taps, fitted)
        shift = taps.sum(axis=2) @ fit.t - new.sum(axis=2) @ fit.z
        fitted = new.reshape(matrix.shape)
    else:
        shift = fit.t - fitted @ fit.z
    layer.write(pruned, fitted)
    if bias is not None:
        before = np.asarray(constant(bias))
        # The output of a Conv or Gemm has the bias in it, that of a MatMul or of a patch matrix has not.
        base = layer.stated(original) if layer.shared or not layer.biased else 0
        set_constant(bias, (base + shift).astype(before.dtype))
    return True
