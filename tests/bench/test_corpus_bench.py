"""bench/corpus.py: nodes are counted, differences seen, crashes told; one file is really measured."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

# bench/ and models/ are no installed packages: they are imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import corpus as bench
from bench.corpus import Result, Row
from models import corpus
from models.data import write_npz

ROOT = Path(__file__).resolve().parents[2]


def row(ours: int, *peers: int, problem: str = "") -> Row:
    results = {"ours": Result(nodes=ours, error=0.0, problem=problem)}
    results |= {name: Result(nodes=n, error=0.0) for name, n in zip(bench.PEERS, peers, strict=False)}
    return Row("a.dynamo", 100, results)


def test_nodes_of_subgraphs_are_counted() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        f (bool c, float[2] x) => (float[2] y) {
            one = Constant <value_float: float = 1.0> ()
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Add (x, one) },
                else_branch = e () => (float[2] b) { d = Neg (x) b = Neg (d) }
            >
        }"""
    )
    assert bench.count(model.graph) == 5


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        ([np.float32([3, 4])], 0.0),
        ([np.float32([3, 4.5])], 0.1),
        ([np.float32([3, np.nan])], np.inf),
        ([np.float64([3, 4])], np.inf),
        ([np.float32([[3, 4]])], np.inf),
        ([], np.inf),
    ],
)
def test_difference(got: list[Any], wanted: float) -> None:
    assert bench.difference([np.float32([3, 4])], got) == pytest.approx(wanted)


def test_equal_nan_and_infinities_are_agreement() -> None:
    a = np.float32([np.nan, np.inf, -np.inf, 1])
    assert bench.difference([a], [a.copy()]) == 0
    assert bench.difference([a], [-a]) == np.inf


def test_excess_over_the_better_peer_is_marked() -> None:
    assert "+2 " in " ".join(bench.line(row(12, 10, 40))) and "+3*" in " ".join(bench.line(row(13, 40, 10)))
    text = "\n".join(bench.total([row(13, 40, 10), row(8, 10, 10)], {"x": "no"}))
    assert "best of both per file 20, ours 21 there: 105.0%" in text
    assert "plus 2: 1 a.dynamo" in text and "not exported: 1" in text


def test_a_peer_that_failed_sets_no_mark() -> None:
    failed = row(12, 10, 20)
    failed.results["onnxslim"].problem = "mismatch"
    assert failed.best == 20


def _fail() -> None:
    raise ValueError("broken\nmore")


def test_crash_and_endless_work_are_told() -> None:
    assert bench.isolated(lambda: 5, 10) == (5, "")
    assert bench.isolated(_fail, 10) == (None, "ValueError: broken")
    assert bench.isolated(lambda: os._exit(3), 10) == (None, "exit code 3")
    assert bench.isolated(lambda: time.sleep(60), 0.2) == (None, "no result after 0 s")


def test_program_that_fails_is_told(tmp_path: Path) -> None:
    result = bench.command([sys.executable, "-c", "raise SystemExit('no good')"], tmp_path, 20)
    assert result.problem == "exit code 1: no good" and result.megabytes > 1


def test_one_file_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    entry = corpus.Entry("resnet.dynamo")
    entry.folder.mkdir(parents=True)
    shutil.copy(ROOT / "models" / "fmnist_cnn.onnx", entry.path)
    write_npz(entry.folder / "inputs.npz", {"image": np.random.default_rng(0).random((1, 1, 28, 28), np.float32)})
    assert bench.main(["resnet.dynamo", "--twice", "--json", str(tmp_path / "result.json")]) == 0
    shown = capsys.readouterr().out
    assert "resnet.dynamo" in shown and "ours: 0 crashes and mismatches" in shown
    assert (tmp_path / "result.json").is_file()
    assert bench.main(["vit"]) == 2
