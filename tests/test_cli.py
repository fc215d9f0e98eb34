"""The command line: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim import cli, console, runtime
from onnxslim.contract import Context, Effect, Outcome, Pass

Maker = Callable[..., dict[str, np.ndarray]]
X = np.random.default_rng(9).standard_normal((3, 2, 8, 8)).astype(np.float32)


class Run:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.err = ""

    def __call__(self, *args: Any, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in args])
        out, self.err = self.capsys.readouterr()
        assert int(caught.value.code or 0) == code, self.err
        return out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    console.out.cache_clear()
    return Run(capsys)


def _answer(path: Any) -> np.ndarray:
    return runtime.load(str(path))({"x": X})["y"]


def test_default_command(run: Run, tiny: Path, tmp_path: Path, passes: dict[str, Any]) -> None:
    text = run(tiny, "out.onnx", "--passes", "keep", "--no-bench")
    assert "parameters" in text
    assert "synthetic inputs" in text
    assert run.err == ""
    assert np.allclose(_answer(tmp_path / "out.onnx"), _answer(tiny), atol=1e-6)


def test_options_may_come_first(run: Run, tiny: Path, tmp_path: Path, passes: dict[str, Any]) -> None:
    run("--no-bench", "--passes", "keep", tiny, "out.onnx")
    assert (tmp_path / "out.onnx").exists()


def test_json_alone_goes_to_stdout(run: Run, tiny: Path, passes: dict[str, Any]) -> None:
    report = json.loads(run(tiny, "out.onnx", "--passes", "keep", "--no-bench", "--json"))
    assert report["passes"][0]["name"] == "keep"
    assert report["after"]["bytes"] == Path("out.onnx").stat().st_size


def test_json_to_a_file_leaves_the_table(run: Run, tiny: Path, passes: dict[str, Any]) -> None:
    text = run(tiny, "out.onnx", "--passes", "keep", "--no-bench", "--json", "report.json")
    assert "parameters" in text
    assert json.loads(Path("report.json").read_text())["environment"]["pipeline"] == "keep"


def test_latency_is_measured_by_default(run: Run, tiny: Path, passes: dict[str, Any], monkeypatch: Any) -> None:
    counted = []
    original = runtime.compare_models
    monkeypatch.setattr(
        runtime, "compare_models", lambda *a, **k: counted.append(1) or original(*a, **{**k, "seconds": 0.05})
    )
    assert "ms on cpu" in run(tiny, "out.onnx", "--passes", "keep", "--threads", "1")
    assert counted


def test_a_missed_budget_is_1_and_the_best_is_written(
    run: Run, tiny: Path, tmp_path: Path, samples: Maker, passes: dict[str, Any]
) -> None:
    arrays = samples(20)
    np.savez("calib.npz", x=arrays["x"])
    np.savez("eval.npz", x=arrays["x"], labels=runtime.load(tiny)({"x": arrays["x"]})["y"].argmax(1))
    command = [tiny, "out.onnx", "--calib", "calib.npz", "--eval", "eval.npz", "--metric", "top1", "--no-bench"]
    run(*command, "--passes", "scale(by=-3)", "--max-drop", "1%", code=1)
    assert run.err.startswith("onnxslim: BUDGET MISSED: top1 drops by")
    assert np.allclose(_answer("out.onnx"), _answer(tiny), atol=1e-6)
    run(*command, "--passes", "scale(by=-3)", "--max-drop", "1.0")
    assert not np.allclose(_answer("out.onnx"), _answer(tiny), atol=1e-2)


def test_a_broken_promise_is_1(run: Run, tiny: Path, passes: dict[str, Any]) -> None:
    run(tiny, "out.onnx", "--passes", "lie", "--no-bench", code=1)
    assert "CHECK FAILED" in run.err


def test_a_crash_in_a_pass_is_123_with_a_reproduction(
    run: Run, tiny: Path, tmp_path: Path, passes: dict[str, Any]
) -> None:
    run(tiny, "out.onnx", "--passes", "crash", "--no-bench", code=123)
    assert run.err.startswith("onnxslim: INTERNAL ERROR: crash crashed (ZeroDivisionError: on purpose)")
    assert str(tmp_path / "repro") in run.err
    assert sorted(p.name for p in (tmp_path / "repro").iterdir()) == ["error.txt", "model.onnx", "pipeline.txt"]
    assert np.allclose(_answer("out.onnx"), _answer(tiny), atol=1e-6)


def test_a_crash_elsewhere_is_123_with_a_reproduction(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxslim import cost

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(cost, "analyze", broken)
    assert run("inspect", tiny, code=123) == ""
    assert "internal error: ZeroDivisionError: on purpose" in run.err
    assert str(tmp_path / "repro") in run.err
    assert (tmp_path / "repro" / "command.txt").read_text() == f"onnxslim inspect {tiny}\n"
    assert "test_cli.py" in (tmp_path / "repro" / "error.txt").read_text()


def test_inspect(run: Run, tiny: Path) -> None:
    facts = json.loads(run("inspect", tiny, "--json", "--shape", "x=2,2,8,8"))
    assert (facts["nodes"], facts["parameters"]) == (5, 72 + 4 + 12 + 3)
    assert facts["macs"] == 2 * (8 * 8 * 72 + 12)
    assert facts["bytes"] == tiny.stat().st_size
    assert facts["inputs"] == [{"name": "x", "type": "FLOAT", "shape": ["n", 2, 8, 8]}]
    text = run("inspect", tiny)
    assert "Conv" in text
    assert "gemm" in run("inspect", tiny, "--nodes")


def test_inspect_as_csv_and_markdown(run: Run, tiny: Path) -> None:
    lines = run("inspect", tiny, "--nodes", "--csv").splitlines()
    assert lines[0] == "node,operator,output,parameters,MACs,share,bytes"
    assert [line.split(",")[0] for line in lines[1:3]] == ["conv", "gemm"], "the dearest first"
    assert run("inspect", tiny, "--markdown").count("\n| Conv | 1 |") == 1
    assert "### groups" in run("inspect", tiny, "--prunable", "--markdown")
    facts = json.loads(run("inspect", tiny, "--json"))
    # Conv: input and output at once, (2 + 4) x 8 x 8 floats; then Relu: two of its outputs.
    assert facts["activation_bytes"] == 2 * 4 * 8 * 8 * 4
    assert facts["types"] == {"float": {"tensors": 4, "elements": 91, "bytes": 364}}


def test_inspect_counts_integer_kernels(run: Run, tiny: Path) -> None:
    facts = json.loads(run("inspect", tiny, "--json", "--ep", "cpu"))["integer"]
    assert (facts["layers"], facts["integer_layers"]) == (2, 0)
    assert {row["node"] for row in facts["not_integer"]} == {"conv", "gemm"}
    text = run("inspect", tiny, "--ep", "cpu")
    assert "0 of 2 products and 0.0% of their MACs run on integers" in text
    assert "not stored as integers" in text
    run("inspect", tiny, "--ep", "openvino", code=2)


def test_too_few_integer_kernels_are_1_and_the_result_is_written(
    run: Run, tiny: Path, tmp_path: Path, passes: dict[str, Any]
) -> None:
    out = tmp_path / "out.onnx"
    facts = json.loads(run(tiny, out, "--passes", "keep", "--no-bench", "--require-int8", "95%", "--json", code=1))
    assert out.exists()
    assert "0.0% of the MACs run on integers, 95.0% are required" in run_line(facts)
    assert facts["integer"]["integer_macs_fraction"] == 0
    run(tiny, out, "--passes", "keep", "--no-bench", "--require-int8", "0%")
    out.unlink()
    run(tiny, out, "--passes", "keep", "--no-bench", "--require-int8", "most", code=2)
    assert not out.exists()


def run_line(facts: dict[str, Any]) -> str:
    return next(line for line in facts["warnings"] if line.startswith("TOO FEW"))


def test_compare(run: Run, tiny: Path, samples: Maker) -> None:
    assert "0.0e+00" in run("compare", tiny, tiny)
    worse = onnx.load(tiny)
    weight = worse.graph.initializer[0]
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.05)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(worse, "worse.onnx")
    np.savez("data.npz", **samples(6))
    facts = json.loads(run("compare", tiny, "worse.onnx", "--data", "data.npz", "--metric", "top1", "--json"))
    assert 0 < facts["fidelity"]["relative_l2"] < 0.2
    assert facts["fidelity"]["samples"] == 6
    assert set(facts["metric"]) == {"name", "original", "other"}
    run("compare", tiny, "worse.onnx", "--max-error", "0.5")
    run("compare", tiny, "worse.onnx", "--max-error", "1e-4", code=1)
    array[:] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(worse, "nan.onnx")
    run("compare", tiny, "nan.onnx", code=1)
    assert "NaN" in run.err


def test_compare_by_layer(run: Run, tiny: Path) -> None:
    facts = json.loads(run("compare", tiny, tiny, "--layers", "--json"))
    assert [row["layer"] for row in facts["layers"]] == ["conv", "gemm"]
    assert all(row["error"] < 1e-6 for row in facts["layers"])
    assert "added here" in run("compare", tiny, tiny, "--layers")


def test_bench(run: Run, tiny: Path) -> None:
    Path("copy.onnx").write_bytes(tiny.read_bytes())
    text = run(
        "bench",
        tiny,
        "copy.onnx",
        "--seconds",
        "0.2",
        "--threads",
        "1",
        "--profile",
        "--json",
        "b.json",
        "--csv",
        "b.csv",
    )
    assert "copy.onnx" in text and "peak MB" in text and "Gemm" in text
    facts = json.loads(Path("b.json").read_text())
    first, second = facts["bench"]
    assert first["speedup"] == 1
    assert second["interval"][0] <= second["speedup"] <= second["interval"][1]
    assert second["verdict"] in ("faster", "slower", "same within noise")
    assert min(second["cold"][k] for k in ("load_ms", "first_ms", "peak_bytes")) > 0
    assert sum(second["placement"]["nodes"]["CPUExecutionProvider"].values()) >= 3
    assert Path("b.csv").read_text().startswith("latency\n")
    compared = json.loads(run("bench", "compare", "b.json", "b.json", "--json"))
    assert [row["change"] for row in compared["rows"]] == ["same within noise"] * 2
    run("bench", "compare", "b.json", code=2)
    run("bench", "compare", "b.json", tiny, code=2)
    assert "is no result" in run.err


def test_bench_goes_on_without_a_provider_that_is_missing(run: Run, tiny: Path) -> None:
    if runtime.available("cuda"):
        pytest.skip("this onnxruntime has CUDA")
    text = run("bench", tiny, "--ep", "cpu,cuda", "--seconds", "0.1", "--markdown", "--threads", "1,2", code=1)
    assert text.count(f"| {tiny} | cpu | 1 |") == 2  # latency and start
    assert run.err.count("onnxslim doctor --setup cuda") == 1
    run("bench", tiny, "--ep", "cuda", code=2)
    assert "onnxslim doctor --setup cuda" in run.err


@pytest.mark.parametrize(
    "options", [["--ep", "tpu"], ["--ep", "cpu(colour=1)"], ["--threads", "x"], ["--batch", "0"], ["--json", "--csv"]]
)
def test_bad_usage_of_bench(run: Run, tiny: Path, options: list[str]) -> None:
    run("bench", tiny, "--seconds", "0.1", *options, code=2)
    assert run.err.startswith("onnxslim: ")


def test_report_as_a_page(run: Run, tiny: Path, passes: dict[str, Any]) -> None:
    run(
        tiny, "out.onnx", "--passes", "keep", "--no-bench", "--bench-ep", "cpu(affinity=[0])", "--report", "r.html",
        "--threads", "1",
    )  # fmt: skip
    page = Path("r.html").read_text()
    for part in ("tiny.onnx → out.onnx", "<h2>Layers</h2>", "cpu(affinity=[0])", "Where this was measured"):
        assert part in page
    run(tiny, "out.onnx", "--report", "out.onnx", code=2)
    run(tiny, "out.onnx", "--bench-ep", "tpu", code=2)


@pytest.mark.parametrize("eps", ["cpu,cuda", "cuda"])
def test_a_provider_that_is_missing_costs_neither_the_result_nor_the_report(
    run: Run, tiny: Path, passes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, eps: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny.parent / "nothing prepared"))
    report = json.loads(
        run(tiny, "out.onnx", "--passes", "keep", "--bench-ep", eps, "--report", "r.html", "--json", code=1)
    )
    assert "doctor --setup cuda" in run.err and "doctor --setup cuda" in Path("r.html").read_text()
    assert any("doctor --setup cuda" in line for line in report["warnings"])
    (entry,) = report["bench"]  # measured once more, "cpu" is not there twice
    assert entry["ep"] == "cpu" and ("cold" in entry) == (eps != "cuda")
    assert Path("out.onnx").exists()


def test_passes(run: Run, passes: dict[str, Any]) -> None:
    text = run("passes")
    assert "keep" in text
    assert "Leaves everything as it is." in text
    page = run("passes", "keep")
    for part in ("The second paragraph.", "promise: exact", "a list of str", "float or none", "false"):
        assert part in page
    assert "runs before it: keep" in run("passes", "scale")


def test_installed_passes_have_a_page(run: Run) -> None:
    listed = run("passes")
    for name in ("fold", "int8", "prune", "simplify"):
        assert name in listed
        assert "promise: " in run("passes", name)


def test_doctor(run: Run) -> None:
    facts = json.loads(run("doctor", "--json"))
    assert facts["providers"]["cpu"] == "runs"
    assert {"onnxslim", "onnx", "onnxruntime"} <= set(facts["versions"])
    assert "instruction sets" in run("doctor")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_default_command_and_the_others(run: Run, flag: str) -> None:
    text = run(flag)
    for part in ("IN OUT [OPTIONS]", "--passes", "--calib", "--max-drop", "--json", "inspect", "doctor", "--version"):
        assert part in text
    assert "--help" in run("bench", flag)


def test_version(run: Run) -> None:
    import onnxslim

    assert run("--version") == f"onnxslim {onnxslim.__version__}\n"


def _python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **options)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from onnxslim.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" + (
        "print([m for m in ('numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'scipy') if m in sys.modules])"
    )
    assert _python("-c", code).stdout.splitlines()[-1] == "[]"


def test_symbolic_arithmetic_is_imported_when_it_is_needed(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from onnxslim.cli import main\n"
        "try: main([sys.argv[1], sys.argv[2], '--no-bench'])\nexcept SystemExit as end: assert not end.code\n"
        "print('sympy.core' in sys.modules)\n"
        "import onnx_ir as ir\nprint((ir.SymbolicDim('n') + 1).value, 'sympy.core' in sys.modules)"
    )
    done = _python("-c", code, str(tiny), str(tmp_path / "out.onnx"))
    assert done.stdout.splitlines()[-2:] == ["False", "n + 1 True"], done.stderr


def test_help_is_quick() -> None:
    """In processor seconds, which other processes do not add to."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _python("-m", "onnxslim", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_module_and_pipes(tiny: Path, tmp_path: Path) -> None:
    done = _python("-m", "onnxslim", "inspect", str(tiny), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    shell = f"'{sys.executable}' -m onnxslim inspect '{tiny}' --nodes | head -n 1"
    piped = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, text=True, check=False)
    assert piped.stderr == ""


def test_no_color(tiny: Path) -> None:
    model = onnx.load(tiny)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w2", onnx.TensorProto.FLOAT, [4, 3]))
    onnx.save(model, tiny)  # its warning is yellow
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    for wish, coloured in (({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({}, False)):
        shown = _python("-m", "onnxslim", "inspect", str(tiny), env={**environment, **wish}).stdout
        assert "could be overridden" in shown
        assert ("\x1b[33m" in shown) == coloured


@dataclasses.dataclass(frozen=True)
class Sleep(Pass):
    """Waits to be interrupted."""

    name: ClassVar[str] = "sleep"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return Outcome()


def test_an_interrupt_is_130_and_writes_nothing(
    run: Run, tiny: Path, tmp_path: Path, passes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(passes, "sleep", Sleep)
    # A shell starts what runs in the background with interrupts ignored, and Python then leaves them so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(tiny, "out.onnx", "--passes", "sleep", "--no-bench", code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in run.err
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "repro").exists()


def test_bars_yield_everything_and_draw_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    assert list(console.Bars().track(range(5), total=5, label="x")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = console.Bars()
    assert [list(bars.track(range(3), label="inner")) for _ in bars.track(range(2), total=2, label="x")] == [
        [0, 1, 2],
        [0, 1, 2],
    ]
    out, err = capsys.readouterr()
    assert out == ""
    assert "x" in err
    assert "inner" in err
