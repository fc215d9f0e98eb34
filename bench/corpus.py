"""Runs passes over every file of the corpus (models/corpus.py) and prints what became of each.

    python bench/corpus.py [NAME ...] [--passes simplify,fold,fuse] [--peers] [--latency] [--twice] [--json FILE]

For each file: nodes of the original and of the result, the result's largest relative L2 error on the saved inputs, the
seconds from reading to writing, and the peak of the process's resident memory. The passes are applied as they are:
nothing that pipelines do to undo a wrong step hides one here. Nodes are all nodes of a file, Constant nodes and those
of subgraphs included.

`--peers` adds the simplifiers of bench/peers.py, each in its own environment; their files and figures are kept beside
the corpus, and their seconds are those of the whole command (imports included), for which `--command` gives ours.
`--latency` measures all files of an entry in turn, as ratios over the original. `--twice` applies the passes a second
time, which must leave the number of nodes as it is.

Exit codes: 0 done; 1 a crash, a mismatch, or (with `--twice`) a second application that changed something; 2 bad usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers
from models import corpus
from models.data import Sample
from models.packages import ZooError, sha256
from onnxslim.api import DEFAULT_PASSES

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("onnxslim", "onnxsim")
# Relative L2 error from which a lossless result is wrong.
MISMATCH = 1e-4
# It may be off by this many times what the runtime's optimizations do to the original.
NOISE = 4.0
# Nodes that a result may have more than the better peer's.
SLACK = 2


@dataclasses.dataclass
class Result:
    """What one tool made of one file; ``problem`` says why there is nothing, or what is wrong with it."""

    nodes: int | None = None
    error: float | None = None
    seconds: float = 0.0
    megabytes: float = 0.0
    again: int | None = None
    speed: float | None = None
    problem: str = ""


@dataclasses.dataclass
class Row:
    """One file of the corpus: its nodes, and what each tool made of it."""

    name: str
    nodes: int
    results: dict[str, Result]

    @property
    def best(self) -> int | None:
        """Nodes of the better peer, of those that did not fail."""
        good = [r.nodes for p in PEERS if (r := self.results.get(p)) and r.nodes is not None and not r.problem]
        return min(good, default=None)


def count(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of its subgraphs."""
    total = len(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            total += sum(map(count, [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]))
    return total


def nodes_of(path: Path) -> int:
    """Nodes of a file, functions included."""
    model = onnx.load(path, load_external_data=False)
    return count(model.graph) + sum(len(function.node) for function in model.functions)


def run(path: Path, sample: Sample, *, optimize: bool = True) -> list[Any]:
    """Outputs of a file."""
    from onnxslim import runtime

    runner = runtime.load(path, threads=1, optimize=optimize)
    return list(runtime.run(runner, sample).values())


def difference(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The worst output's relative L2 error; infinite where types, shapes, or places of NaN differ."""
    if len(want) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.dtype.kind not in "fiub":
            worst = max(worst, 0.0 if np.array_equal(a, b) else float("inf"))
            continue
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        if not np.isfinite(x[~same]).all() or not np.isfinite(y[~same]).all():
            return float("inf")
        if not same.all():
            finite = np.isfinite(x)
            norm = float(np.linalg.norm(x[finite]))
            worst = max(worst, float(np.linalg.norm((y - x)[~same])) / (norm or 1.0))
    return worst


def apply(source: Path, target: Path, sample: Sample, passes: str, twice: bool) -> Result:
    """Read, apply the passes, write; what an exception says is the problem."""
    from onnxslim import model as model_io
    from onnxslim import pipeline
    from onnxslim.contract import Context
    from onnxslim.data import Data, input_specs

    result = Result()
    began = time.perf_counter()
    model = model_io.load(source)
    specs = input_specs(model)
    for item in pipeline.complete(pipeline.parse(passes)):
        item.apply(model, Context(Data("corpus", 1, lambda k: sample, specs), threads=1))
    model_io.save(model, target)
    result.seconds = time.perf_counter() - began
    result.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result.nodes = nodes_of(target)
    if twice:
        model = model_io.load(target)
        for item in pipeline.complete(pipeline.parse(passes)):
            item.apply(model, Context(Data("corpus", 1, lambda k: sample, specs), threads=1))
        model_io.save(model, target.with_suffix(".again.onnx"))
        result.again = nodes_of(target.with_suffix(".again.onnx"))
    return result


def judge(source: Path, target: Path, sample: Sample) -> tuple[float, bool]:
    """How far the outputs of ``target`` are off, and whether that is a mismatch.

    It is none where a graph amplifies rounding: where the runtime's own optimizations move the original's outputs by a
    quarter as much.
    """
    want = run(source, sample)
    error = difference(want, run(target, sample))
    allowed = MISMATCH
    if error > MISMATCH:
        allowed = max(MISMATCH, NOISE * difference(want, run(source, sample, optimize=False)))
    return error, error > allowed


def _child(function: Callable[[], Any], pipe: Any) -> None:
    try:
        pipe.send((function(), ""))
    except Exception as error:  # whatever a pass raises is the finding
        lines = str(error).strip().splitlines() or [""]
        pipe.send((None, f"{type(error).__name__}: {lines[0][:200]}"))


def isolated(function: Callable[[], Any], timeout: float) -> tuple[Any, str]:
    """The value of ``function`` in a process of its own, or None and the reason why there is none."""
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, writing))
    process.start()
    writing.close()
    try:
        if not reading.poll(timeout):
            return None, f"no result after {timeout:.0f} s"
        return reading.recv()
    except EOFError:
        process.join()
        return None, f"exit code {process.exitcode}"
    finally:
        if process.is_alive() and not reading.closed:
            process.join(0.5)
        if process.is_alive():
            process.kill()
        process.join()


def command(arguments: list[str], folder: Path, timeout: float) -> Result:
    """Run a program; its seconds and its peak of resident memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=said, stderr=said)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - began > timeout:
                process.kill()
                os.wait4(process.pid, 0)
                return Result(problem=f"no result after {timeout:.0f} s", seconds=timeout)
            time.sleep(0.02)
    result = Result(seconds=time.perf_counter() - began, megabytes=usage.ru_maxrss / 1024)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = (folder / "said.txt").read_text(errors="replace").strip().splitlines() or [""]
        result.problem = f"exit code {process.returncode}: {lines[-1].strip()[:200]}"
    return result


def settle(result: Result, judged: tuple[float, bool]) -> str:
    """Note the error of a result; returns what is wrong with it."""
    result.error, mismatch = judged
    return f"mismatch: {result.error:.1e}" if mismatch else ""


def by_peer(name: str, entry: corpus.Entry, scratch: Path, timeout: float) -> tuple[Result, Path]:
    """What a peer makes of an entry; kept beside the corpus as long as neither the file nor the peer changes."""
    peer = peers.PEERS[name]
    folder = corpus.root().parent.parent / "peers" / "corpus" / entry.name / name
    stamp = f"{sha256(entry.path)} {' '.join(peer.packages)} {peer.program}"
    kept, target = folder / "result.json", folder / "model.onnx"
    if kept.is_file():
        told = json.loads(kept.read_text())
        if told.pop("stamp") == stamp:
            return Result(**told), target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = command(peer.command(entry.path, target, entry.path), scratch, timeout)
    if target.is_file():
        result.nodes = nodes_of(target)
        judged, problem = isolated(lambda: judge(entry.path, target, entry.inputs()), timeout)
        result.problem = result.problem or problem or settle(result, judged)
    elif not result.problem:
        result.problem = "it wrote no file"
    kept.write_text(json.dumps({"stamp": stamp, **dataclasses.asdict(result)}, indent=1))
    return result, target


def by_us(entry: corpus.Entry, target: Path, options: argparse.Namespace) -> Result:
    """What the passes make of an entry."""
    sample = entry.inputs()
    if options.command:
        arguments = [sys.executable, "-m", "onnxslim", str(entry.path), str(target), "--passes", options.passes]
        result = command([*arguments, "--no-bench", "--threads", "1"], target.parent, options.timeout)
        if not target.is_file():
            return result
        result.nodes = nodes_of(target)
    else:
        made, problem = isolated(
            lambda: apply(entry.path, target, sample, options.passes, options.twice), options.timeout
        )
        if made is None:
            return Result(problem=problem)
        result = made
    judged, problem = isolated(lambda: judge(entry.path, target, sample), options.timeout)
    problem = problem or settle(result, judged)
    if result.again is not None and result.again != result.nodes:
        problem = problem or f"a second application leaves {result.again} nodes"
    result.problem = result.problem or problem
    return result


def speeds(files: list[Path], sample: Sample, seconds: float) -> list[float]:
    """Speed of each file over the first, measured in turn."""
    from onnxslim import runtime

    return runtime.compare_models(files, [sample], threads=1, seconds=seconds * len(files)).speedup


def measure(entry: corpus.Entry, options: argparse.Namespace) -> Row:
    """One row of the table."""
    row = Row(entry.name, nodes_of(entry.path), {})
    with tempfile.TemporaryDirectory(prefix="onnxslim-corpus-") as folder:
        scratch = Path(folder)
        target = scratch / "ours.onnx"
        row.results["ours"] = by_us(entry, target, options)
        files = {"ours": target}
        for name in PEERS if options.peers else ():
            row.results[name], files[name] = by_peer(name, entry, scratch, options.timeout)
        if options.keep is not None and target.is_file():
            shutil.copy(target, options.keep / f"{entry.name}.onnx")
        if options.latency:
            good = [name for name, result in row.results.items() if not result.problem]
            paths = [entry.path, *(files[name] for name in good)]
            found, _ = isolated(lambda: speeds(paths, entry.inputs(), options.seconds), options.timeout)
            for name, speed in zip(good, (found or [])[1:], strict=False):
                row.results[name].speed = speed
    return row


def line(row: Row) -> Iterator[str]:
    """The cells of a row."""
    ours = row.results["ours"]
    yield f"{row.name:34} {row.nodes:5} {'-' if ours.nodes is None else ours.nodes:>5}"
    for name in PEERS:
        if name in row.results:
            peer = row.results[name]
            yield f"{'-' if peer.nodes is None else peer.nodes:>6}{'!' if peer.problem else ' '}"
    if row.best is not None and ours.nodes is not None:
        excess = ours.nodes - row.best
        yield f"{excess:+5}{'*' if excess > SLACK else ' '}"
    yield f"{'' if ours.error is None else format(ours.error, '.0e'):>6} {ours.seconds:6.2f}"
    for result in row.results.values():
        if result.speed is not None:
            yield f"{result.speed:5.2f}x"
    for name, result in row.results.items():
        if result.problem:
            yield f"{name}: {result.problem}"


def total(rows: list[Row], failures: dict[str, str]) -> Iterator[str]:
    """What all rows come to."""
    whole = [row for row in rows if row.results["ours"].nodes is not None]
    ours = sum(row.results["ours"].nodes or 0 for row in whole)
    yield f"{len(rows)} files; not exported: {len(failures)}"
    yield f"nodes: original {sum(row.nodes for row in whole)}, ours {ours}"
    for name in PEERS:
        good = [row for row in whole if name in row.results and row.results[name].nodes is not None]
        if good:
            nodes = sum(row.results[name].nodes or 0 for row in good)
            mine = sum(row.results["ours"].nodes or 0 for row in good)
            bad = sum(bool(row.results[name].problem) for row in rows)
            yield f"{name}: {nodes} on {len(good)} files, ours {mine} there; crashes and mismatches: {bad}"
    judged = [row for row in whole if row.best is not None]
    if judged:
        best = sum(row.best or 0 for row in judged)
        mine = sum(row.results["ours"].nodes or 0 for row in judged)
        behind = [row.name for row in judged if (row.results["ours"].nodes or 0) > (row.best or 0) + SLACK]
        yield f"best of both per file {best}, ours {mine} there: {mine / best:.1%}"
        yield f"more than the better peer plus {SLACK}: {len(behind)} {' '.join(behind)}"
    for name in ("ours", *PEERS):
        results = [row.results[name] for row in rows if name in row.results]
        if results:
            seconds, memory = sum(r.seconds for r in results), max(r.megabytes for r in results)
            yield f"{name}: {seconds:.0f} s in all, at most {memory:.0f} MB"
        ratios = [r.speed for r in results if r.speed]
        if ratios:
            mean = float(np.exp(np.mean(np.log(ratios))))
            yield f"{name}: {mean:.3f}x the speed of the input (geometric mean), {min(ratios):.2f}x at worst"
    problems = [row.name for row in rows if row.results["ours"].problem]
    yield f"ours: {len(problems)} crashes and mismatches {' '.join(problems)}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; bad usage ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="bench/corpus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="an architecture, or one file of it: resnet.dynamo")
    parser.add_argument("--passes", default=DEFAULT_PASSES, metavar="LIST", help=f"default: {DEFAULT_PASSES}")
    parser.add_argument("--peers", action="store_true", help="also what the peers make of each file")
    parser.add_argument("--latency", action="store_true", help="also the speed of every result over the original")
    parser.add_argument("--command", action="store_true", help="time the whole command, imports and checks included")
    parser.add_argument("--twice", action="store_true", help="apply the passes a second time")
    parser.add_argument("--seconds", type=float, default=1.0, help="of latency measuring for each file (default: 1)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a tool may take (default: 300)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep our files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results")
    options = parser.parse_args(arguments)
    if min(options.timeout, options.seconds) <= 0:
        parser.error("--seconds and --timeout must be positive")
    return options


def main(arguments: list[str]) -> int:
    """Carry out the command line; return the exit code."""
    options = parse(arguments)
    try:
        chosen = corpus.choose(options.names, None)
        there = [entry for entry in chosen if entry.path.is_file()]
        if not there:
            raise ZooError("none of these files is there; run: python models/corpus.py build")
    except ZooError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    failures = {entry.name: entry.failure for entry in chosen if entry.failure}
    rows = []
    shown = "".join(f"{name[:7]:>8}" for name in PEERS) + "   more" if options.peers else ""
    print(f"{'':34} {'nodes':>5} {'ours':>5}{shown} {'error':>7} {'s':>6}")
    for entry in there:
        rows.append(measure(entry, options))
        print(" ".join(line(rows[-1])), flush=True)
        if options.json is not None:
            content = {"rows": [dataclasses.asdict(row) for row in rows], "not_exported": failures}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    for name, reason in failures.items():
        print(f"{name:34} not exported: {reason}")
    print(*total(rows, failures), sep="\n")
    return int(any(row.results["ours"].problem for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
