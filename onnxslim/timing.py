"""What measured rounds say: medians, ratios with intervals that hold, and how quiet the machine was.

Rounds come in blocks (`onnxslim.rounds.block`). Within a block every model runs once per round, so that a round
compares passes of the same instant; each block makes its sessions anew, because two sessions of one file differ by more
than the rounds of a session do. A block therefore counts as *one* independent observation of log(first / other), the
median over its rounds, and the interval of the ratio is that of the centre of these observations. A pass that is nan
was disturbed and does not count; where there are such, the observation compares the medians of the passes that do.
The centre:

* from 8 blocks on by inverting Wilcoxon's signed-rank test: pairs of blocks are averaged (Walsh averages), and the
  interval runs from the k-th smallest to the k-th largest. It assumes nothing about the noise but symmetry; its exact
  coverage is the smallest one of at least `CONFIDENCE`. Hollander, Wolfe: Nonparametric Statistical Methods, 3.
* with fewer by Student's t.

Kalibera, Jones: Rigorous Benchmarking in Reasonable Time (ISMM 2013) explains why the level that varies is repeated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

# Of every interval that onnxslim prints for a ratio of times.
CONFIDENCE = 0.99
_SIGNED_RANK = 8
# Student's t at (1 + CONFIDENCE) / 2 for 1, 2, ... degrees of freedom; SciPy takes half a second to import.
_STUDENT = (63.656741, 9.924843, 5.840909, 4.604095, 4.032143, 3.707428)
# A pass that takes this many times the median of its model in its block was disturbed.
_DISTURBED = 1.5


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median, 10th and 90th percentile, number of runs that count."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Latencies of several models measured in turn, and each one's speed over the first with its interval.

    ``disturbed`` is the share of passes that are nan or took over 1.5 times their model's median: what other processes
    did.
    ``drift`` is the speed of the last blocks over that of the first (0.8: the machine became a quarter slower, as a
    processor does that is throttled), 1 where that is within noise.
    """

    latency: list[Latency]
    speedup: list[float]
    interval: list[tuple[float, float]]
    disturbed: float = 0.0
    drift: float = 1.0
    blocks: int = 1


def verdict(speedup: float, interval: Sequence[float]) -> str:
    """``faster`` or ``slower`` only where the whole interval says so, else ``same within noise``."""
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "same within noise"


def plan_blocks(load_seconds: float, seconds: float) -> int:
    """How many blocks to measure in: many, unless making the sessions of one takes long beside ``seconds``.

    The interval narrows with the blocks and hardly with the rounds in each.
    """
    for count, most in ((36, 2.0), (12, 4.0), (_SIGNED_RANK, 8.0)):
        if count * load_seconds <= most * seconds:
            return count
    return 5


def compare(blocks: Sequence[np.ndarray]) -> Comparison:
    """Compare the models of ``blocks``, two of them at least, each (rounds, models) in ms; some of each are not nan."""
    tables = [np.asarray(b, np.float64) for b in blocks]
    columns = [c[~np.isnan(c)] for c in np.concatenate(tables).T]
    latency = [
        Latency(float(np.median(c)), float(np.percentile(c, 10)), float(np.percentile(c, 90)), len(c)) for c in columns
    ]
    medians = [np.nanmedian(t, axis=0) for t in tables]
    # Written so that nan, of which no comparison holds, is disturbed.
    quiet = [(t <= _DISTURBED * middle).ravel() for t, middle in zip(tables, medians, strict=True)]
    ratios = [ratio([t[:, 0] for t in tables], [t[:, k] for t in tables]) for k in range(len(latency))]
    return Comparison(
        latency,
        [speedup for speedup, _ in ratios],
        [interval for _, interval in ratios],
        disturbed=1 - float(np.mean(np.concatenate(quiet))),
        drift=_drift(tables),
        blocks=len(tables),
    )


def ratio(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, tuple[float, float]]:
    """The speed of ``other`` over ``first`` and its interval, from the passes (ms) of each in the same blocks.

    Blocks with as many passes of both, none of them nan, are taken to be rounds, and compared round by round.
    """
    logs = np.array([_observation(np.asarray(a), np.asarray(b)) for a, b in zip(first, other, strict=True)])
    middle, (low, high) = centre(logs)
    return float(np.exp(middle)), (float(np.exp(low)), float(np.exp(high)))


def _observation(first: np.ndarray, other: np.ndarray) -> float:
    rounds = len(first) == len(other) and not np.isnan(first + other).any()
    return float(np.median(np.log(first / other)) if rounds else np.log(np.nanmedian(first) / np.nanmedian(other)))


def centre(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The centre of independent observations, and its interval at `CONFIDENCE` (see the module)."""
    values = np.asarray(values, np.float64)
    count = len(values)
    if count < _SIGNED_RANK:
        mean = float(values.mean())
        half = float(_STUDENT[count - 2] * values.std(ddof=1) / np.sqrt(count))
        return mean, (mean - half, mean + half)
    first, second = np.triu_indices(count)
    walsh = np.sort((values[first] + values[second]) / 2)
    cut = _signed_rank_cut(count)
    return float(np.median(walsh)), (float(walsh[cut]), float(walsh[-1 - cut]))


@functools.cache
def _signed_rank_cut(count: int) -> int:
    """The largest k for which the two tails P(W <= k) of the signed-rank statistic are 1 - `CONFIDENCE` at most."""
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1
    for rank in range(1, count + 1):
        ways[rank:] += ways[:-rank].copy()
    tail = np.cumsum(ways) / 2.0**count
    return int(np.searchsorted(tail, (1 - CONFIDENCE) / 2, side="right")) - 1


def _drift(tables: Sequence[np.ndarray]) -> float:
    """Speed of the last third of the blocks over the first third, where a rank test finds a trend, else 1."""
    third = len(tables) // 3
    if third < 2:
        return 1.0
    from scipy import stats

    times = np.array([np.nanmedian(np.log(t)) for t in tables])
    if stats.kendalltau(np.arange(len(times)), times).pvalue > 1 - CONFIDENCE:
        return 1.0
    return float(np.exp(np.median(times[:third]) - np.median(times[-third:])))
