"""From price lists of families to a plan: how many units leave each of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import budget, coupling, runtime
from onnxslim.contract import Context, Outcome
from onnxslim.coupling import Coupling, Family
from onnxslim.passes.prune import allocate
from onnxslim.passes.prune.allocate import Candidate
from onnxslim.passes.prune.importance import Order

NARROWER = (0.25, 0.5)  # shares of every family that leave the models on which kernels are timed
CORRECTIONS = 3  # times that the predicted time is put right by the measured one
SECONDS = 3.0  # of measuring a plan's time
CLOSE = 0.03  # relative difference between the time asked for and measured that is left alone


class Planner:
    """Chooses widths for ``families`` from what their ``candidates`` cost."""

    def __init__(
        self,
        coupled: Coupling,
        families: Sequence[Family],
        orders: Sequence[Order],
        candidates: Sequence[Candidate],
        ctx: Context,
    ) -> None:
        self._coupled = coupled
        self._families = families
        self._orders = orders
        self._candidates = candidates
        self._ctx = ctx
        self._feed = ctx.calibration.feed(ctx.calibration[0])
        self._shapes = budget.Shapes(coupled, families)

    @functools.cached_property
    def parameters(self) -> budget.Budget:
        """Parameters left."""
        return budget.parameters(self._coupled, self._families, self._shapes)

    @functools.cached_property
    def macs(self) -> budget.Budget:
        """Multiplications left."""
        return budget.macs(self._coupled, self._families, self._shapes, self._feed)

    def atoms(self, counts: Sequence[int]) -> np.ndarray:
        """What leaves when so many units leave each family."""
        leaving = [f.atoms[o.units[:m]] for f, o, m in zip(self._families, self._orders, counts, strict=True)]
        return np.concatenate([np.empty(0, np.int64), *leaving])

    def within(self, tolerance: float) -> list[int]:
        """The plan that saves most parameters and multiplications with an estimated error of ``tolerance``."""

        def spent(removed: Sequence[int]) -> float:
            return sum(b(removed) / max(b.total, 1e-30) for b in (self.parameters, self.macs))

        return allocate.within(self._candidates, spent, tolerance)

    def budget(self, kind: str, asked: float, outcome: Outcome) -> list[int]:
        """The plan that leaves ``asked`` of params, macs or latency (a fraction up to 1), or comes closest."""
        if kind == "latency":
            return self._latency(asked, outcome)
        spent = self.macs if kind == "macs" else self.parameters
        goal = asked * spent.total if asked <= 1 else asked
        counts = allocate.down_to(self._candidates, spent, goal)
        left = spent(counts)
        outcome.stats["left"] = left / max(spent.total, 1e-30)
        if left > goal * (1 + 1e-6):
            self._ctx.warnings.append(f"prune: {kind} came down to {left:.4g}, not to the {goal:.4g} asked for")
        return counts

    def _latency(self, asked: float, outcome: Outcome) -> list[int]:
        """Plans until the measured time is what was asked for."""
        removals = [self._narrow(share) for share in NARROWER]
        pruned = [self._built(r) for r in removals]
        spent = budget.milliseconds(self._coupled, self._families, self._shapes, removals, self._ctx, pruned)
        goal = asked if asked <= 1 else None  # as a fraction; of milliseconds only once they are measured here
        aim = goal
        best: tuple[float, list[int], float] | None = None
        for _ in range(CORRECTIONS + 1):
            counts = allocate.down_to(self._candidates, spent, (aim or 1.0) * spent.total)
            timed = runtime.compare_models(
                [self._coupled.model, self._built(counts)], [self._feed], threads=self._ctx.threads, seconds=SECONDS
            )
            if goal is None or aim is None:
                goal = aim = min(1.0, asked / timed.latency[0].median)
                continue
            took = 1 / timed.speedup[1]
            missed = abs(took - goal)
            if best is None or missed < best[0]:
                best = missed, counts, took
            if missed <= CLOSE * goal:
                break
            aim = float(np.clip(aim * goal / took, 0.02, 1.0))
        assert best is not None and goal is not None
        _, counts, took = best
        outcome.stats["left"] = took
        if took > goal * 1.07:
            self._ctx.warnings.append(f"prune: the time came down to {took:.2f} of the input's, not to {goal:.2f}")
        return counts

    def _narrow(self, share: float) -> list[int]:
        """About ``share`` of every family, in steps."""
        return [int(w[np.argmin(np.abs(w - share * c.count))]) for c in self._candidates for w in [c.widths()]]

    def _built(self, counts: Sequence[int]) -> ir.Model:
        """The model with these widths, weights as they are."""
        model = self._coupled.model.clone()
        coupling.analyze(model, self._feed, threads=self._ctx.threads).remove(self.atoms(counts))
        return model
