"""What holds between the parts: the engine names no pass, and only ``onnxslim`` is importable from the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from onnxslim import workers

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "onnxslim").glob("*.py"))
PASSES = sorted((ROOT / "passes").rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: p.name)
def test_the_engine_imports_no_pass(path: Path) -> None:
    assert not [name for name in _imports(path) if name.startswith(("onnxslim.passes", "passes"))]


@pytest.mark.parametrize("path", [*ENGINE, *PASSES], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_runtime_and_its_worker_import_onnxruntime(path: Path) -> None:
    if path.name not in ("runtime.py", "worker.py"):
        assert not [name for name in _imports(path) if name.split(".")[0] == "onnxruntime"]


@pytest.mark.parametrize("path", [*ENGINE, *PASSES], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_of_the_tests_or_tools_is_imported(path: Path) -> None:
    rude = {"tests", "models", "bench", "onnxscript", "torch", "pytest", "hypothesis"}
    assert not {name.split(".")[0] for name in _imports(path)} & rude


def test_a_worker_needs_onnxruntime_and_numpy_only() -> None:
    found = {name.split(".")[0] for file in workers.SOURCES for name in _imports(ROOT / "onnxslim" / file)}
    copied = {Path(file).stem for file in workers.SOURCES}
    assert found - set(sys.stdlib_module_names) - copied == {"numpy", "onnxruntime"}


def test_every_installed_pass_is_named_like_its_file_and_described() -> None:
    for entry in importlib.metadata.entry_points(group="onnxslim.passes"):
        if entry.dist is None or entry.dist.name != "onnxslim":
            continue
        cls = entry.load()
        assert cls.name == entry.name == entry.value.split(":")[0].rpartition(".")[2]
        assert (ROOT / "passes" / f"{cls.name}.py").exists() or (ROOT / "passes" / cls.name / "__init__.py").exists()
        assert cls.__doc__


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent for p in PASSES}
    names = {"onnxslim.passes" + "".join(f".{part}" for part in f.relative_to(ROOT / "passes").parts) for f in folders}
    assert set(declared) == {"onnxslim", *names}


def test_importing_onnxslim_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import onnxslim; dir(onnxslim)\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['onnxslim']\n"


def test_public_names() -> None:
    import onnxslim

    for name in onnxslim.__all__:
        assert getattr(onnxslim, name) is not None
    assert set(onnxslim.__all__) <= set(dir(onnxslim))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        onnxslim.nothing  # noqa: B018
    assert tuple(map(int, onnxslim.__version__.split(".")[:2])) >= (1, 0)


def test_the_wheel_holds_onnxslim_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-c", "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"]
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    done = subprocess.run([*command, str(tmp_path)], cwd=source, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]).namelist()
    assert {name.split("/")[0] for name in names} == {"onnxslim", "onnxslim-1.0.0.dist-info"}
    assert {"onnxslim/py.typed", "onnxslim/cli.py", "onnxslim/worker.py", "onnxslim/passes/__init__.py"} <= set(names)
    assert {f"onnxslim/web/{p.name}" for p in (ROOT / "onnxslim" / "web").iterdir()} <= set(names)
    assert not [name for name in names if name.endswith((".onnx", ".npz"))]


@pytest.mark.parametrize("first", ["onnxslim", "models.zoo"])
def test_onnx_runtime_keeps_no_id_of_this_machine_and_reports_no_model(first: str, tiny: Path, tmp_path: Path) -> None:
    """It neither leaves an id in the home folder nor has a thread that sends, in this process and in workers."""
    code = (
        f"import {first}, onnxslim.bench, onnxslim.eps, numpy, pathlib\n"
        "path = pathlib.Path({!r})\n"
        "x = numpy.zeros((1, 2, 8, 8), numpy.float32)\n"
        "onnxslim.optimize(path, 'simplify', bench=False)\n"
        "onnxslim.bench.measure([path], onnxslim.eps.parse('cpu'), {{1: [{{'x': x}}]}}, seconds=0.1, starts=False)\n"
    ).format(str(tiny))
    # It is silent where tests run on their own, and where the variable that tells it so is inherited.
    unwanted = {"CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    assert not list((tmp_path / "home").rglob("*"))


def test_whoever_wants_onnx_runtime_to_report_can_have_it() -> None:
    code = "import os, onnxslim; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, kept in (("0", "0"), (None, "1")):
        environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        environment |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == kept
