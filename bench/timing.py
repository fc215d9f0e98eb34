"""Does `onnxslim bench` tell the truth? A file against itself, and against one that is known to be 10 % slower.

python bench/timing.py                      one and two threads, the other core idle and busy, 100 runs each
python bench/timing.py fmnist_cnn --runs 20 --threads 1 --json f.json       a model of models/zoo.py

Every run is what `onnxslim bench` does, of three files: ten copies of a network in one graph, the same file again, and
eleven copies. The work of the third is 1.10 times that of the first whatever a copy costs, so that nothing has to be
known about kernels. Each copy reads the input times a constant of its own, else the runtime would merge them. Counted
is how often the interval of the second contains 1.00 (wanted: 95 of 100), and how often the third is called slower
(wanted: 90 of 100).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import zoo
from onnxslim import bench, doctor, eps
from onnxslim import model as model_io
from onnxslim.data import synthetic

COPIES = 10
SMALL = "small"
_SPIN = "while True: pass"


@dataclasses.dataclass
class Row:
    """One model in one condition: of ``runs``, how often the file was the same as itself, and the other one slower."""

    model: str
    threads: int
    other_core: str
    runs: int = 0
    same: int = 0
    slower: int = 0
    half_widths: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)
    disturbed: list[float] = dataclasses.field(default_factory=list)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count one run: the rows of the file, of itself, and of the slower one."""
        _, again, worse = rows
        low, high = again["interval"]
        self.runs += 1
        self.same += low <= 1 <= high
        self.slower += worse["verdict"] == "slower"
        self.half_widths.append((high - low) / 2)
        self.ratios.append(1 / worse["speedup"])
        self.disturbed.append(max(again["disturbed"], again["waited"]))

    def text(self) -> str:
        """The row of the table."""
        return (
            f"{self.model:20} {self.threads:7} {self.other_core:5} {self.runs:5} {self.same:10} {self.slower:12} "
            f"{np.median(self.half_widths):12.3f} {np.median(self.ratios):8.3f} {np.median(self.disturbed):10.1%}"
        )


def small() -> onnx.ModelProto:
    """A network of a few hundredths of a millisecond: two convolutions of 16 channels, mean, and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "image"
    for k in range(2):
        shape = (16, 16 if k else 3, 3, 3)
        weights.append(numpy_helper.from_array(0.1 * rng.standard_normal(shape, np.float32), f"w{k}"))
        nodes.append(helper.make_node("Conv", [last, f"w{k}"], [f"c{k}"], name=f"conv{k}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"], name=f"relu{k}"))
        last = f"r{k}"
    weights.append(numpy_helper.from_array(rng.standard_normal((16, 10), np.float32), "w"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w"], ["scores"], name="gemm"),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 24, 24])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [1, 10])
    graph = helper.make_graph(nodes, "small", [image], [scores], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def copies(path: Path, count: int) -> onnx.ModelProto:
    """``count`` copies of the network in one graph, each on the input times a constant of its own; outputs of each.

    Raises:
        ValueError: the first input is not of floats.
    """
    model = onnx.load(path)
    graph = model.graph
    first = next(i for i in graph.input if i.name not in {w.name for w in graph.initializer})
    if first.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise ValueError(f"{path}: the first input is not of floats")
    kept = {i.name for i in graph.input} | {w.name for w in graph.initializer} | {""}
    nodes, outputs, scales = [], [], []
    for k in range(count):
        scales.append(numpy_helper.from_array(np.float32(1 + k / 1024), f"scale_{k}"))
        nodes.append(helper.make_node("Mul", [first.name, f"scale_{k}"], [f"input_{k}"], name=f"scale_{k}"))

        def renamed(name: str, k: int = k) -> str:
            return f"input_{k}" if name == first.name else name if name in kept else f"{name}_{k}"

        for node in graph.node:
            clone = onnx.NodeProto.FromString(node.SerializeToString())
            clone.name = f"{node.name}_{k}"
            clone.input[:] = [renamed(name) for name in node.input]
            clone.output[:] = [renamed(name) for name in node.output]
            nodes.append(clone)
        for output in graph.output:
            clone_output = onnx.ValueInfoProto.FromString(output.SerializeToString())
            clone_output.name = renamed(output.name)
            outputs.append(clone_output)
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    graph.initializer.extend(scales)
    return model


@contextlib.contextmanager
def busy(yes: bool) -> Iterator[None]:
    """With ``yes`` another process spins on one core meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", _SPIN]) if yes else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def check(name: str, path: Path, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each condition of one model; stderr has it after every run, so that nothing is lost on the way."""
    files = [folder / f"{name}-{count}.onnx" for count in (COPIES, COPIES, COPIES + 1)]
    for file, count in zip(files, (COPIES, COPIES, COPIES + 1), strict=True):
        onnx.save(copies(path, count), file)
    feeds = list(synthetic(model_io.load(path), 4, seed=0).feeds())
    for threads, condition in itertools.product(options.threads, options.other):
        row = Row(name, threads, condition)
        with busy(condition == "busy"):
            for k in range(options.runs):
                found = bench.measure(
                    files,
                    eps.parse("cpu"),
                    {1: feeds},
                    threads=[threads],
                    seconds=options.seconds,
                    seed=k,
                    starts=False,
                )
                row.add(found["bench"])
                print(row.text(), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        yield row


def main(arguments: list[str]) -> int:
    """Carry out the command line; 1 when the interval does not hold what it promises."""
    parser = argparse.ArgumentParser(
        prog="bench/timing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[SMALL], metavar="NAME", help=f"default: {SMALL}, made here")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring in each run (default: 0.5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="of every session")
    parser.add_argument(
        "--other", nargs="+", choices=("idle", "busy"), default=["idle", "busy"], help="core: its state"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result with its environment")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    print(f"{'model':20} threads other  runs  same as 1  called slower  half width  slower by  disturbed")
    with tempfile.TemporaryDirectory(prefix="onnxslim-timing-") as folder:
        for name in options.names:
            path = Path(folder) / "model.onnx" if name == SMALL else zoo.find(name).path
            if name == SMALL:
                onnx.save(small(), path)
            if not path.is_file():
                print(f"not at hand: run python models/zoo.py fetch {name}", file=sys.stderr)
                return 2
            for row in check(name, path, Path(folder), options):
                print(row.text(), flush=True)
                rows.append(row)
                if options.json is not None:
                    content = {"environment": doctor.environment(), "rows": [dataclasses.asdict(r) for r in rows]}
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(row.same < 0.95 * row.runs or row.slower < 0.9 * row.runs for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
