"""Which layers go back to what they were so that the outputs keep the fidelity asked for.

Fidelity is 1 minus the noise of the worst output (`onnxslim.noise`) on samples that nothing was learned from, where
there are enough of them, and a standard error less: so that it holds on other samples of the kind too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.noise import Gap, share
from onnxslim.results import Exact

# Held-out samples that judge a choice, at most and at least.
JUDGED, FEWEST = 24, 4
# Work (`onnxslim.cost`) that judging one choice, and ranking all layers, may take. Counted, and not timed, so that the
# same model and data give the same choice on a busy machine and on an idle one. Ranking takes some runs whatever they
# cost.
WORK_PER_TRIAL, WORK, RUNS = 1e11, 1e12, 32
# Single layers that do not fit in before the more harmful ones are not tried any more.
MOST_REFUSED = 3

# Standard errors by which the noise of other samples may be more than that of those that judge.
DOUBT = 1.0
# Share of the samples that are held out to judge, and how many they must be to judge alone.
HELD_OUT, ALONE = 0.25, 12

Run = Callable[[dict[str, np.ndarray], Collection[str]], list[np.ndarray]]
Compare = Callable[[dict[str, np.ndarray], list[np.ndarray]], Exact]


def parts(samples: Data) -> tuple[Data, Data]:
    """Samples to learn from and samples that judge: those held out, or all where that were fewer than `ALONE`.

    What a model makes of a few samples is more a matter of luck than of having been learned from: one number of each,
    from a classifier that is mostly sure, shows an error only in the rare sample that it is not sure of.
    """
    fit, held_out = samples.split(HELD_OUT)
    return fit, held_out if len(held_out) >= ALONE else samples


class Judge:
    """Noise of the outputs for any choice of what is changed: squared error over variance, over held-out samples.

    ``run`` gives the outputs for one sample with the chosen names changed; with none, what is exact: ``exact`` makes
    of that what others are compared with. ``work`` is what it takes: with a costly model fewer samples judge. No choice
    with more noise than ``budget`` is wanted: once a few samples show that it has more, the others are not run.
    """

    def __init__(
        self, run: Run, data: Data, work: float, ctx: Context, budget: float, exact: Compare | None = None
    ) -> None:
        self.run = run
        self.ctx = ctx
        self.budget = budget
        self._work = max(work, 1.0)
        judged = data.spread(int(np.clip(WORK_PER_TRIAL / self._work, FEWEST, JUDGED)))
        exactly = exact or (lambda _, outputs: Exact(outputs))
        self._samples = [(feed, exactly(feed, self.run(feed, ()))) for feed in judged.feeds()]
        self._known: dict[frozenset[str], float] = {}

    def noise(self, chosen: Collection[str]) -> float:
        """Of the worst output, and what the few samples leave open; or, above ``budget``, what is known to be there."""
        key = frozenset(chosen)
        if key not in self._known:
            self._known[key] = self._noise(chosen)
        return self._known[key]

    def _noise(self, chosen: Collection[str]) -> float:
        # Errors only add up: those of samples that were not run are 0 at least.
        found = [exact.perfect for _, exact in self._samples]
        for k, sample in enumerate(self._samples):
            found[k] = self._gaps(sample, chosen)
            if (least := share(found)) > self.budget:
                return least
        return share(found, DOUBT)

    def _gaps(self, sample: tuple[dict[str, np.ndarray], Exact], chosen: Collection[str]) -> list[Gap | None]:
        feed, exact = sample
        return exact.gaps(self.run(feed, chosen))

    def hardest_first(self, chosen: Collection[str]) -> None:
        """Order the samples by the noise that ``chosen`` makes on them: few samples then show what matters."""
        found = [self._gaps(sample, chosen) for sample in self._samples]
        self._known[frozenset(chosen)] = share(found, DOUBT)
        order = sorted(range(len(found)), key=lambda k: -share([found[k]]))
        self._samples = [self._samples[k] for k in order]

    def rank(self, names: Sequence[str]) -> dict[str, float]:
        """Noise that each of ``names`` makes when it alone is changed; on as many samples as the work allows.

        Where it allows fewer runs than there are names, neighbours are changed together. The group with the most noise
        is halved, again and again, and names that are left together share theirs evenly.
        """
        if not names:
            return {}
        runs = max(int(WORK / self._work), RUNS)
        judges = self._samples[: max(runs // len(names), 1)]

        def of(group: Sequence[str]) -> tuple[float, Sequence[str]]:
            return sum(share([self._gaps(sample, group)]) for sample in judges) / len(judges), group

        count = len(names) if runs >= len(names) else runs // 2
        groups = [[names[k] for k in places] for places in np.array_split(np.arange(len(names)), count)]
        found = [of(group) for group in self.ctx.progress.track(groups, total=count, label="sensitivity")]
        for _ in range((runs - count) // 2):
            together = [each for each in found if len(each[1]) > 1]
            if not together:
                break
            noisiest = max(together, key=lambda each: each[0])
            found.remove(noisiest)
            found += map(of, _halves(noisiest[1]))
        return {name: lost / len(group) for lost, group in found for name in group}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays changed, the noise that each of the others makes alone, and the noise that is left."""

    names: list[str]
    restored: dict[str, float]
    noise: float


def keep(
    names: Sequence[str],
    budget: float,
    noise_of: Callable[[Sequence[str]], float],
    rank: Callable[[Sequence[str]], Mapping[str, float]],
    price: Callable[[str], float] = lambda name: 1.0,
) -> Kept:
    """As many of ``names`` as keep the noise within ``budget``; ``noise_of`` need not say how much more there is.

    They go back in the order of the noise that each makes alone (``rank``) per its ``price``; how many must is found
    by bisection. Of these, the least harmful first, those stay changed after all that fit in: noise does not always add
    up, so they are tried in groups, and a group that does not fit in is halved, until `MOST_REFUSED` did not alone.
    """
    total = noise_of(names)
    if total <= budget:
        return Kept(list(names), {}, total)
    alone = rank(names)
    order = sorted(names, key=lambda n: (-alone[n] / price(n), n))
    low, high = 1, len(order)  # the number of names to put back lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        if noise_of(order[middle:]) <= budget:
            high = middle
        else:
            low = middle + 1
    gone = sorted(order[:high], key=lambda n: (alone[n], n))
    left = set(gone)

    def with_all_but(back: Collection[str]) -> list[str]:
        return [n for n in names if n not in back]

    groups, refused = _halves(gone), 0
    while groups and refused < MOST_REFUSED:
        group = groups.pop()
        if noise_of(with_all_but(left.difference(group))) <= budget:
            left.difference_update(group)
        else:
            groups += _halves(group)
            refused += len(group) == 1
    kept = with_all_but(left)
    return Kept(kept, {n: alone[n] for n in order if n in left}, noise_of(kept) if kept else 0.0)


def _halves(group: Sequence[str]) -> list[Sequence[str]]:
    """The two halves of ``group``, the first one last; none where there is nothing to halve."""
    middle = (len(group) + 1) // 2
    return [group[middle:], group[:middle]] if len(group) > 1 else []
