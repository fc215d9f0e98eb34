"""Runs pipelines, and peers beside them, on the models of models/models.toml and prints one table.

    python bench/zoo.py [NAME ...] [--passes LIST] [--json FILE] [--threads 2]
    python bench/zoo.py --compare OLD.json NEW.json

LIST holds recipes separated by semicolons: pipelines of onnxslim, and the peers of bench/peers.py. Every file that is
made is judged in the same way, and the latencies of all files made of one model are measured in turn with its own.
Without a name it takes every model at hand (`python models/zoo.py fetch --all` fetches the others).

Exit codes: 0 done, 1 a cell of the table failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers, steps
from bench.table import Row, compare, differing, render
from models import zoo
from models.packages import ZooError
from onnxslim import doctor, eps, pipeline
from onnxslim.contract import Effect
from onnxslim.errors import OnnxslimError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "simplify,fold; prune,int8; int8; peer:ort-int8"
STATUS = {1: "check failed", 2: "refused", 123: "pass undone"}


class BenchError(Exception):
    """Bad usage; the text says what to do."""


class StepError(Exception):
    """A process failed: ``status`` in a few words, ``detail`` its last message."""

    def __init__(self, status: str, detail: str, code: int | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.code = status, detail, code


@dataclasses.dataclass(frozen=True)
class Setting:
    """How every cell is run: threads of every session, limits per process, where the files go and are timed."""

    folder: Path
    threads: int = 2
    seconds: float = 3.0
    timeout: float = 1800.0
    samples: int | None = None
    ep: str = "cpu"


def recipes(text: str) -> dict[str, bool]:
    """The recipes of a list separated by semicolons, and whether each must be lossless.

    Raises:
        BenchError: an unknown peer, pass or option.
    """
    found = {}
    for recipe in filter(None, (part.strip() for part in text.split(";"))):
        if recipe.startswith(peers.PREFIX):
            name = recipe.removeprefix(peers.PREFIX)
            if name not in peers.PEERS:
                known = ", ".join(peers.PREFIX + peer for peer in peers.PEERS)
                raise BenchError(f"no recipe {recipe!r}; there are {known}")
            found[recipe] = peers.PEERS[name].lossless
        else:
            try:
                found[recipe] = pipeline.strictest(pipeline.parse(recipe)) is not Effect.LOSSY
            except OnnxslimError as error:
                raise BenchError(str(error)) from error
    if not found:
        raise BenchError("--passes names no recipe")
    return found


def run(command: list[str], folder: Path, timeout: float) -> float:
    """Run ``command`` in ``folder`` and return the seconds it took.

    Raises:
        StepError: it ended with another code than 0, was killed, or took too long.
    """
    # The folder the tools run in keeps what they leave behind; the repository's own packages are found from there.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=timeout, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise StepError("timed out", f"after {timeout:.0f} s") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        code = done.returncode
        status = f"killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        raise StepError(status, said[-1][:300] if said else f"exit code {code}", code)
    return time.perf_counter() - began


def ask(what: str, request: dict[str, Any], folder: Path, setting: Setting) -> Any:
    """The answer of a function of bench/steps.py, computed in a process of its own."""
    question, answer = folder / f"{what}.request.json", folder / f"{what}.json"
    question.write_text(json.dumps({**request, "threads": setting.threads, "ep": setting.ep}))
    run([sys.executable, "-m", "bench.steps", what, str(question), str(answer)], folder, setting.timeout)
    return json.loads(answer.read_text())


def build(model: zoo.Model, row: Row, target: Path, setting: Setting) -> None:
    """Make ``target`` by the recipe of ``row``, which learns how that went.

    Raises:
        StepError: there is no result.
    """
    report = target.with_suffix(".json")
    if row.recipe.startswith(peers.PREFIX):
        peer = peers.PEERS[row.recipe.removeprefix(peers.PREFIX)]
        command = peer.command(model.path, target, model.folder / model.calibration)
    else:
        command = [sys.executable, "-m", "onnxslim", str(model.path), str(target), "--passes", row.recipe, *model.flags]
        command += ["--threads", str(setting.threads), "--json", str(report)]
    row.command = shlex.join(command)
    began = time.perf_counter()
    try:
        run(command, target.parent, setting.timeout)
    except StepError as error:
        error.status = STATUS.get(error.code or 0, error.status) if "onnxslim" in command else error.status
        if not target.exists():
            raise
        row.status, row.detail = error.status, error.detail
    finally:
        row.seconds = time.perf_counter() - began
    if report.exists():
        told = json.loads(report.read_text())
        row.warnings = told["warnings"]
        row.passes = [{k: p[k] for k in ("name", "options", "seconds", "stats")} for p in told.get("passes", ())]


def measure(model: zoo.Model, chosen: dict[str, bool], setting: Setting) -> list[Row]:
    """The rows of one model. Whatever fails is said in its row."""
    folder = setting.folder / model.name
    folder.mkdir(parents=True)
    if setting.samples is not None:
        model = steps.thin(model, setting.samples, folder)
    described = dataclasses.asdict(model)
    rows = [Row(model.name, recipe, lossless) for recipe, lossless in chosen.items()]
    try:
        before = ask("quality", {"model": described, "file": str(model.path)}, folder, setting)
    except StepError as error:
        for row in rows:
            row.status, row.detail = error.status, f"the input itself: {error.detail}"
        return rows
    made: list[tuple[Row, Path]] = []
    for k, row in enumerate(rows):
        place = folder / str(k)
        place.mkdir()
        target = place / f"{model.name}.onnx"
        print(f"{model.name}: {row.recipe}", file=sys.stderr, flush=True)
        try:
            build(model, row, target, setting)
            after = ask("quality", {"model": described, "file": str(target)}, place, setting)
        except (StepError, subprocess.CalledProcessError) as error:
            row.status = error.status if isinstance(error, StepError) else "failed"
            row.detail = error.detail if isinstance(error, StepError) else str(error)
            continue
        row.metric = {name: (value, after["metric"][name]) for name, value in before["metric"].items()}
        row.fidelity, row.before, row.after = after["fidelity"], before["size"], after["size"]
        made.append((row, target))
    time_all(described, made, folder, setting)
    return rows


def time_all(model: dict[str, Any], made: list[tuple[Row, Path]], folder: Path, setting: Setting) -> None:
    """Measure all files made of one model together, so that their ratios hold against each other too."""
    if not made:
        return
    files = [str(target) for _, target in made]
    request = {"model": model, "files": files, "seconds": setting.seconds}
    try:
        for (row, _), latency in zip(made, ask("latency", request, folder, setting), strict=True):
            row.latency = latency
    except StepError as error:
        for row, _ in made:
            row.status, row.detail = error.status, f"measuring the latency: {error.detail}"


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a run kept by ``--json``.

    Raises:
        BenchError: the file is not one.
    """
    try:
        content = json.loads(path.read_text())
        return content["environment"], [Row(**row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not a result of bench/zoo.py: {error}") from error


def choose(names: list[str]) -> list[zoo.Model]:
    """The models to run: those named, else all at hand.

    Raises:
        BenchError: one is not at hand.
        models.packages.ZooError: there is none of that name.
    """
    if not names:
        return [model for model in zoo.load_models().values() if model.path.is_file()]
    models = [zoo.find(name) for name in names]
    lacking = [model.name for model in models if not model.path.is_file()]
    if lacking:
        raise BenchError(f"not at hand: run python models/zoo.py fetch {' '.join(lacking)}")
    return models


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; bad usage ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="bench/zoo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--passes", default=DEFAULT, metavar="LIST", help=f"default: {DEFAULT}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results with their environment")
    parser.add_argument("--threads", type=int, default=2, help="of every session (default: 2)")
    parser.add_argument("--ep", default="cpu", help="to time and evaluate on, as for 'onnxslim bench' (default: cpu)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of latency measuring for each file (default: 3)")
    parser.add_argument("--samples", type=int, metavar="N", help="at most N samples of calibration and evaluation data")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a process may take (default: 1800)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files that were made (a new folder)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two results")
    options = parser.parse_args(arguments)
    try:
        several = len(eps.parse(options.ep)) > 1
    except OnnxslimError as error:
        parser.error(str(error))
    if several:
        parser.error("--ep: give one execution provider")
    if min(options.threads, options.timeout, options.seconds) <= 0 or (options.samples or 1) < 1:
        parser.error("--threads, --seconds, --samples and --timeout must be positive")
    return options


def run_all(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Run every cell; the results so far are kept after each model."""
    chosen = recipes(options.passes)
    setting = Setting(folder, options.threads, options.seconds, options.timeout, options.samples, options.ep)
    environment = {**doctor.environment(), **{key: getattr(options, key) for key in ("threads", "samples", "ep")}}
    rows: list[Row] = []
    for model in choose(options.names):
        rows += measure(model, chosen, setting)
        if options.json is not None:
            content = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows]}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    return rows


def main(arguments: list[str]) -> int:
    """Carry out the command line; return the exit code."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 240)
    options = parse(arguments)
    try:
        if options.compare:
            (old, first), (new, second) = (load(path) for path in options.compare)
            console.print(*(f"environment: {line}" for line in differing(old, new)), sep="\n")
            console.print(compare(first, second))
            return 0
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            rows = run_all(options, options.keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="onnxslim-bench-") as scratch:
                rows = run_all(options, Path(scratch))
    except (BenchError, ZooError, FileExistsError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    console.print(render(rows))
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
