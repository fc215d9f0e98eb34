"""What bench/zoo.py measures, each in a process of its own so that a crash costs one cell and not the run.

python -m bench.steps quality REQUEST.json ANSWER.json      metric, fidelity and size of a file made of a model
python -m bench.steps latency REQUEST.json ANSWER.json      latencies of several files, measured in turn
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models import zoo
from models.data import Sample, write_npz
from onnxslim import bench, cost, eps, runtime, verify, workers
from onnxslim import model as model_io
from onnxslim.data import Data, input_specs, open_data

# Samples that fidelity and latency are measured on, spread evenly over the data.
COMPARED, TIMED = 64, 8


def thin(model: zoo.Model, most: int, folder: Path) -> zoo.Model:
    """``model`` with at most ``most`` samples of calibration and of evaluation data, copied to ``folder``."""
    return dataclasses.replace(
        model,
        calibration=str(_thin(model.folder / model.calibration, most, folder / "calibration")),
        evaluation=str(_thin(model.folder / model.evaluation, most, folder / "evaluation")),
    )


def _thin(source: Path, most: int, target: Path) -> Path:
    if source.is_dir():
        files = sorted(source.glob("*.npz"))
        target.mkdir(parents=True)
        for k in _spread(len(files), most):
            shutil.copy(files[k], target)
        return target
    with np.load(source, allow_pickle=False) as arrays:
        whole = dict(arrays)
    chosen = _spread(len(next(iter(whole.values()))), most)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_npz(target.with_suffix(".npz"), {name: array[chosen] for name, array in whole.items()})
    return target.with_suffix(".npz")


def _spread(count: int, most: int) -> list[int]:
    return [int(k) for k in np.linspace(0, count - 1, min(count, most)).round()]


def samples(model: zoo.Model) -> tuple[Data, Data]:
    """Calibration and evaluation data of a model."""
    specs = input_specs(model_io.load(model.path))
    return (
        open_data(model.folder / model.calibration, specs),
        open_data(model.folder / model.evaluation, specs, what="evaluation"),
    )


def runner(ep: str) -> zoo.Runner:
    """What runs a file on samples: this process for ``cpu``, else a worker in the interpreter that has ``ep``."""
    if ep == "cpu":
        return zoo.run_here

    def run(path: Path, samples: list[Sample], threads: int) -> zoo.Outputs:
        with workers.folder() as folder, workers.start(eps.parse(ep)[0], folder) as process:
            feeds = workers.write_feeds(samples, folder, "sample")
            out = folder / "out.npz"
            names = process.ask("run", path=str(path), ep=process.request, feeds=feeds, threads=threads, out=str(out))
            with np.load(out) as arrays:
                for k in range(len(samples)):
                    yield {name: arrays[f"{k}:{name}"] for name in names}

    return run


def quality(model: zoo.Model, file: Path, threads: int, ep: str = "cpu") -> dict[str, Any]:
    """The metrics of ``file`` on ``ep``, its worst output against the original's on the CPU, and its sizes."""
    calibration, evaluation = samples(model)
    loaded = model_io.load(file)
    counted = cost.analyze(loaded, calibration.feed(calibration[0]))
    original = runtime.load(model.path, threads=threads)
    measured, _ = verify.measure(
        verify.Reference(original, evaluation.spread(COMPARED)), runtime.load(file, threads=threads)
    )
    agreements = [o.top1_agreement for o in measured.outputs if o.top1_agreement is not None]
    return {
        "metric": zoo.evaluate(model, file, threads, runner(ep)),
        "fidelity": {
            "relative_l2": measured.relative_l2,
            "cosine": min((o.cosine for o in measured.outputs), default=1.0),
            "top1": min(agreements, default=None),
            "broken": measured.broken(
                lambda: verify.measure(
                    verify.Reference(original, evaluation.spread(COMPARED)),
                    runtime.load(model.path, threads=threads, optimize=False),
                )[0]
            ),
        },
        "size": {
            "nodes": int(loaded.meta.get(model_io.NODES, counted.nodes)),
            "parameters": counted.parameters,
            "macs": counted.macs,
            "bytes": model_io.size(file, loaded),
        },
    }


def latency(model: zoo.Model, files: list[Path], threads: int, seconds: float, ep: str = "cpu") -> list[dict[str, Any]]:
    """For each file: milliseconds, and its speed over the original, all measured in turn on calibration samples.

    Calibration samples are single inputs, while the evaluation data of some models is one large batch. On another
    provider than ``cpu`` sessions run in the interpreter that has it.
    """
    feeds = list(samples(model)[0].spread(TIMED).feeds())
    seconds *= len(files) + 1
    if ep != "cpu":
        found = bench.measure(
            [model.path, *files], eps.parse(ep), {1: feeds}, threads=[threads], seconds=seconds, starts=False
        )
        first, *rows = found["bench"]
        return [
            {"before": first["latency_ms"], "after": row["latency_ms"]} | {k: row[k] for k in ("speedup", "interval")}
            for row in rows
        ]
    compared = runtime.compare_models([model.path, *files], feeds, threads=threads, seconds=seconds)
    return [
        {
            "before": dataclasses.asdict(compared.latency[0]),
            "after": dataclasses.asdict(compared.latency[k]),
            "speedup": compared.speedup[k],
            "interval": list(compared.interval[k]),
        }
        for k in range(1, len(files) + 1)
    ]


def answer(what: str, request: Mapping[str, Any]) -> Any:
    """Carry out one request: the arguments of the function called ``what``, in the types of JSON."""
    model = zoo.Model(**request["model"])
    if what == "quality":
        return quality(model, Path(request["file"]), request["threads"], request["ep"])
    files = [Path(f) for f in request["files"]]
    return latency(model, files, request["threads"], request["seconds"], request["ep"])


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(answer(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
