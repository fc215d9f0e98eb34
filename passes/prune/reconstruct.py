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
import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime
from onnxslim.calibration import Moments
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import constant, set_constant
from onnxslim.passes.prune.layers import Layer

MEMORY = 1_000_000_000  # bytes of second moments, and as many of targets, held at a time
PASSES = 48  # forward passes over the data, at most: layers are refitted in this many turns
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
    turns = _turns(layers, lambda layer: 16 * layer.columns**2, -(-len(layers) // PASSES))
    parts = [part for part in (fit, held_out) if len(part)]
    targets: dict[Layer, _Targets] = {}
    for k, turn in enumerate(ctx.progress.track(turns, total=len(turns), label="reconstruct")):
        if turn[0] not in targets:
            ahead = [layer for later in turns[k:] for layer in later]
            chunk = _turns(ahead, lambda x: 4 * _limit(x, fit) * len(fit) * len(x.matrix(original)), len(ahead))[0]
            targets = _targets(original, [*turn, *(layer for layer in chunk if layer not in turn)], parts, fit, ctx)
        moments = {layer: [Moments() for _ in parts] for layer in turn}
        residuals = [name for layer in turn if (name := targets[layer].residual)]
        for p, part in enumerate(parts):
            values = runtime.tap(pruned, [*(x.data for x in turn), *residuals], part.feeds(), threads=ctx.threads)
            for s, z in enumerate(values):
                for layer in turn:
                    limit = _limit(layer, fit)
                    target = targets[layer].rows[p][s]
                    if name := targets[layer].residual:
                        target = target - layer.output_rows(z[name], limit, s)
                    moments[layer][p].add(layer.rows(z[layer.data], limit, s), target)
        for layer in turn:
            changed += _solve(original, pruned, layer, moments[layer], removed(layer))
    return changed


@dataclasses.dataclass
class _Targets:
    """What a layer should give: per part of the data and sample, rows (n, out), with the residual added to them."""

    residual: str | None
    rows: list[list[np.ndarray]]


def _targets(
    original: ir.Model, layers: Sequence[Layer], parts: Sequence[Data], fit: Data, ctx: Context
) -> dict[Layer, _Targets]:
    """Run the original once for many layers."""
    result = {}
    for layer in layers:
        result[layer] = _Targets(None if layer.shared else layer.residual(), [[] for _ in parts])
    names = [layer.data if layer.shared else layer.output for layer in layers]
    residuals = [targets.residual for targets in result.values() if targets.residual]
    for p, part in enumerate(parts):
        for s, x in enumerate(runtime.tap(original, [*names, *residuals], part.feeds(), threads=ctx.threads)):
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
        return float(np.sum((matrix @ self.zz) * matrix) - 2 * np.sum(matrix * self.tz))


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
    kept = fit.zz[np.ix_(keep, keep)]
    # An input that hardly varies about its mean says nothing about slopes, however exactly it can be fitted.
    second = np.diag(kept) + fit.z[keep] ** 2
    scale = max(float(np.mean(np.diag(kept))), STILL * float(np.mean(second)), 1e-12)
    values, vectors = np.linalg.eigh(kept)
    best, chosen = judge.loss(old), np.inf
    for ridge in RIDGES:
        right = fit.tz[:, keep] + ridge * scale * old[:, keep]
        trial = np.zeros_like(old)
        trial[:, keep] = (right @ vectors / (np.maximum(values, 0) + ridge * scale)) @ vectors.T
        loss = judge.loss(trial)
        if np.isfinite(trial).all() and loss < best:
            best, chosen = loss, ridge
    # What held-out samples have decided, all samples are fitted with.
    every = _Normal.of(functools.reduce(Moments.joined, moments), bias is not None, layer.columns)
    fitted = old
    if np.isfinite(chosen):
        kept = every.zz[np.ix_(keep, keep)]
        right = every.tz[:, keep] + chosen * scale * old[:, keep]
        fitted = np.zeros_like(old)
        fitted[:, keep] = np.linalg.solve(kept + chosen * scale * np.eye(len(kept)), right.T).T
    if layer.shared:
        taps = matrix.reshape(len(matrix), layer.channels, layer.taps)
        new = np.einsum("oct,ck->okt", taps, fitted)
        shift = taps.sum(axis=2) @ every.t - new.sum(axis=2) @ every.z
        fitted = new.reshape(matrix.shape)
    else:
        shift = every.t - fitted @ every.z
    layer.write(pruned, fitted)
    if bias is not None:
        before = np.asarray(constant(bias))
        # The output of a Conv or Gemm has the bias in it, that of a MatMul or of a patch matrix has not.
        base = layer.stated(original) if layer.shared or not layer.biased else 0
        set_constant(bias, (base + shift).astype(before.dtype))
    return True
