"""Holds the coupling of channels to its oracle on real models: masked channels and removed channels give the same.

    python bench/oracle.py [NAME ...] [--fast] [--threads 1]

Without a name it takes every model at hand (`python models/zoo.py fetch --all` fetches the others). Every model is
simplified and folded first. Then, family by family, one random unit is masked in one copy and removed from another, and
their outputs are compared on a sample; last, one unit of every family in one go and a random half of the units of every
family in one go. ``--fast`` does only the last two.

The error is the largest difference relative to the largest magnitude of the output; 1e-4 is allowed. A model that lost
half of its channels can amplify rounding by more than that: a larger error therefore counts only beyond four times the
"noise", what the masked model differs from itself by with the optimizations of ONNX Runtime on and off. Exit codes: 0
done, 1 a model differs by more.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import zoo
from onnxslim import coupling, data, pipeline, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.coupling import Coupling, Family

TOLERANCE = 1e-4
# As in onnxslim.verify: how many times its own noise a model may be off.
NOISE = 4.0
Feeds = Mapping[str, np.ndarray]


def some_units(families: Iterable[Family], rng: np.random.Generator, share: float) -> np.ndarray:
    """Atoms: at random this share of every family, at least one unit and never all."""
    chosen = []
    for family in families:
        n = len(family.atoms)
        chosen.append(rng.permutation(family.atoms)[: min(n - 1, max(1, int(n * share)))])
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def difference(coupled: Coupling, atoms: np.ndarray, sample: Feeds, feeds: Iterable[Feeds], threads: int = 1) -> float:
    """Largest relative difference between the outputs with ``atoms`` masked and with them removed.

    Neither the model of ``coupled`` nor anything else that it holds is changed.
    """
    pruned = coupled.model.clone()
    coupling.analyze(pruned, sample, threads=threads).remove(atoms)
    return _apart(*(runtime.load(m, threads=threads) for m in (_masked(coupled, atoms), pruned)), feeds)


def noise(coupled: Coupling, atoms: np.ndarray, feeds: Iterable[Feeds], threads: int = 1) -> float:
    """Largest relative difference of the model with ``atoms`` masked to itself, in another order of arithmetic."""
    return itself(_masked(coupled, atoms), feeds, threads)


def itself(model: ir.Model, feeds: Iterable[Feeds], threads: int = 1) -> float:
    """Largest relative difference of ``model`` to itself, with the optimizations of ONNX Runtime on and off."""
    return _apart(*(runtime.load(model, threads=threads, optimize=optimize) for optimize in (True, False)), feeds)


def _masked(coupled: Coupling, atoms: np.ndarray) -> ir.Model:
    masked = coupled.model.clone()
    coupling.mask(masked, coupled.sites, coupled.removed(atoms))
    return masked


def _apart(left: runtime.Runner, right: runtime.Runner, feeds: Iterable[Feeds]) -> float:
    worst = 0.0
    for feed in feeds:
        a, b = left(feed), right(feed)
        worst = max([worst, *(relative(np.asarray(a[name]), np.asarray(b[name])) for name in a)])
    return worst


def relative(want: np.ndarray, got: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite where the shapes or what is not finite differ."""
    if want.shape != got.shape:
        return np.inf
    want, got = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(want)
    if (finite != np.isfinite(got)).any():
        return np.inf
    scale = np.abs(want[finite]).max(initial=0)
    return float(np.abs(want[finite] - got[finite]).max(initial=0) / max(scale, 1e-12))


@dataclass(frozen=True)
class Judged:
    """What the oracle says about one model."""

    families: int
    units: int
    trials: int
    worst: float
    noise: float  # of the worst trial; 0 where the error needs no excuse
    frozen: Counter[str]

    @property
    def holds(self) -> bool:
        """True when removed channels are masked channels, up to rounding."""
        return self.worst <= max(TOLERANCE, NOISE * self.noise)


def prepare(name: str, threads: int = 1) -> tuple[ir.Model, Feeds]:
    """A model of the zoo after simplify and fold, and one sample for it."""
    item = zoo.find(name)
    model = model_io.load(str(item.path))
    samples = data.open_data(str(item.folder / item.calibration), data.input_specs(model))
    context = Context(samples, threads=threads)
    for stage in pipeline.parse("simplify,fold"):
        stage.apply(model, context)
    return model, samples.feed(samples[0])


def judge(model: ir.Model, sample: Feeds, *, fast: bool, seed: int = 0, threads: int = 1) -> Judged:
    """Apply the oracle to every family of ``model``, in one go each where ``fast``."""
    rng = np.random.default_rng(seed)
    coupled = coupling.analyze(model, sample, threads=threads)
    families = coupled.families
    trials = [] if fast else [some_units([family], rng, 0) for family in families]
    if families:
        trials += [some_units(families, rng, 0), some_units(families, rng, 0.5)]
    results = []
    for atoms in trials:
        error = difference(coupled, atoms, sample, [sample], threads)
        own = noise(coupled, atoms, [sample], threads) if error > TOLERANCE else 0.0
        results.append((error, own))
    worst, own = max(results, key=lambda r: r[0] / max(TOLERANCE, NOISE * r[1]), default=(0.0, 0.0))
    units = sum(len(family.atoms) for family in families)
    return Judged(len(families), units, len(trials), worst, own, Counter(coupled.frozen().values()))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--fast", action="store_true", help="all families in one go only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    failed = False
    print(
        f"{'model':24} {'families':>8} {'units':>7} {'trials':>6} {'worst error':>12} {'noise':>8} "
        f"{'frozen weights':>14}"
    )
    for name in args.names or [m.name for m in zoo.load_models().values() if m.path.is_file()]:
        judged = judge(*prepare(name, args.threads), fast=args.fast, threads=args.threads)
        failed |= not judged.holds
        print(
            f"{name:24} {judged.families:8} {judged.units:7} {judged.trials:6} {judged.worst:12.1e} "
            f"{f'{judged.noise:.1e}' if judged.noise else '-':>8} {judged.frozen.total():14}",
            flush=True,
        )
        for reason, count in judged.frozen.most_common():
            print(f"    {count:4} x {reason}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
