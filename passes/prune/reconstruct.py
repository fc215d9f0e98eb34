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

from onnxslim import runtime
from onnxslim.calibration import Moments
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import constant, set_constant
from onnxslim.passes.prune.layers import Layer

MEMORY = 1_000_000_000  # bytes of second moments held at a time
PASSES = 48  # forward passes over the data, at most: layers are refitted in this many turns


@dataclasses.dataclass(frozen=True)
class Options:
    """How hard to fit: ``ridge`` relative to the mean variance, ``rows`` observations per column."""

    ridge: float = 1e-2
    rows: int = 16


def refit(
    original: ir.Model,
    pruned: ir.Model,
    layers: Sequence[Layer],
    removed: Callable[[Layer], np.ndarray],
    data: Data,
    ctx: Context,
    options: Options = Options(),
) -> int:
    """Refit ``layers`` (in graph order) of ``pruned`` in place; returns how many changed.

    Args:
        original: the model to imitate, same nodes and value names.
        pruned: the masked model.
        removed: bool per channel of a layer.
    """
    changed = 0
    turns = _turns(layers)
    for turn in ctx.progress.track(turns, total=len(turns), label="reconstruct"):
        moments = [Moments() for _ in turn]
        residuals = [layer.residual() if not layer.shared else None for layer in turn]
        shared = [name for name in residuals if name]
        wanted = [layer.data if layer.shared else layer.output for layer in turn]
        before = runtime.tap(original, [*wanted, *shared], data.feeds(), threads=ctx.threads)
        after = runtime.tap(pruned, [*(layer.data for layer in turn), *shared], data.feeds(), threads=ctx.threads)
        for k, (x, z) in enumerate(zip(before, after, strict=True)):
            for layer, sums, name, residual in zip(turn, moments, wanted, residuals, strict=True):
                limit = max(-(-options.rows * layer.columns // len(data)), 32)
                if layer.shared:
                    target = layer.rows(x[name], limit, k)
                else:
                    target = layer.output_rows(x[name], limit, k)
                if residual:
                    target = target + layer.output_rows(x[residual] - z[residual], limit, k)
                sums.add(layer.rows(z[layer.data], limit, k), target)
        for layer, sums in zip(turn, moments, strict=True):
            changed += _solve(original, pruned, layer, sums, removed(layer), options)
    return changed


def _turns(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Consecutive layers that share a pass over the data."""
    size = -(-len(layers) // PASSES)
    turns: list[list[Layer]] = []
    used = 0
    for layer in layers:
        need = 16 * layer.columns**2
        if not turns or len(turns[-1]) >= size or used + need > MEMORY:
            turns.append([])
            used = 0
        turns[-1].append(layer)
        used += need
    return turns


def _solve(
    original: ir.Model, pruned: ir.Model, layer: Layer, moments: Moments, removed: np.ndarray, options: Options
) -> bool:
    keep = ~removed[layer.channel]
    if moments.empty or not keep.any():
        return False
    bias = layer.bias(pruned)
    matrix = layer.matrix(original)
    if bias is not None:
        t, z, tz, zz = moments.mean("x"), moments.mean("z"), moments.covariance("xz"), moments.covariance("zz")
    else:
        t, z, tz, zz = np.zeros(1), np.zeros(layer.columns), moments.second("xz"), moments.second("zz")
    zz, n = zz[np.ix_(keep, keep)], max(moments.count, 1)
    # Fewer observations than unknowns: lean on the old weights the more.
    scale = options.ridge * max(1.0, 4 * len(zz) / n) * max(float(np.mean(np.diag(zz))), 1e-12)
    damped = zz + scale * np.eye(len(zz))
    fitted = np.zeros_like(matrix)
    if layer.shared:
        # Here t is the original x itself, and V mixes channels: x ≈ V z_K, the same for every tap.
        prior = np.eye(layer.channels)[:, keep]
        mixing = np.linalg.solve(damped, (tz[:, keep] + scale * prior).T).T
        taps = matrix.reshape(len(matrix), layer.channels, layer.taps)
        new = np.zeros_like(taps)
        new[:, keep] = np.einsum("oct,ck->okt", taps, mixing)
        fitted = new.reshape(matrix.shape)
        shift = taps.sum(axis=2) @ t - new.sum(axis=2) @ z if bias is not None else t
    else:
        right = tz[:, keep] + scale * matrix[:, keep]
        fitted[:, keep] = np.linalg.solve(damped, right.T).T
        shift = t - fitted @ z
    if not np.isfinite(fitted).all():
        return False
    layer.write(pruned, fitted)
    if bias is not None:
        old = np.asarray(constant(bias))
        # The output of a Conv or Gemm has the bias in it, that of a MatMul or of a patch matrix has not.
        base = old if layer.shared or not layer.biased else 0
        set_constant(bias, (base + shift).astype(old.dtype))
    return True
