"""Several files on several execution providers, each provider in a process of its own, all measured in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxslim import doctor, timing, workers
from onnxslim.contract import NoProgress, Progress
from onnxslim.eps import Ep, parse
from onnxslim.errors import DataError, ModelError, UsageError
from onnxslim.pages import samples
from onnxslim.plots import Span, Spans
from onnxslim.sheet import Column, Row, Sheet, speed_text, tables

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxslim.report import Report

Feeds = Sequence[Mapping[str, np.ndarray]]
# Passes that a profile takes, the first of which is left out.
_PROFILED = 9
# Samples that latency is measured on.
_SAMPLES = 8
# Bars of a plot of kernels.
_PLOTTED = 16


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run one file: with how many threads (0: the runtime's choice), on samples of which batch size."""

    file: Path
    threads: int
    batch: int

    @property
    def path(self) -> str:
        """Where the worker, whose folder is another one, finds it."""
        return str(self.file.absolute())


def batched(feeds: Feeds, inputs: Mapping[str, bool], batch: int) -> list[dict[str, np.ndarray]]:
    """``feeds`` with axis 0 repeated to ``batch`` rows in the inputs that ``inputs`` says have a symbolic first axis.

    Raises:
        UsageError: no input has one, so that the model takes one batch size only.
    """
    if not any(inputs.values()):
        raise UsageError("--batch: the model takes one batch size only; export it with a symbolic first axis")
    return [
        {
            name: np.take(array, np.arange(batch) % len(array), axis=0) if inputs.get(name) else array
            for name, array in feed.items()
        }
        for feed in feeds
    ]


def measure(
    files: Sequence[Path],
    eps: Sequence[Ep],
    feeds: Mapping[int, Feeds],
    *,
    threads: Sequence[int] = (0,),
    seconds: float = 5.0,
    seed: int = 0,
    profile: bool = False,
    starts: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every file with every number of threads and batch size on every provider.

    Args:
        feeds: samples by batch size; all files run on the same.
        seconds: how long to measure on one provider, loading and warming up apart.
        starts: also start every variant in a process of its own: cold load, first run, peak memory.
        profile: find out as well which kernels run and how long each takes.

    Returns:
        ``bench``: one row per variant and provider; ``missing``: providers that cannot be measured, each with the
        reason (it is not here, or refuses a file or an option); ``warnings``; ``kernels`` when asked for.

    Raises:
        ModelError: a file does not run.
        workers.MissingError: no provider can be measured.
    """
    variants = [Variant(f, t, b) for t in threads for b in feeds for f in files]
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    warnings: list[str] = []
    kernels: list[dict[str, Any]] = []
    with workers.folder() as folder, contextlib.ExitStack() as stack:
        paths = {batch: workers.write_feeds(samples, folder, f"b{batch}") for batch, samples in feeds.items()}
        lanes: list[_Lane] = []
        for ep in eps:
            try:
                process = stack.enter_context(workers.start(ep, folder))
            except workers.MissingError as error:
                missing.append({"ep": ep.label, "reason": str(error), "install": ep.install_line()})
                continue
            lanes.append(_Lane(process, variants, paths, folder))
        if not lanes:
            raise workers.MissingError("; ".join(entry["reason"] for entry in missing))
        for lane in list(lanes):
            try:
                warnings += lane.prepare(starts)
            except ModelError as error:  # a provider may refuse what others run
                lanes.remove(lane)
                missing.append({"ep": lane.ep.label, "reason": str(error), "install": ""})
                if not lanes:
                    raise
        count = timing.plan_blocks(max(lane.load_seconds for lane in lanes), seconds)
        # Block by block over the providers, so that a drift of the machine meets all of them.
        for k in (progress or NoProgress()).track(range(count), total=count, label="bench"):
            for lane in lanes:
                lane.block(seconds / count, f"{seed}/{k}")
        for lane in lanes:
            rows += lane.rows(lanes[0])
            warnings += lane.notes
            kernels += lane.profile() if profile else []
    return {
        "bench": rows,
        "missing": missing,
        "warnings": [*(entry["reason"] for entry in missing), *dict.fromkeys(warnings)],
        **({"kernels": kernels} if profile else {}),
        "confidence": timing.CONFIDENCE,
        "environment": {**doctor.environment(), "load": _load()},
    }


class _Lane:
    """One execution provider: its worker, what it says about the files, and the blocks it measured."""

    def __init__(
        self, process: workers.Process, variants: Sequence[Variant], paths: Mapping[int, list[str]], folder: Path
    ) -> None:
        self.process = process
        self.ep = process.ep
        self.variants = variants
        self.load_seconds = 0.0
        self.notes: list[str] = []
        self._paths = paths
        self._folder = folder
        self._cold: list[dict[str, Any]] = []
        self._placed: dict[Path, dict[str, Any]] = {}
        self._blocks: list[np.ndarray] = []
        self._waited: list[np.ndarray] = []
        self._load: list[list[float]] = []
        self._first: list[list[float]] = []

    def prepare(self, starts: bool) -> list[str]:
        """Find out where the nodes of the files run, and what a start from nothing takes; lines for the user."""
        lines = []
        for variant in self.variants if starts else ():
            # In a process of its own: the peak of memory is that of a process, and later sessions load faster.
            with workers.Process(self.ep, self.process.python, self._folder) as fresh:
                self._cold.append(self._ask(fresh, "cold", variant, feeds=self._paths[variant.batch]))
        for variant in self.variants:
            if variant.file not in self._placed:
                placed = self._ask(self.process, "placement", variant)
                self._placed[variant.file] = placed
                provider = self.process.request["provider"]
                if provider not in placed["providers"]:
                    raise ModelError(
                        f"{variant.file} on {self.ep.label}: nothing runs on {provider}, ONNX Runtime fell back to "
                        f"{placed['providers'][0]}: it refuses an option or lacks a library; install line: "
                        f"{self.ep.install_line()}"
                    )
                line = left_behind(placed, provider)
                if line is not None:
                    hint = "" if self.ep.name == "plugin" else f"; install line: {self.ep.install_line()}"
                    lines.append(f"{variant.file} on {self.ep.label}: {line}{hint}")
        # What a block spends on new sessions; a cold start would overstate it.
        self.block(0.0, "plan")
        self.load_seconds = sum(self._load.pop() + self._first.pop()) / 1e3
        del self._blocks[-1], self._waited[-1]
        return lines

    @staticmethod
    def _ask(process: workers.Process, do: str, variant: Variant, **more: Any) -> Any:
        """What `workers.Process.ask` answers about one file, which errors name."""
        try:
            return process.ask(do, path=variant.path, ep=process.request, threads=variant.threads, **more)
        except ModelError as error:
            raise ModelError(f"{variant.file} on {error}") from error

    def block(self, seconds: float, seed: str) -> None:
        """Measure all variants in turn, in new sessions."""
        models = [
            {"path": v.path, "threads": v.threads, "feeds": self._paths[v.batch]} for v in self.variants
        ]  # fmt: skip
        found = self.process.ask("block", models=models, ep=self.process.request, seconds=seconds, seed=seed)
        self._blocks.append(np.array(found["rounds"]))
        self._waited.append(np.array(found["waited"]))
        self._load.append(found["load_ms"])
        self._first.append(found["first_ms"])

    def rows(self, first: _Lane) -> list[dict[str, Any]]:
        """One row per variant, with its speed over the first file's same variant and over the first row of all."""
        compared = timing.compare(self._blocks)
        if compared.drift != 1.0:
            self.notes.append(
                f"{self.ep.label}: the machine became {compared.drift:.2f}x as fast while measuring (throttling, or "
                "other work): the ratios hold, since all ran in turn, the milliseconds are between"
            )
        waited = float(sum(w.sum() for w in self._waited) / sum(np.nansum(b + w) for b, w in self._pairs()))
        if max(compared.disturbed, waited) > 0.1:
            self.notes.append(
                f"{self.ep.label}: other work disturbed {compared.disturbed:.0%} of the passes"
                + (f", and held the core for {waited:.0%} of the time, which is not counted" if waited else "")
            )
        rows = []
        for k, variant in enumerate(self.variants):
            same = next(
                i for i, v in enumerate(self.variants) if (v.threads, v.batch) == (variant.threads, variant.batch)
            )
            speedup, interval = timing.ratio(self._column(same), self._column(k))
            overall, around = timing.ratio(first._column(0), self._column(k))
            per_row = variant.batch / first.variants[0].batch
            rows.append(
                {
                    "file": str(variant.file),
                    "ep": self.ep.label,
                    "provider": self.process.request["provider"],
                    "threads": variant.threads,
                    "batch": variant.batch,
                    "latency_ms": dataclasses.asdict(compared.latency[k]),
                    "throughput": 1e3 * variant.batch / compared.latency[k].median,
                    "speedup": speedup,
                    "interval": list(interval),
                    "verdict": timing.verdict(speedup, interval) if k != same else "",
                    "over_first": {"speedup": overall * per_row, "interval": [per_row * b for b in around]},
                    "load_ms": float(np.median([block[k] for block in self._load])),
                    "first_ms": float(np.median([block[k] for block in self._first])),
                    "cold": self._cold[k] if self._cold else None,
                    "placement": self._placed[variant.file],
                    "blocks": compared.blocks,
                    "disturbed": compared.disturbed,
                    "waited": waited,
                    "drift": compared.drift,
                    "onnxruntime": self.process.facts["version"],
                }
            )
        return rows

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return zip(self._blocks, self._waited, strict=True)

    def _column(self, k: int) -> list[np.ndarray]:
        return [block[:, k] for block in self._blocks]

    def profile(self) -> list[dict[str, Any]]:
        """Kernels of every file, at its first number of threads and batch size."""
        found = []
        for variant in {v.file: v for v in reversed(self.variants)}.values():
            rows = self.process.ask(
                "profile", path=variant.path, ep=self.process.request, feeds=self._paths[variant.batch],
                threads=variant.threads, rounds=_PROFILED,
            )  # fmt: skip
            found.append({"file": str(variant.file), "ep": self.ep.label, "kernels": rows})
        return found[::-1]


def left_behind(placed: Mapping[str, Any], provider: str) -> str | None:
    """What ONNX Runtime runs elsewhere than on ``provider`` without saying so, or None."""
    if placed["nodes"] is None:
        return None
    total = sum(sum(counts.values()) for counts in placed["nodes"].values())
    lines = []
    for name, counts in placed["nodes"].items():
        if name != provider:
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{count} {op}" for op, count in ranked[:5])
            rest = f" and {len(ranked) - 5} other operators" if len(ranked) > 5 else ""
            lines.append(f"{sum(counts.values())} of {total} nodes run on {name} ({shown}{rest})")
    return "; ".join(lines) or None


def _load() -> float | None:
    """Processes that wanted a core in the last minute: what else ran here."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def run(
    paths: Sequence[Path],
    eps: str,
    source: str | None,
    shapes: Mapping[str, Sequence[int]],
    *,
    seconds: float,
    threads: Sequence[int],
    batches: Sequence[int] = (),
    seed: int = 0,
    profile: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What ``onnxslim bench`` prints: `measure` on the user's samples, else on generated ones."""
    chosen = parse(eps)
    data = samples(paths[0], source, shapes, seed)
    feeds = list(data.spread(_SAMPLES).feeds())
    by_batch: dict[int, Feeds] = {}
    if batches:
        free = {spec.name: bool(spec.shape) and spec.shape[0] is None for spec in data.specs if spec.shape is not None}
        by_batch = {batch: batched(feeds, free, batch) for batch in batches}
    else:
        by_batch = {max((len(a) for a in feeds[0].values() if a.ndim), default=1): feeds}
    facts = measure(
        paths, chosen, by_batch, threads=threads, seconds=seconds, seed=seed, profile=profile, progress=progress
    )
    shown = {name: list(array.shape) for name, array in feeds[0].items()}
    return {**facts, "data": data.origin, "shapes": shown, "threads": list(threads)}


def report(
    report: Report,
    original: Path,
    result: Path,
    eps: Sequence[Ep],
    source: str | None,
    shapes: Mapping[str, Sequence[int]],
    *,
    threads: int = 0,
    seed: int = 0,
) -> list[str]:
    """Measure two files on the same samples, and put one entry for each provider into ``report``.

    An entry takes the place of one with the same provider. What could not be measured is returned, and is a warning
    of the report: the result is there all the same.
    """
    try:
        feeds = list(samples(original, source, shapes, seed).spread(_SAMPLES).feeds())
        facts = measure([original, result], eps, {1: feeds}, threads=[threads], seed=seed)
    except (DataError, ModelError, workers.MissingError) as error:
        report.warnings.append(str(error))
        return [str(error)]
    found = entries(facts)
    again = {entry["ep"] for entry in found}
    report.bench = [entry for entry in report.bench if entry["ep"] not in again] + found
    report.warnings += facts["warnings"]
    return [entry["reason"] for entry in facts["missing"]]


def entries(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of two files as the ``bench`` of a report has them: one entry per provider."""
    found = []
    for original, result in zip(facts["bench"][::2], facts["bench"][1::2], strict=True):
        kept = ("ep", "latency_ms", "speedup", "interval", "threads", "cold", "placement")
        found.append({**{k: result[k] for k in kept}, "original_latency_ms": original["latency_ms"]})
    return found


def sheets(facts: Mapping[str, Any]) -> list[Sheet]:
    """Latencies; what a start from nothing takes; and the kernels by operator where they were profiled."""
    rows = facts["bench"]
    several = {key for key in ("threads", "batch") if len({row[key] for row in rows}) > 1}
    variant = [Column(key, key, "d") for key in ("threads", "batch") if key in several]
    which = [Column("file", "file"), Column("on", "ep"), *variant]
    latency = [
        Column("median ms", lambda r: r["latency_ms"]["median"], ".3f"),
        Column("p10", lambda r: r["latency_ms"]["p10"], ".3f"),
        Column("p90", lambda r: r["latency_ms"]["p90"], ".3f"),
        *([Column("samples/s", "throughput", ",.0f")] if several else []),
        Column("speed over the first", lambda r: speed_text(r["speedup"], r["interval"]) if r["verdict"] else ""),
        Column("verdict", "verdict"),
        *([Column("over the first of all", _over_first)] if len({row["ep"] for row in rows}) > 1 else []),
    ]
    start = [
        Column("load ms", "load_ms", ".1f"),
        Column("cold load ms", lambda r: r["cold"]["load_ms"], ".1f"),
        Column("first run ms", lambda r: r["cold"]["first_ms"], ".1f"),
        Column("peak MB", lambda r: _mega(r["cold"]["peak_bytes"]), ".0f"),
        Column("of it the runtime", lambda r: _mega(r["cold"]["runtime_bytes"]), ".0f"),
        Column("device MB", lambda r: _mega(r["cold"]["device_bytes"]), ".0f"),
        Column("nodes elsewhere", lambda r: left_behind(r["placement"], _provider(r)) or ""),
    ]
    found = [Sheet("latency", [*which, *latency], rows), Sheet("start", [*which, *start], rows)]
    if "kernels" in facts:
        columns = (
            Column("file", "file"),
            Column("on", "ep"),
            Column("operator", "operator"),
            Column("reads", "reads"),
            Column("kernels", "kernels", "d"),
            Column("ms", "ms", ".3f"),
            Column("share", "share", ".1%"),
        )
        found.append(Sheet("kernels", columns, operators(facts["kernels"])))
    return found


def operators(profiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kernels of each profile by operator and the element types that they read, the dearest first."""
    rows = []
    for profile in profiles:
        whole = sum(kernel["ms"] for kernel in profile["kernels"]) or 1.0
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for kernel in profile["kernels"]:
            reads = " ".join(dict.fromkeys(kernel["inputs"]))
            row = groups.setdefault((kernel["operator"], reads), {"kernels": 0, "ms": 0.0})
            row["kernels"] += 1
            row["ms"] += kernel["ms"]
        ranked = sorted(groups.items(), key=lambda item: -item[1]["ms"])
        rows += [
            {
                "file": profile["file"],
                "ep": profile["ep"],
                "operator": op,
                "reads": reads,
                **row,
                "share": row["ms"] / whole,
            }
            for (op, reads), row in ranked
        ]
    return rows


def table(facts: Mapping[str, Any]) -> RenderableType:
    """`run` for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"! {line}", "yellow") for line in facts["warnings"]]
    parts += tables(sheets(facts))
    blocks = facts["bench"][0]["blocks"]
    parts += plots(facts)
    about = (
        f"{facts['data']}, shapes {facts['shapes']}; intervals {facts['confidence']:.0%}, {blocks} blocks of sessions"
    )
    return Group(*parts, Text(about))


def plots(facts: Mapping[str, Any]) -> list[RenderableType]:
    """Latencies and speeds as bars on a terminal, and the time of the kernels where they were profiled."""
    from rich.text import Text

    several = [key for key in ("ep", "threads", "batch") if len({row[key] for row in facts["bench"]}) > 1]

    def label(row: Row) -> str:
        return " ".join([Path(row["file"]).name, *(row[k] if k == "ep" else f"{k} {row[k]}" for k in several)])

    rows = facts["bench"]
    times = [
        Span(label(r), r["latency_ms"]["p10"], r["latency_ms"]["p90"], f"{r['latency_ms']['median']:.3f} ms")
        for r in rows
    ]
    around = [r["over_first"]["interval"] for r in rows]
    speeds = [Span(label(r), low, high, _over_first(r)) for r, (low, high) in zip(rows, around, strict=True)]
    found: list[RenderableType] = [
        Spans("milliseconds of a pass, 10th to 90th percentile, and the median", times),
        Spans(f"speed over the first, {facts['confidence']:.0%} interval", speeds),
    ]
    if "kernels" in facts:
        kernels = operators(facts["kernels"])[:_PLOTTED]
        bars = [Span(f"{Path(r['file']).name} {r['operator']}", 0.0, r["ms"], f"{r['share']:.1%}") for r in kernels]
        found.append(Spans("milliseconds of the kernels of a pass, and their share of it", bars))
    return [*found, Text()]


def _over_first(row: Row) -> str:
    return speed_text(row["over_first"]["speedup"], row["over_first"]["interval"])


def _mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _provider(row: Row) -> str:
    return str(row["provider"])
