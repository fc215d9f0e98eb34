"""Judges every pass: did it keep its promise, and is what it leaves still within the user's budget?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import model as model_io
from onnxslim import runtime, verify
from onnxslim.contract import Context, Effect, Missed, Pass
from onnxslim.data import Data, Sample, synthetic
from onnxslim.errors import ModelError, UsageError
from onnxslim.graph import count_nodes
from onnxslim.metrics import Metric, allowed_drop


@dataclasses.dataclass(frozen=True)
class Budget:
    """The largest drop of a metric that the user accepts, in the metric's unit; None accepts any."""

    metric: Metric
    before: float
    allowed: float | None

    @classmethod
    def of(cls, reference: verify.Reference, metric: Metric, max_drop: str | float | None) -> Budget:
        """Measure the original and turn ``max_drop`` into the unit of ``metric``.

        Raises:
            UsageError: the metric is no number for the original.
        """
        before = verify.score(reference, metric)
        if not math.isfinite(before):
            raise UsageError(
                f"metric {metric.name}: is {before} for the original on {reference.data.origin}: nothing can be "
                "compared with that"
            )
        return cls(metric, before, None if max_drop is None else allowed_drop(max_drop, before))

    def missed(self, value: float) -> Missed | None:
        """A line that says by how much ``value`` misses the budget, or None."""
        drop = self.before - value
        if self.allowed is None or drop <= self.allowed + 1e-9:
            return None
        return Missed(f"{self.metric.name} drops by {drop:.4g} to {value:.4g}, the budget is {self.allowed:.4g}")


class Checks:
    """Called by the pipeline with (before, after, pass); a string undoes the pass.

    Every pass must keep the inputs and outputs of the model (their float types too, unless it says otherwise) and leave
    something that ONNX Runtime loads. An EXACT or ROUNDING pass must give the same outputs on the check samples and
    must not add nodes. A LOSSY pass must stay within the budget, where there is one.

    Attributes:
        kept: the model after every pass that was kept, the original first.
        final: the last pass of the pipeline: only the session of its result is worth keeping, for the measurements.
        failed: broken promises; missed: budgets that a pass, however careful, would have overrun.
    """

    def __init__(self, original: ir.Model, runner: runtime.Runner | None, data: Data, ctx: Context) -> None:
        self.kept: list[tuple[str, ir.Model]] = [("", original)]
        self.final: Pass | None = None
        self.failed: list[str] = []
        self.missed: list[str] = []
        self.evaluation: verify.Reference | None = None
        self.budget: Budget | None = None
        self._ctx = ctx
        self._data = data
        self._original = runner
        self._first = verify.Reference(runner, data) if runner is not None else None
        self._reference = self._first  # what the next pass is compared to
        self._trusting = False
        self._last: tuple[ir.Model, runtime.Runner] | None = None
        self._noise: dict[int, verify.Fidelity] = {}
        self._measured: tuple[ir.Model, verify.Fidelity, float | None] | None = None

    def __call__(self, before: ir.Model, after: ir.Model, item: Pass) -> str | None:
        problem = _interface(before, after, item.retypes)
        if problem is None and self._original is not None and not self._trusting:
            problem = self._run(after, item)
        elif problem is None and item.effect is not Effect.LOSSY:
            problem = _growth(before, after)
        if problem is None:
            self.kept.append((str(item), after))
        return problem

    def settle(self) -> None:
        """Run the original on all samples now, so that its session need not stay in memory while others do."""
        references = [r for r in (self._first, self.evaluation) if r is not None]
        if self._original is not None and all(r.settle() for r in references):
            self._original.rest()

    def rest(self) -> None:
        """Give back the memory of the sessions, which are made again when they are needed."""
        self._last = None
        if self._original is not None:
            self._original.rest()

    @contextlib.contextmanager
    def trusting(self) -> Iterator[None]:
        """Passes are not run while this is open: what they have made together is to be proven (see `holds`)."""
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    def holds(self, model: ir.Model) -> bool:
        """True when ``model`` is as right on all samples as a lossless pass must leave it, and within the budget.

        Raises:
            ModelError: it cannot be loaded, or fails on a sample.
        """
        if self._first is None or self.evaluation is None:
            return True
        model_io.forget_weights(model)
        runner = runtime.load_lean(model, model, threads=self._ctx.threads)
        together, _ = verify.measure(self._first, runner)
        if together.broken(self.noise) is not None:
            return False
        fidelity, value = self.measure(model, runner)
        if fidelity.broken(lambda: self.noise(self.evaluation)) is not None:
            return False
        self._last = model, runner
        return self.budget is None or value is None or self.budget.missed(value) is None

    def _run(self, after: ir.Model, item: Pass) -> str | None:
        try:
            self._last = None
            model_io.forget_weights(self.kept[-1][1])
            model_io.forget_weights(after)
            runner = runtime.load_lean(after, after, threads=self._ctx.threads)
            reference = verify.Reference(runner, self._data, f"the result of {item.name}")
            broken = self._lossy(after, runner) if item.effect is Effect.LOSSY else self._lossless(after, runner)
        except ModelError as error:
            broken = str(error)
            self.failed.append(f"{item}: {broken}")
        else:
            if broken is None:
                self._reference = reference
                # While the next pass works, no session of this result takes memory beside those that the pass makes.
                done = item is not self.final and _settles(reference)
                self._last = None if done else (after, runner)
                if done:
                    reference.runner = None
        return broken

    def _lossless(self, after: ir.Model, runner: runtime.Runner) -> str | None:
        assert self._reference is not None
        growth = _growth(self.kept[-1][1], after)
        if growth is not None:
            return growth
        fidelity, _ = verify.measure(self._reference, runner)
        broken = fidelity.broken(self.noise)
        if broken is not None:
            self.failed.append(broken)
        return broken

    def _lossy(self, after: ir.Model, runner: runtime.Runner) -> str | None:
        if self.budget is None or self.evaluation is None:
            runtime.run(runner, self._data.feed(self._data[0]), "the result")
            return None
        _, value = self.measure(after, runner)
        return self.budget.missed(value) if value is not None else None

    def measure(self, model: ir.Model, runner: runtime.Runner | None = None) -> tuple[verify.Fidelity, float | None]:
        """Fidelity and metric of ``model`` on the evaluation data; the last answer is kept."""
        assert self.evaluation is not None
        if self._measured is None or self._measured[0] is not model:
            if runner is None:
                last = self._last if self._last is not None and self._last[0] is model else None
                runner = last[1] if last is not None else runtime.load_lean(model, model, threads=self._ctx.threads)
            metric = self.budget.metric if self.budget is not None else None
            fidelity, value = verify.measure(
                self.evaluation, runner, metric, progress=self._ctx.progress, label="evaluate"
            )
            self._measured = model, fidelity, value
        return self._measured[1], self._measured[2]

    def noise(self, reference: verify.Reference | None = None) -> verify.Fidelity:
        """What the original does to itself when ONNX Runtime orders its arithmetic differently.

        Measured on the samples of ``reference``, by default on the check samples.
        """
        reference = reference or self._first
        assert reference is not None
        data = reference.data
        if id(data) not in self._noise:
            original = self.kept[0][1]
            plain = runtime.load_lean(original, original, threads=self._ctx.threads, optimize=False)
            # Every session draws the same random numbers in turn: one run ahead, these are others than the reference's.
            runtime.run(plain, data.feed(data[0]), "the original model")
            found, _ = verify.measure(reference, plain)
            if found.broken() is not None and not any(f.broken() for f in self._noise.values()):
                self._ctx.warnings.append(
                    "the original does not repeat itself: with ONNX Runtime's own optimizations off, "
                    f"{found.broken()}; lossless passes were held to that"
                )
            self._noise[id(data)] = found
        return self._noise[id(data)]

    def restart(self) -> None:
        """Forget every pass, to judge another pipeline from the original on."""
        self.kept[1:] = []
        self.failed.clear()
        self.missed.clear()
        self._noise.clear()
        self._reference = self._first


def generated(
    model: ir.Model,
    source: ir.Model | bytes | str,
    count: int,
    *,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 0,
) -> tuple[Data, runtime.Runner]:
    """At most ``count`` samples for ``model`` that ``source``, the form of it that is run, accepts, and its runner.

    Symbolic dimensions start small and grow until the model runs: a network with a window of 256 samples refuses 16.
    What depends on the contents of an input (a shape, an index) may fail for some samples; those are left out.

    Raises:
        ModelError: it cannot be loaded, or runs on none of them; the message is that of the first.
    """
    runner = verify.Remembering(runtime.load_lean(model, source, threads=threads))
    errors: list[ModelError] = []
    for scale in (1, 4, 16, 64):
        data = synthetic(model, count, seed=seed, shapes=shapes, scale=scale)
        accepted = []
        for k, sample in enumerate(data):
            try:
                runtime.run(runner, data.feed(sample), "the original model")
                accepted.append(k)
            except ModelError as error:
                errors.append(error)
        if accepted:
            return data.pick(accepted), runner
    raise errors[0]


def check_samples(runner: runtime.Runner, data: Data, count: int) -> Data:
    """At most ``count`` samples of ``data``, and two of them as one batch where the original takes that.

    The batch shows a pass that freezes a symbolic batch size, which samples of one size cannot.
    """
    chosen = data.spread(count)
    samples: list[Sample] = list(chosen)
    names = [chosen.where(k) for k in range(len(chosen))]
    symbolic = all(spec.shape is not None and spec.shape and spec.shape[0] is None for spec in data.specs)
    if symbolic and data.specs:
        pair = [data.feed(samples[0]), data.feed(samples[-1])]
        alike = all(pair[0][s.name].shape == pair[1][s.name].shape for s in data.specs)
        batch = {s.name: np.concatenate([p[s.name] for p in pair]) for s in data.specs} if alike else None
        if batch is not None:
            try:
                runtime.run(runner, batch)
            except ModelError:
                batch = None  # the first axis is symbolic and yet no batch
        if batch is not None:
            samples.append(batch)
            names.append(f"{names[0]} and {names[-1]}, as one batch")
    return Data(data.origin, len(samples), samples.__getitem__, data.specs, names.__getitem__)


def _settles(reference: verify.Reference) -> bool:
    """Whether the outputs are kept now; a sample that fails is for whoever compares something to it."""
    try:
        return reference.settle()
    except ModelError:
        return False


def _growth(before: ir.Model, after: ir.Model) -> str | None:
    more = count_nodes(after) - count_nodes(before)
    return f"adds {more} nodes without being asked to change the function" if more > 0 else None


def _interface(before: ir.Model, after: ir.Model, retypes: bool) -> str | None:
    for what, old, new in (
        ("inputs", before.graph.inputs, after.graph.inputs),
        ("outputs", before.graph.outputs, after.graph.outputs),
    ):
        want = [(v.name, _type(v, retypes)) for v in old]
        have = [(v.name, _type(v, retypes)) for v in new]
        if [n for n, _ in want] != [n for n, _ in have]:
            return f"changes the {what} of the model from {[n for n, _ in want]} to {[n for n, _ in have]}"
        for (name, first), (_, second) in zip(want, have, strict=True):
            if first != second and "None" not in (first, second):
                return f"changes the type of {name!r} from {first} to {second}"
    return None


def _type(value: ir.Value, any_float: bool) -> str:
    if any_float and isinstance(value.type, ir.TensorType) and value.type.dtype.is_floating_point():
        return "Tensor of floats"
    return str(value.type)
