"""`optimize`: any model in, a smaller and faster one out, with a report that proves and measures it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnxslim import collector, cost, doctor, guard, integer, judging, metrics, pipeline, repro, runtime, timing, verify
from onnxslim import custom_ops as libraries
from onnxslim import details as extras
from onnxslim import model as model_io
from onnxslim.checks import Budget, Checks, check_samples
from onnxslim.contract import Context, Effect, Missed, NoProgress, Pass, Progress
from onnxslim.data import Data, Sample, Source
from onnxslim.errors import CheckError, DataError, ModelError, UsageError
from onnxslim.report import Report, plain
from onnxslim.results import telling

# Nobody who asked for nothing should find another operator set in the result.
DEFAULT_PASSES = "simplify,fold,fuse(opset=0)"
# Samples that check a lossless pass, and that latency is measured on.
_CHECKED, _TIMED = 3, 8
_BENCH_LOSSY, _BENCH_LOSSLESS = 3.0, 1.0
# Times that samples may lose what passes were allowed to cost before they count as of another kind.
_SURPRISE = 3.0

Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass
class Result:
    """What `optimize` returns.

    Attributes:
        model: the new model.
        report: what was done and measured.
        exit_code: 0; 1 when a check failed or a budget was missed and ``model`` is the best one that holds; 123 when a
            pass crashed and was undone (``repro`` is then the folder that reproduces it).
    """

    model: ir.Model
    report: Report
    exit_code: int = 0
    repro: Path | None = None

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def save(self, path: str | os.PathLike[str], *, external: bool | None = None) -> Path:
        """Write the model to ``path`` atomically; see `onnxslim.model.save`."""
        return model_io.save(self.model, path, external=external)

    def proto(self) -> onnx.ModelProto:
        """The model as `onnx.ModelProto`, weights inside."""
        return model_io.to_proto(self.model)


def optimize(
    model: Any,
    passes: str | Sequence[Pass] = DEFAULT_PASSES,
    calibration: Source | None = None,
    evaluation: Source | None = None,
    metric: str | None = None,
    max_drop: str | float | None = None,
    target: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    *,
    shapes: Shapes | None = None,
    fix_shapes: Shapes | None = None,
    threads: int = 0,
    bench: bool = True,
    bench_seconds: float | None = None,
    details: bool = False,
    require_int8: str | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    own: bool = True,
) -> Result:
    """Run ``passes`` over ``model``, each checked and undone when it breaks its promise; ``model`` is not changed.

    Args:
        model: a path, bytes, `onnx.ModelProto`, `onnx_ir.Model` or `torch.onnx.ONNXProgram`.
        passes: a textual pipeline such as ``"prune(ratio=0.5),int8"``, or passes; what they want is inserted.
        calibration: samples in any form of `onnxslim.data`; without evaluation data a quarter of them is held out.
        evaluation: samples that only judge the result, with ``labels`` for the metrics that need them.
        metric: ``top1``, ``top5``, ``cosine``, ``psnr`` or ``module:function``; by default ``top1`` where there are
            class labels.
        max_drop: ``"1%"`` (one point of a 0-100 metric, 0.01 of a 0-1 metric) or a number in the metric's own unit. A
            lossy pass that would overrun it is tried again, changing less; where that does not help it is undone, and
            ``exit_code`` is 1.
        target: execution provider the result is meant for and measured on.
        seed: of generated inputs and of every random choice.
        progress: receives the progress of long loops.
        shapes: concrete input shapes for generated inputs, by input name; the model keeps its symbolic dimensions.
        fix_shapes: concrete input shapes to write into the model.
        threads: intra-operator threads of every session (0: the runtime's choice).
        bench: measure the latency of both models; a lossless pipeline then also drops a pass that makes it slower.
        bench_seconds: how long to measure, loading included: by default 3 s after a lossy pass, else 1 s.
        details: find out for the report what each layer costs before and after, where the error comes in, and what the
            model was after each pass.
        require_int8: ``"95%"`` or ``"0.95"``: the share of the multiply-accumulates that must run as integer kernels on
            the CPU provider; ``exit_code`` is 1 when fewer do, and the report names the layers that do not.
        custom_ops: libraries of custom operators, registered with every session. No pass changes such an operator or
            what depends on knowing what it does.
        own: read the weights that stayed into memory, so that the file ``model`` may change or go before the result.

    Raises:
        ModelError, DataError, UsageError: what was given cannot be used.
        CheckError: no model that keeps the promises was found, not even the one read from ``model``.
    """
    with libraries.using(custom_ops), collector.calm():
        chosen = pipeline.complete(pipeline.parse(passes) if isinstance(passes, str) else list(passes))
        if max_drop is not None:
            metrics.parse_drop(max_drop)
        named = metrics.find(metric) if metric is not None else None
        wanted = integer.share(require_int8) if require_int8 is not None else None
        if target not in runtime.PROVIDERS:
            raise UsageError(f"unknown target {target!r}: give one of {', '.join(runtime.PROVIDERS)}")
        guard.doing(str(model) if isinstance(model, str | os.PathLike) else "the model", guard.GIVEN)
        original = model_io.load(model)
        if fix_shapes:
            model_io.fix_shapes(original, fix_shapes)
        lossy = pipeline.strictest(chosen) is Effect.LOSSY
        ctx = Context(
            calibration=Data("nothing", 0, lambda k: {}, ()),
            target=target,
            threads=threads,
            seed=seed,
            progress=progress or NoProgress(),
            warnings=list(original.meta.get(model_io.WARNINGS, ())),
        )
        given = judging.Given(calibration, evaluation, {**(fix_shapes or {}), **(shapes or {})})
        must_run = given.any or any(p.needs_data for p in chosen)
        samples, runner = judging.choose(original, judging.as_given(model, original), given, lossy, must_run, ctx)
        ctx.calibration, ctx.synthetic = samples.calibration, samples.synthetic
        if bench_seconds is None:
            bench_seconds = _BENCH_LOSSY if lossy else _BENCH_LOSSLESS
        run = _Run(model, original, runner, samples, ctx, named, max_drop, bench_seconds if bench else 0.0)
        done = run.passes(chosen)
        guard.doing("measuring the result", guard.OURS)
        result = run.finish(*done, wanted)
        if details and runner is not None:
            result.report.details = run.details(result.model)
        if own and isinstance(model, str | os.PathLike):
            model_io.own_weights(result.model, model)
        return result


@dataclasses.dataclass(frozen=True)
class _Speed:
    """Latency of a model and of the original, and the ratio of the two with its interval."""

    original: timing.Latency
    latency: timing.Latency
    speedup: float
    interval: tuple[float, float]


class _Run:
    """One call of `optimize`: the pipeline, its checks, the measurements."""

    def __init__(
        self,
        source: Any,
        original: ir.Model,
        runner: runtime.Runner | None,
        samples: judging.Samples,
        ctx: Context,
        metric: metrics.Metric | None,
        max_drop: str | float | None,
        bench_seconds: float,
    ) -> None:
        self.source = source
        self.original = original
        self.runner = runner
        self.samples = samples
        self.ctx = ctx
        self.metric = metric
        self.max_drop = max_drop
        self.bench_seconds = bench_seconds if runner is not None else 0.0
        self.repro: Path | None = None
        self.crashed = ""
        self.ep = ctx.target if runtime.available(ctx.target) else "cpu"
        self.bench: list[dict[str, Any]] = []
        self._timed: tuple[ir.Model, _Speed] | None = None
        self.checks = self._checks()

    def _checks(self) -> Checks:
        if self.runner is None:
            return Checks(self.original, None, self.samples.judging, self.ctx)
        checks = Checks(
            self.original, self.runner, check_samples(self.runner, self.samples.judging, _CHECKED), self.ctx
        )
        checks.evaluation = verify.Reference(self.runner, self.samples.judging)
        metric = self._metric()
        if metric is not None:
            checks.budget = Budget.of(checks.evaluation, metric, self.max_drop)
        checks.settle()
        return checks

    def _metric(self) -> metrics.Metric | None:
        first = self.samples.judging[0]
        found = self.metric or self._suggested(first)
        if found is None and self.max_drop is not None:
            found = metrics.find("cosine")
            self.ctx.warnings.append("no labels and no metric: the budget is for the cosine to the original's outputs")
        if found is not None and found.needs_labels and "labels" not in first:
            raise UsageError(f"metric {found.name}: {self.samples.judging.origin} has no array 'labels': give --eval")
        return found

    def _suggested(self, first: Sample) -> metrics.Metric | None:
        """``top1`` where the samples have labels that fit the outputs."""
        assert self.runner is not None
        found = metrics.suggested(first, [s.name for s in self.samples.judging.specs])
        if found is not None:
            try:
                found(runtime.run(self.runner, self.samples.judging.feed(first)), first, {})
            except (DataError, UsageError) as error:
                self.ctx.warnings.append(f"the labels were not used ({error}); give --metric")
                return None
        return found

    def passes(self, chosen: Sequence[Pass]) -> tuple[ir.Model, list[pipeline.Step]]:
        """Run the pipeline; a lossless one again without the pass that made the model slower, if one did."""
        lossless = pipeline.strictest(chosen) is not Effect.LOSSY
        while True:
            self.checks.final = chosen[-1] if chosen else None
            quiet = list(self.ctx.warnings)
            done = self._at_once(chosen) if lossless and len(chosen) > 1 else None
            if done is None:
                self.ctx.warnings[:] = quiet
                model, steps = pipeline.run(self.original, chosen, self.ctx, self.checks, self._reproduce)
                self.checks.missed.extend(step.error for step in steps if isinstance(step.error, Missed))
                model = self._settle(model, lossless)
            else:
                model, steps = done
            slow = self._offender(chosen) if lossless and self.bench_seconds else None
            if slow is None:
                return model, steps
            item, ratio = slow
            chosen = [p for p in chosen if p is not item]
            self.ctx.warnings[:] = [*quiet, f"{item} was dropped: it made the model slower ({ratio:.2f}x)"]
            self.checks.restart()

    def _at_once(self, chosen: Sequence[Pass]) -> tuple[ir.Model, list[pipeline.Step]] | None:
        """What lossless passes make together, where that holds; None where each has to be judged by itself.

        Most pipelines hold, and the proof of the whole then takes one session instead of one for each pass.
        """
        try:
            with self.checks.trusting():
                model, steps = pipeline.run(self.original, chosen, self.ctx, self.checks, _doubt)
                if not any(step.error for step in steps) and self.checks.holds(model):
                    return model, steps
        except (_DoubtError, ModelError):
            pass
        self.checks.restart()
        return None

    def _settle(self, model: ir.Model, lossless: bool) -> ir.Model:
        """The last kept model that, after all passes together, is right: lossless, and within the budget."""
        if self.checks.evaluation is None:
            return model
        while True:
            name, model = self.checks.kept[-1]
            fidelity, value = self.checks.measure(model)
            broken = fidelity.broken(lambda: self.checks.noise(self.checks.evaluation)) if lossless else None
            if broken is not None and not name:
                raise CheckError(f"reading the model changed what it computes: {broken}; please report it")
            missed = self.checks.budget.missed(value) if self.checks.budget and value is not None else None
            if not name or (broken is None and missed is None):
                return model
            if broken is not None:
                self.checks.failed.append(broken)
            if missed is not None:
                self.checks.missed.append(missed)
            self.ctx.warnings.append(f"{name} was undone: over all passes, {broken or missed}")
            self.checks.kept.pop()

    def _offender(self, chosen: Sequence[Pass]) -> tuple[Pass, float] | None:
        """The kept pass that made the model slower than the original beyond noise, twice measured; and the ratio."""
        kept = self.checks.kept[1:]
        if not kept or self._speed(kept[-1][1]).interval[1] >= 1:
            return None
        speeds = self._compare([model for _, model in kept])
        if speeds[-1].interval[1] >= 1:
            return None
        ratios = [s.speedup for s in speeds]
        steps = [b / a for a, b in zip([1.0, *ratios], ratios, strict=False)]
        worst = min(range(len(steps)), key=steps.__getitem__)
        return next(p for p in chosen if str(p) == kept[worst][0]), steps[worst]

    def _speed(self, model: ir.Model) -> _Speed:
        """Latency of ``model`` beside the original's; the last answer is kept."""
        if self._timed is None or self._timed[0] is not model:
            self._timed = model, self._compare([model])[0]
        return self._timed[1]

    def _compare(self, models: Sequence[ir.Model]) -> list[_Speed]:
        """Latency of each of ``models`` beside the original's, measured in turn."""
        self.checks.rest()
        model_io.forget_weights(models[-1])
        sources = [judging.as_given(self.source, self.original), *models]
        feeds = list(self.samples.judging.spread(_TIMED).feeds())
        compared = runtime.compare_models(
            sources, feeds, ep=self.ep, threads=self.ctx.threads, seconds=self.bench_seconds, seed=self.ctx.seed
        )
        return [
            _Speed(compared.latency[0], latency, speedup, interval)
            for latency, speedup, interval in zip(
                compared.latency[1:], compared.speedup[1:], compared.interval[1:], strict=True
            )
        ]

    def _measure_latency(self, model: ir.Model) -> None:
        if self.ep != self.ctx.target:
            provider = runtime.PROVIDERS[self.ctx.target]
            self.ctx.warnings.append(f"the installed onnxruntime has no {provider}: measured on {self.ep}")
        speed = self._speed(model)
        self.bench = [
            {
                "ep": self.ep,
                "latency_ms": dataclasses.asdict(speed.latency),
                "original_latency_ms": dataclasses.asdict(speed.original),
                "speedup": speed.speedup,
                "interval": list(speed.interval),
                "threads": self.ctx.threads,
            }
        ]

    def finish(self, model: ir.Model, steps: Sequence[pipeline.Step], require_int8: float | None = None) -> Result:
        """Stamp the model, measure it and write the report."""
        kept = [name for name, _ in self.checks.kept[1:]]
        _stamp(model, ",".join(kept))
        if not self.original.meta.get(model_io.SHAPES):
            model_io.strip_shapes(model)
        fidelity: dict[str, Any] | None = None
        metric: dict[str, Any] | None = None
        if self.checks.evaluation is not None:
            measured, value = self.checks.measure(model)
            fidelity = {
                "samples": measured.samples,
                "data": measured.origin,
                "held_out": self.samples.unseen,
                "outputs": [plain(o) for o in measured.outputs],
            }
            self.ctx.warnings[:0] = [*measured.warnings(), *self._unlike(steps, measured)]
            self.ctx.warnings += measured.notes()
            if self.checks.budget is not None and value is not None:
                metric = _metric_entry(self.checks.budget, value, measured)
        self.checks.rest()
        if self.bench_seconds:
            self._measure_latency(model)
        self._comment(steps)
        feed = self.samples.judging.feed(self.samples.judging[0]) if len(self.samples.judging) else {}
        proof = integer.prove(model, feed, threads=self.ctx.threads) if require_int8 is not None else None
        too_few = integer.missed(proof, require_int8) if proof is not None and require_int8 is not None else None
        if too_few is not None:
            self.ctx.warnings.insert(0, f"TOO FEW INTEGER KERNELS: {too_few}")
        report = Report(
            before=_figures(self.original, model_io.size(self.source, self.original), feed, self.ctx, "before"),
            after=_figures(model, model_io.size(model, model), feed, self.ctx, "after"),
            passes=[_entry(step) for step in steps],
            fidelity=fidelity,
            metric=metric,
            bench=self.bench,
            environment={
                **doctor.environment(),
                "pipeline": ",".join(str(step.item) for step in steps),
                "kept": ",".join(kept),
                "target": self.ctx.target,
                "threads": self.ctx.threads,
                "seed": self.ctx.seed,
                "shapes": {name: list(array.shape) for name, array in feed.items()},
                **({"custom_ops": list(libraries.libraries())} if libraries.libraries() else {}),
            },
            warnings=self.ctx.warnings,
            integer=None if proof is None else proof.to_dict(),
        )
        missed = bool(self.checks.failed or self.checks.missed or too_few)
        return Result(model, report, 123 if self.repro else int(missed), self.repro)

    def details(self, model: ir.Model) -> dict[str, Any]:
        """What the report shows beyond totals; see `onnxslim.details`."""
        feeds = list(self.samples.judging.spread(_TIMED).feeds())
        threads = self.ctx.threads
        found = extras.collect(self.original, model, feeds, threads=threads)
        if self.bench_seconds and len(self.checks.kept) > 1:
            name = self.checks.budget.metric.name if self.checks.budget is not None else None
            source = judging.as_given(self.source, self.original)
            found |= extras.stages(
                source, self.checks.kept, self.checks.measure, name, feeds, threads=threads, seconds=self.bench_seconds
            )
        return found

    def _unlike(self, steps: Sequence[pipeline.Step], measured: verify.Fidelity) -> list[str]:
        """A warning where samples that no pass has seen lose far more than the passes were allowed to cost."""
        lossy = [step.item for step in steps if step.error is None and step.item.effect is Effect.LOSSY]
        limits = [item.allowed for item in lossy]
        if not self.samples.unseen or not limits or None in limits:
            return []
        names = telling(self.original)
        relative = [
            found.relative_l2
            for found in measured.outputs
            if not found.blind and any(found.output == name or found.output.startswith(f"{name}[") for name in names)
        ]
        # Of the squares, not of the variance, which can only be less: no false alarm.
        allowed, lost = sum(limit for limit in limits if limit is not None), max(relative, default=0.0) ** 2
        if not lost > _SURPRISE * allowed:
            return []
        return [
            f"samples that no pass has seen lose {lost:.1%} of their outputs where {allowed:.1%} was allowed: they are "
            "unlike those of --calib; give more of every kind"
        ]

    def _comment(self, steps: Sequence[pipeline.Step]) -> None:
        """Say first what the user must not overlook."""
        lines = []
        if self.checks.missed:
            lines.append(
                f"BUDGET MISSED: {'; '.join(self.checks.missed)}; the result is the best model found within the budget"
            )
        if self.repro is not None:
            lines.append(f"INTERNAL ERROR: {self.crashed}; please report it with the folder {self.repro}")
        if self.checks.failed:
            lines.append(f"CHECK FAILED: {'; '.join(self.checks.failed)}; the pass was undone")
        if self.samples.synthetic:
            needy = [s.item.name for s in steps if s.item.needs_data]
            if needy:
                lines.append(f"synthetic inputs: no calibration data for {', '.join(needy)}; give --calib")
            elif self.runner is not None and self.samples.judging.origin == "synthetic inputs":
                lines.append("synthetic inputs: the result was verified on generated inputs")
        self.ctx.warnings[:0] = lines

    def _reproduce(self, model: ir.Model, item: Pass, error: Exception) -> None:
        if isinstance(error, ModelError) and self.runner is not None and not self.ctx.synthetic:
            # What failed to run in the pass may have met a sample that the original does not take either.
            verify.try_all(self.runner, self.samples.calibration)
        self.repro = repro.leave(error, model=model, pipeline=str(item))
        self.crashed = f"{item.name} crashed ({type(error).__name__}: {error}) and was undone"


class _DoubtError(Exception):
    """A pass crashed on a model that nobody had judged."""


def _doubt(_: ir.Model, item: Pass, error: Exception) -> None:
    raise _DoubtError(item.name) from error


def _metric_entry(budget: Budget, value: float, measured: verify.Fidelity) -> dict[str, Any]:
    return {
        "name": budget.metric.name,
        "before": budget.before,
        "after": value,
        "drop": budget.before - value,
        "max_drop": budget.allowed,
        "samples": measured.samples,
    }


def _figures(model: ir.Model, size: int, feed: Any, ctx: Context, which: str) -> dict[str, int]:
    counted = cost.analyze(model, feed)
    if counted.unknown:
        ctx.warnings.append(
            f"{which}: MACs of {len(counted.unknown)} nodes could not be counted (first: {counted.unknown[0]!r})"
        )
    nodes = int(model.meta.get(model_io.NODES, counted.nodes)) if which == "before" else counted.nodes
    return {"nodes": nodes, "parameters": counted.parameters, "macs": counted.macs, "bytes": size}


def _entry(step: pipeline.Step) -> dict[str, Any]:
    return {
        "name": step.item.name,
        "options": {f.name: plain(getattr(step.item, f.name)) for f in dataclasses.fields(step.item)},
        "seconds": step.seconds,
        "stats": plain(step.outcome.stats),
        "skipped": [{"node": s.node, "reason": s.reason} for s in step.outcome.skipped],
    }


def _stamp(model: ir.Model, text: str) -> None:
    """Write the version and every pipeline that made the model what it is into its metadata."""
    earlier = model.metadata_props.get("onnxslim.pipeline", "")
    model.metadata_props["onnxslim.version"] = doctor.versions()["onnxslim"]
    parts = [*(earlier.split(";") if earlier else []), text]
    model.metadata_props["onnxslim.pipeline"] = ";".join(p for k, p in enumerate(parts) if p and p not in parts[:k])
