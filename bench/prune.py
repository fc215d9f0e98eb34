"""Prunes real models to budgets, without labels or training, and prints what that costs.

    python bench/prune.py [NAME ...] [--latency] [--peers] [--threads N]     models of models/zoo.py, train_plain.py
    python bench/prune.py --corpus [NAME ...] [--ratio 0.3]          every file of models/corpus.py

The first table has one row for each model and budget: what is left of MACs and parameters, the metric before and
after on the evaluation data, the drop in points beside the most that it may be, and the seconds that pruning took;
`--latency` adds the measured time of the result over that of the input, `--peers` a row for what each tool of
bench/pruners.py makes of the model, with the MACs that our result has left.

`--corpus` prunes every file to a ratio and prints the share of its parameters that leaves, the largest relative
difference between the masked and the pruned model (beside what the pruned one differs from itself by, where that has to
be known: see bench/oracle.py), and whether the outputs keep their shapes; for a file that loses nothing how many
weights stay for which reason. A failure is printed with its message.

Exit codes: 0 done; 1 a drop is larger than it may be, or a file of the corpus failed, differs or loses nothing
without a reason for every weight; 2 bad usage.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import oracle, pruners
from models import corpus, zoo
from models.packages import cache_root
from onnxslim import cost, coupling, data, pipeline, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.errors import OnnxslimError

TOLERANCE = 1e-4
ENOUGH = 0.2  # share of the parameters that should leave a file of the corpus
LENET = ("prune(params=0.472)", "prune(params=0.276)", "prune(params=0.182)")  # 50, 70 and 80 % fewer neurons
# Model, pass, and the largest drop in points (of 100), None where there is only a figure to print.
CASES: tuple[tuple[str, str, float | None], ...] = (
    *zip(["lenet300"] * 3, LENET, (0.4, 1.2, 2.5), strict=True),
    ("vgg", "prune(macs=0.5)", 1.0),
    ("fmnist_cnn", "prune(macs=0.5)", 1.0),
    ("efficientnet_lite0", "prune(macs=0.9)", 2.0),
    ("efficientnet_lite0", "prune(macs=0.8)", 6.0),
    ("efficientnet_lite0", "prune(macs=0.7)", 12.0),
    ("mobilenetv2_fashion", "prune(macs=0.8)", None),
    # A quarter of what is in the layers, embeddings apart.
    ("minilm_l6", "prune(ratio=0.117)", 3.0),
)


@dataclass(frozen=True)
class Subject:
    """A model with its data; `score` gives the metric of a file made of it."""

    path: Path
    calibration: Path
    item: zoo.Model | None

    def score(self, path: Path, threads: int) -> float:
        """The metric, higher is better."""
        if self.item is not None:
            return zoo.evaluate(self.item, path, threads)[self.item.metric.rpartition(":")[2]]
        session = zoo.open_session(path, threads)
        with np.load(self.path.parent / "eval.npz") as found:
            images, labels = found["image"], found["labels"]
        name = session.get_outputs()[0].name
        parts = [session.run([name], {"image": images[k : k + 250]})[0] for k in range(0, len(images), 250)]
        return float(np.mean(np.concatenate(parts).argmax(axis=1) == labels))


def subject(name: str) -> Subject | None:
    """The model called ``name``, None when it is not at hand."""
    models = zoo.load_models()
    if name in models:
        item = models[name]
        return Subject(item.path, item.folder / item.calibration, item) if item.path.is_file() else None
    folder = cache_root() / name
    return Subject(folder / "model.onnx", folder / "calib.npz", None) if (folder / "model.onnx").is_file() else None


def prepared(path: Path, samples: Any, threads: int) -> tuple[ir.Model, Context]:
    """A file simplified and folded, and the context to prune it in."""
    model = model_io.load(str(path))
    context = Context(data.open_data(samples, data.input_specs(model)), threads=threads)
    for stage in pipeline.parse("simplify,fold"):
        stage.apply(model, context)
    return model, context


def prune(model: ir.Model, text: str, context: Context) -> Outcome:
    """Apply one pass in place."""
    (stage,) = pipeline.parse(text)
    return stage.apply(model, context)


def run_case(name: str, text: str, bar: float | None, options: argparse.Namespace, folder: Path) -> bool:
    """Print one row; False when the drop is too large."""
    found = subject(name)
    if found is None:
        print(f"{name:22} {text:22} not at hand", flush=True)
        return True
    model, context = prepared(found.path, str(found.calibration), options.threads)
    original = model.clone()
    feed = context.calibration.feed(context.calibration[0])
    before = cost.analyze(model, feed)
    began = time.perf_counter()
    prune(model, text, context)
    seconds = time.perf_counter() - began
    after = cost.analyze(model, feed)
    path = model_io.save(model, folder / "pruned.onnx")
    old, new = found.score(found.path, options.threads), found.score(path, options.threads)
    drop = 100 * (old - new)
    timed = ""
    if options.latency:
        measured = runtime.compare_models([original, model], [feed], threads=options.threads)
        low, high = measured.interval[1]
        timed = f"  time {1 / measured.speedup[1]:.2f} ({1 / high:.2f} to {1 / low:.2f})"
    macs, parameters = after.macs / before.macs, after.parameters / before.parameters
    print(
        f"{name:22} {text:22} MACs {macs:.2f}  parameters {parameters:.2f}"
        f"  {100 * old:.2f} -> {100 * new:.2f}  drop {drop:5.2f}{'' if bar is None else f' of {bar:g}'}{timed}"
        f"  {seconds:.0f} s {' '.join(context.warnings)}",
        flush=True,
    )
    if options.peers:
        run_peers(name, found, before.macs, after.macs, old, folder / "peer.onnx", options.threads)
    return bar is None or drop <= bar


def run_peers(name: str, found: Subject, macs: int, goal: int, old: float, path: Path, threads: int) -> None:
    """Print a row for every peer that can prune the model down to ``goal`` MACs."""
    samples = data.open_data(str(found.calibration), data.input_specs(model_io.load(found.path)))
    feed = samples.feed(samples[0])

    def left(file: Path) -> float:
        return float(cost.analyze(model_io.load(file), feed).macs)

    makers = {"onnxsim": lambda: pruners.onnxsim(found.path, path, samples, left, goal)}
    if name in pruners.NETWORKS:
        makers["torch-pruning"] = lambda: pruners.torch_pruning(name, found.path, path, left, goal)
    for peer, make in makers.items():
        path.unlink(missing_ok=True)
        try:
            make()
        except subprocess.CalledProcessError as error:
            lines = str(error.stderr or error).strip().splitlines() or [str(error)]
            print(f"{name:22} {peer:22} failed: {lines[-1][:200]}", flush=True)
            continue
        new = found.score(path, threads)
        drop = 100 * (old - new)
        share = f"{name:22} {peer:22} MACs {left(path) / macs:.2f}{'':18}"
        print(f"{share}{100 * old:.2f} -> {100 * new:.2f}  drop {drop:5.2f}", flush=True)


def run_file(entry: corpus.Entry, ratio: float, threads: int) -> tuple[float, bool]:
    """Print one row; the share of the parameters that left, and whether all is well."""
    name = entry.name
    try:
        model, context = prepared(entry.path, [entry.inputs()], threads)
        original, before = model.clone(), cost.parameters(model)
        outcome = prune(model, f"prune(ratio={ratio})", context)
        lost = 1 - cost.parameters(model) / max(before, 1)
        feed = context.calibration.feed(context.calibration[0])
        same = shapes(original, feed, threads) == shapes(model, feed, threads)
    except (OnnxslimError, ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
        print(f"{name:36} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        return 0.0, False
    differs = outcome.stats.get("oracle", 0.0)
    noise = oracle.itself(model, [feed], threads) if differs > TOLERANCE else 0.0
    beside = f" (noise {noise:.1e})" if noise else ""
    print(
        f"{name:36} lost {lost:6.1%}  oracle {differs:.1e}{beside}  shapes {'kept' if same else 'CHANGED'}", flush=True
    )
    explained = True
    if not lost:
        reasons = stays(model, feed, outcome, threads)
        explained = "" not in reasons
        for why, weights in Counter(re.sub(r"^(\w+) \S*: ", r"\1: ", reason) for reason in reasons).most_common():
            print(f"    {weights:4} x {why or 'NO REASON'}")
    return lost, same and differs <= max(TOLERANCE, oracle.NOISE * noise) and explained


def stays(model: ir.Model, feed: Mapping[str, np.ndarray], outcome: Outcome, threads: int) -> list[str]:
    """Why each weight of an uncut model stays, "" for one of which nothing is said."""
    coupled = coupling.analyze(model, feed, threads=threads)
    said = {skip.node: skip.reason for skip in outcome.skipped}
    for family in coupled.families:
        for value, _ in family.weights:
            if family.name in said:
                said.setdefault(value.name or "", said[family.name])
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return [said.get(n, "") for n, t in tensors.items() if t and t.dtype.is_floating_point() and len(t.shape) > 1]


def shapes(model: ir.Model, feed: Mapping[str, np.ndarray], threads: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs on one sample."""
    return {name: np.shape(value) for name, value in runtime.load(model, threads=threads)(feed).items()}


def run_corpus(options: argparse.Namespace) -> bool:
    """Print the table of the corpus; True when every file is well."""
    wanted = [e for e in corpus.built() if not options.names or e.name in options.names]
    results = [run_file(entry, options.ratio, options.threads) for entry in wanted]
    many = sum(lost >= ENOUGH for lost, _ in results)
    shares = [lost for lost, _ in results]
    print(f"{many} of {len(results)} files lose {ENOUGH:.0%} or more; {sum(not ok for _, ok in results)} are not well")
    print(f"lost in the median {np.median(shares or [0]):.1%}; {sum(not x for x in shares)} files lose nothing")
    return all(ok for _, ok in results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--corpus", action="store_true", help="the files of models/corpus.py")
    parser.add_argument("--ratio", type=float, default=0.3, help="of the corpus")
    parser.add_argument("--peers", action="store_true", help="other tools beside ours, at the same MACs")
    parser.add_argument("--latency", action="store_true", help="measure the time of the results")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.corpus:
        return int(not run_corpus(options))
    unknown = set(options.names) - {name for name, *_ in CASES}
    if unknown:
        parser.error(
            f"no model {', '.join(sorted(unknown))}; there are {', '.join(dict.fromkeys(n for n, *_ in CASES))}"
        )
    import tempfile

    with tempfile.TemporaryDirectory(prefix="onnxslim-") as scratch:
        well = [
            run_case(name, text, bar, options, Path(scratch))
            for name, text, bar in CASES
            if not options.names or name in options.names
        ]
    return int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
