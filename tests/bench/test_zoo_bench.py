"""bench/zoo.py: the table says what was measured and what went wrong; one cell is really run on the committed model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

# bench/ and models/ are no installed packages: they are imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import peers, quantizers, steps, zoo
from bench.table import Row, compare, differing, render, short


def row(**changes: Any) -> Row:
    """A cell that went well."""
    size = {"nodes": 33, "parameters": 438762, "macs": 29931264, "bytes": 1763321}
    milliseconds = {"median": 0.7, "p10": 0.6, "p90": 0.8, "runs": 100}
    good = Row(
        "cnn", "int8", lossless=False, seconds=9.6,
        metric={"top1": (0.9332, 0.931)},
        fidelity={"relative_l2": 9.9e-3, "cosine": 0.9999, "top1": 0.994, "broken": None},
        before=size, after={**size, "bytes": 471000},
        latency={"before": milliseconds, "after": milliseconds, "speedup": 2.48, "interval": [2.4, 2.56]},
    )  # fmt: skip
    return dataclasses.replace(good, **changes)


def text(table: Table) -> str:
    console = Console(width=260)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# The table


def test_table_shows_every_figure() -> None:
    shown = text(render([row(), row(recipe="peer:ort-int8")]))
    for figure in (
        "0.9332 → 0.9310",
        "9.9e-03, 99.4%",
        "1.76M → 471k",
        "439k → 439k",
        "29.9M → 29.9M",
        "33 → 33",
        "2.48x (2.40–2.56)",
    ):
        assert shown.count(figure) == 2, (figure, shown)
    assert [line.split()[0] for line in shown.splitlines() if "x (" in line] == ["cnn", "peer:ort-int8"]


def test_table_names_a_crash_and_goes_on() -> None:
    dead = Row("cnn", "fold", lossless=True, status="killed by SIGSEGV", detail="exit code -11")
    shown = text(render([dead, row()]))
    assert "killed by SIGSEGV: exit code -11" in shown and "2.48x" in shown


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"latency": {**row().latency, "interval": [0.9, 0.99]}}, "slower"),
        ({"after": {**row().before, "bytes": 2_000_000}}, "larger"),
        ({"after": {**row().before, "nodes": 34}, "lossless": True}, "more nodes"),
        ({"fidelity": {**row().fidelity, "broken": "output 'y'"}, "lossless": True}, "not equal: output 'y'"),
    ],
)
def test_findings(changes: dict[str, Any], finding: str) -> None:
    assert row().findings() == []
    assert [finding in found for found in row(**changes).findings()] == [True]


def test_lossy_may_differ_and_grow_in_nodes() -> None:
    changed = row(after={**row().before, "nodes": 62}, fidelity={**row().fidelity, "broken": "output 'y'"})
    assert changed.findings() == []


@pytest.mark.parametrize(
    ("number", "wanted"), [(0, "0"), (33, "33"), (999, "999"), (436554, "437k"), (1763321, "1.76M"), (4.2e9, "4.2G")]
)
def test_short(number: float, wanted: str) -> None:
    assert short(number) == wanted


# Two runs


def test_compare_tells_faster_from_noise_and_new_from_gone() -> None:
    quick = {**row().latency, "speedup": 3.0, "interval": [2.9, 3.1]}
    noisy = {**row().latency, "speedup": 2.5, "interval": [2.3, 2.7]}
    old = [row(), row(recipe="a"), row(recipe="old")]
    new = [row(latency=quick, metric={"top1": (0.9332, 0.92)}), row(recipe="a", latency=noisy), row(recipe="fresh")]
    lines = {line.split()[1]: line for line in text(compare(old, new)).splitlines()[1:]}
    assert "2.48x → 3.00x, faster" in lines["int8"] and "0.9310 → 0.9200" in lines["int8"]
    assert "same within noise" in lines["a"]
    assert lines["old"].split()[-1] == "gone" and lines["fresh"].split()[-1] == "new"


def test_environments_that_differ() -> None:
    assert differing({"cpu": "a", "threads": 2}, {"cpu": "b", "threads": 2}) == ["cpu: a → b"]


# The command line


@pytest.mark.parametrize("text", ["", "nonsense", "int8(colour=3)", "peer:nobody", "int8;;peer:nobody"])
def test_recipes_refuse_what_is_not_there(text: str) -> None:
    with pytest.raises(zoo.BenchError):
        zoo.recipes(text)


def test_recipes_know_what_must_be_lossless() -> None:
    assert zoo.recipes("simplify,fold; int8; peer:ort-int8; peer:onnxsim") == {
        "simplify,fold": True,
        "int8": False,
        "peer:ort-int8": False,
        "peer:onnxsim": True,
    }


@pytest.mark.parametrize(
    "arguments", [["no_such_model"], ["fmnist_cnn", "--passes", "nonsense"], ["--compare", "a", "b"]]
)
def test_bad_usage_is_one_line_and_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("bench: ") and said.err.count("\n") == 1 and not said.out


def test_process_that_dies_is_a_step_error(tmp_path: Path) -> None:
    with pytest.raises(zoo.StepError, match="killed by SIGABRT"):
        zoo.run([sys.executable, "-c", "import os; os.abort()"], tmp_path, 60)
    with pytest.raises(zoo.StepError, match="failed: the last line"):
        zoo.run([sys.executable, "-c", "import sys; sys.exit('first\\nthe last line')"], tmp_path, 60)
    with pytest.raises(zoo.StepError, match="timed out"):
        zoo.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 0.5)


# Peers


def test_a_quantizer_gets_every_sample_on_its_own(
    cnn: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "environment", lambda name, packages: Path(sys.executable))
    source, target = Path(cnn["model"]), tmp_path / "out.onnx"
    command = peers.PEERS["nncf"].command(source, target, Path(cnn["calib"]))
    assert command[1] == "-I" and command[3:6] == ["nncf", str(source), str(target)]
    feeds = quantizers.read(Path(command[6]))
    with np.load(cnn["calib"]) as arrays:
        assert len(feeds) == len(arrays["image"])
        assert all(np.array_equal(feed["image"], arrays["image"][k : k + 1]) for k, feed in enumerate(feeds))
    reader = quantizers.Reader(feeds)
    assert sum(1 for _ in iter(reader.get_next, None)) == len(reader) == len(feeds)
    reader.rewind()
    assert reader.get_next() is feeds[0]


def test_other_providers_are_timed_in_turn_too(cnn: dict[str, str]) -> None:
    model = zoo.zoo.find("fmnist_cnn")
    (found,) = steps.latency(model, [model.path], threads=1, seconds=0.05, ep="cpu(affinity=[0])")
    assert found["before"]["median"] > 0 and found["interval"][0] <= found["speedup"] <= found["interval"][1]
    assert found["after"]["runs"] == found["before"]["runs"]


def test_other_providers_give_the_metric_too(cnn: dict[str, str], tmp_path: Path) -> None:
    model = steps.thin(zoo.zoo.find("fmnist_cnn"), 16, tmp_path)
    there = zoo.zoo.evaluate(model, model.path, 1, steps.runner("cpu(affinity=[0])"))
    assert there == zoo.zoo.evaluate(model, model.path, 1)


@pytest.mark.parametrize("ep", ["tpu", "cpu,openvino"])
def test_one_provider_is_timed(ep: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        zoo.main(["fmnist_cnn", "--ep", ep])
    assert caught.value.code == 2 and "execution provider" in capsys.readouterr().err


# Cells


def test_cells_of_the_committed_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A peer whose program dies stands for everything that can: its row says so, and the others are whole.
    broken = peers.Peer("broken", lossless=True, packages=("none",), program="import os; os.abort()")
    monkeypatch.setitem(peers.PEERS, "broken", broken)
    monkeypatch.setattr(peers, "environment", lambda name, packages: Path(sys.executable))
    file = tmp_path / "result.json"
    options = ["--samples", "8", "--seconds", "0.2", "--keep", str(tmp_path / "kept"), "--json", str(file)]
    code = zoo.main(["fmnist_cnn", "--passes", "simplify; peer:broken; peer:ort-int8", *options])
    assert code == 1
    environment, (ours, dead, stock) = zoo.load(file)
    assert environment["threads"] == 2 and environment["cpu"] and environment["versions"]["onnxruntime"]
    assert (ours.status, dead.status, stock.status) == ("ok", "killed by SIGABRT", "ok")
    assert not dead.after and not dead.latency
    assert ours.metric["top1"][0] == ours.metric["top1"][1] == stock.metric["top1"][0] >= 0.75
    assert ours.fidelity["relative_l2"] < 1e-5 < stock.fidelity["relative_l2"] < 0.1
    assert ours.fidelity["broken"] is None and ours.passes and "--passes simplify" in ours.command
    assert ours.before == stock.before and stock.after["bytes"] < 0.5 * stock.before["bytes"]
    assert ours.latency["interval"][0] <= ours.latency["speedup"] <= ours.latency["interval"][1]
    assert len(json.loads(file.read_text())["rows"]) == 3
    assert (tmp_path / "kept" / "fmnist_cnn" / "2" / "fmnist_cnn.onnx").is_file()
    capsys.readouterr()
    assert zoo.main(["--compare", str(file), str(file)]) == 0
    assert capsys.readouterr().out.count("same within noise") == 2
