"""What docs/ and examples/ print works: commands are understood, links lead somewhere, pages are the docstrings."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

import onnxslim
from onnxslim import api, bench, cli, config, eps

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
X = {"x": np.zeros((1, 2, 8, 8), np.float32)}
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]


def _blocks(path: Path, kind: str) -> list[str]:
    # All in one go: what closes a block would begin one without a kind.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_of_passes_are_what_their_docstrings_say() -> None:
    wanted = _script("generate").pages()
    hint = "run python docs/generate.py"
    assert {p for p in DOCS if p.parent.name == "passes"} == set(wanted), hint
    for path, text in wanted.items():
        assert path.read_text(encoding="utf-8") == text, hint
    unexplained = [line for text in wanted.values() for line in text.splitlines() if line.endswith("|  |")]
    assert not unexplained, "every option is explained in the docstring"


@pytest.mark.filterwarnings("error")
def test_the_reference_shows_every_public_name_and_each_has_a_docstring(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    reference = _script("reference")
    assert reference.main([str(tmp_path)]) == 0
    shown = set()
    for name in reference.MODULES:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
        for member in pdoc.doc.Module.from_name(name).members.values():
            if f'id="{member.qualname}"' in page:
                shown.add(member.fullname)
            inner = member.members.values() if member.kind == "class" else ()
            public = [m for m in (member, *inner) if m.kind != "variable" and not m.name.startswith("_")]
            assert not [m.fullname for m in public if not m.docstring]
    assert {f"onnxslim.{name}" for name in onnxslim.__all__} <= shown
    assert reference.main([]) == 2


def _anchors(page: Path) -> set[str]:
    """What links may name behind ``#``: headings as GitHub turns them into names."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in _anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_code_block_is_of_a_kind_that_a_test_runs(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2])
    # Python is run by test_readme.py, and the recipe below.
    run = {
        "sh",
        "",
        *({"python"} if page.parent == ROOT else ()),
        *({"toml"} if page.name == "recipes.md" else ()),
    }
    assert set(fences[::2]) <= run
    lines = [line for kind in ("sh", "") for block in _blocks(page, kind) for line in block.splitlines()]
    begin = ("pip install . && onnxslim ", 'pip install -e ".[test]" && pytest')  # run by .ci/run
    assert not [line for line in lines if not line.startswith(("onnxslim ", *begin))]
    for script in re.findall(r"python ([\w/]+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), script


def _commands() -> list[str]:
    lines = [
        line for page in PAGES for kind in ("sh", "") for block in _blocks(page, kind) for line in block.splitlines()
    ]
    lines.append(yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text())["repos"][0]["hooks"][0]["entry"])
    return list(dict.fromkeys(line.partition(" #")[0].strip() for line in lines if line.startswith("onnxslim")))


@pytest.fixture
def desk(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name, where commands take as little time as they can."""
    for name in ("in", "a", "b", "float", "int8"):
        shutil.copy(tiny, tmp_path / f"{name}.onnx")
    x = np.random.default_rng(0).standard_normal((16, 2, 8, 8)).astype(np.float32)
    for name in ("calib", "data", "samples"):
        np.savez(tmp_path / f"{name}.npz", x=x)
    np.savez(tmp_path / "test.npz", x=x, labels=np.arange(16) % 3)
    for folder in (tmp_path, tmp_path / "path" / "to"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, folder / "net.onnx")
        (folder / "onnxslim.toml").write_text('no-bench = true\n[[model]]\nin = "net.onnx"\nout = "net.slim.onnx"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(eps, "prepare", lambda name: tmp_path / name)
    monkeypatch.setattr(api, "_BENCH_LOSSY", 0.1)
    monkeypatch.setattr(api, "_BENCH_LOSSLESS", 0.1)
    return tmp_path


@pytest.mark.parametrize("line", _commands())
def test_commands_run(line: str, desk: Path) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "bench":
        files = [desk / "a.onnx", desk / "b.onnx"]
        facts = bench.measure(files, eps.parse("cpu"), {1: [X]}, seconds=0.05, starts=False)
        for name in ("old", "new"):
            (desk / f"{name}.json").write_text(json.dumps(facts))
        words += ["--seconds", "0.1"] if words[1] != "compare" else []
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    # A budget may be missed, and a provider be missing.
    missable = {"--max-drop", "--ep", "--bench-ep"} & set(words) and words[0] != "inspect"
    assert caught.value.code in ((0, 1) if missable else (0,))
    for name in ("out.onnx", "report.html"):
        assert (desk / name).exists() or name not in words


def test_the_workflow_is_a_gate(desk: Path, cnn: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps run in order as a runner would run them, but for installing, which `pip` stands in for."""
    steps = yaml.safe_load((EXAMPLES / "github-action.yml").read_text())["jobs"]["slim"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    install, gate, recipe = (step["run"] for step in steps if "run" in step)
    assert install == "pip install ./onnxslim" and recipe == "onnxslim run"
    for target, source in (("model.onnx", "model"), ("calib.npz", "calib"), ("eval.npz", "eval")):
        if target.endswith(".npz"):  # a few samples do
            with np.load(cnn[source]) as arrays:
                np.savez(desk / target, **{key: array[:32] for key, array in arrays.items()})
        else:
            shutil.copy(cnn[source], desk / target)
    (desk / "bin").mkdir()
    (desk / "bin" / "onnxslim").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnxslim "$@"\n')
    (desk / "bin" / "pip").write_text(f'#!/bin/sh\necho "$@" >> "{desk}/pip.log"\n')
    for path in (desk / "bin").iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def run(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-e", "-c", text], cwd=desk, capture_output=True, text=True)

    for text in (install, gate, recipe):
        done = run(text)
        assert done.returncode == 0, done.stderr
    assert (desk / "pip.log").read_text() == "install ./onnxslim\n"
    assert (desk / "model.slim.onnx").exists() and (desk / "model.html").exists()
    assert "--max-drop" in gate and "--require-int8" in gate
    done = run(re.sub(r"--passes \S+", "--passes fold", gate))
    assert done.returncode == 1 and "TOO FEW INTEGER KERNELS" in done.stderr


def _dockerfile() -> list[tuple[str, str]]:
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line and not line.startswith("#")]


def test_the_dockerfile_says_what_an_image_needs() -> None:
    found = _dockerfile()
    assert {word for word, _ in found} == {"FROM", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert found[0][0] == "FROM" and " AS build" in found[0][1]
    assert [text.split()[0] for word, text in found if word == "COPY"] == [".", "--from=build"]
    entry = json.loads(dict(found)["ENTRYPOINT"])
    assert entry == ["onnxslim"]
    user = dict(found)["USER"]
    assert any(word == "RUN" and text.startswith("useradd") and text.endswith(user) for word, text in found)


class _Image:
    """What a stage of a Dockerfile has, in a folder that stands for its root, with an environment for its Python."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "etc").mkdir(parents=True)
        for name in ("passwd", "group", "shadow"):
            (root / "etc" / name).touch()
        subprocess.run([sys.executable, "-m", "venv", str(root / "usr")], check=True)

    def at(self, path: str) -> Path:
        """The place of an absolute path of the image."""
        return self.root / path.lstrip("/")

    def run(self, words: str | list[str], folder: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run what a shell or ENTRYPOINT and CMD say: absolute paths are those of the image."""
        path = f"{self.at('/usr/bin')}{os.pathsep}{os.environ['PATH']}"
        if isinstance(words, str):
            text = re.sub(r"(?<=\s)/(?=\w)", f"{self.root}/", words)
            text = re.sub(r"^useradd ", f"useradd --prefix {self.root} ", text)
            words = ["sh", "-c", text]
        else:
            words = [str(self.at(f"/usr/bin/{words[0]}")), *words[1:]]
        there, variables = self.at(folder), {**os.environ, "PATH": path, **environment}
        return subprocess.run(words, cwd=there, env=variables, capture_output=True, text=True, check=True)


@pytest.mark.zoo
def test_what_the_dockerfile_does_gives_the_command(tmp_path: Path, tiny: Path) -> None:
    """Its lines in their order; environments stand in for the base image, and there is no container.

    Where nobody may make users here (useradd needs root), that line is left to the image.
    """
    images: dict[str, _Image] = {}
    folder, entry, command, user = "/", [""], [""], ""
    for word, text in _dockerfile():
        parts = text.split()
        if word == "FROM":
            name = parts[2] if parts[1:2] == ["AS"] else "last"
            image = images[name] = _Image(tmp_path / name)
        elif word == "COPY" and parts[0] == ".":
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")
            shutil.copytree(ROOT, image.at(parts[1]), symlinks=True, ignore=unwanted)
        elif word == "COPY":
            source = images[parts[0].removeprefix("--from=")]
            shutil.copytree(source.at(parts[1]), image.at(parts[2]))
        elif word == "RUN" and not (parts[0] == "useradd" and (os.geteuid() or not shutil.which("useradd"))):
            image.run(text, folder)
        elif word == "USER":
            user = text
        elif word == "WORKDIR":
            folder = text
            image.at(text).mkdir()
        elif word == "ENTRYPOINT":
            entry = json.loads(text)
        elif word == "CMD":
            command = json.loads(text)
    if not os.geteuid() and shutil.which("useradd"):
        assert f"\n{user}:" in "\n" + image.at("/etc/passwd").read_text()
        assert image.at(f"/home/{user}").is_dir()
    assert "Make an ONNX file smaller" in image.run([*entry, *command], folder).stdout
    # As the comment runs it: files of the folder, and a user without a home of its own.
    shutil.copy(tiny, image.at(folder) / "in.onnx")
    (line,) = (line for line in (EXAMPLES / "Dockerfile").read_text().splitlines() if line.startswith("# docker run"))
    words = shlex.split(line)
    image.run([*entry, *words[words.index("onnxslim") + 1 :]], folder, HOME="/proc", XDG_CACHE_HOME="")
    onnx.checker.check_model(str(image.at(folder) / "out.onnx"))


def test_every_example_is_named_in_the_docs() -> None:
    text = "".join(page.read_text() for page in DOCS)
    for path in (ROOT / "examples").iterdir():
        if path.suffix != ".toml" and path.is_file():
            assert f"examples/{path.name}" in text


def test_the_recipe_of_the_docs_is_one(tmp_path: Path) -> None:
    (block,) = _blocks(ROOT / "docs" / "recipes.md", "toml")
    path = tmp_path / "onnxslim.toml"
    path.write_text(block)
    options = {opt[2:] for p in cli.cli.commands[cli.DEFAULT].params for opt in p.opts if opt.startswith("--")}
    (job,) = config.read(path, options, [], [])
    assert (ROOT / job.source).is_file()
    assert all((ROOT / value).is_file() for value in job.arguments if value.startswith("models/"))
    tomllib.loads((ROOT / "examples" / "onnxslim.toml").read_text())


def test_the_recipe_of_the_examples_runs(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "fmnist_cnn.onnx", tmp_path / "models")
    for name in ("fmnist_calib.npz", "fmnist_eval.npz"):
        with np.load(ROOT / "models" / name) as arrays:  # a few samples do
            np.savez(tmp_path / "models" / name, **{key: array[:24] for key, array in arrays.items()})
    (tmp_path / "examples").mkdir()
    recipe = tmp_path / "examples" / "onnxslim.toml"
    text = (ROOT / "examples" / "onnxslim.toml").read_text()
    recipe.write_text(f"no-bench = true\n{text}")
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", str(recipe)])
    assert not caught.value.code
    onnx.checker.check_model(str(tmp_path / "examples" / "fmnist_cnn.slim.onnx"))
    assert "<h2>Layers</h2>" in (tmp_path / "examples" / "fmnist_cnn.html").read_text()


# What each Python example writes. Those that export need PyTorch.
MADE = {
    "drop_in": "slim.onnx",
    "export_torch": "slim.onnx",
    "export_transformers": "slim.onnx",
    "export_optimum": "bert_onnx/model.onnx",
    "export_ultralytics": "yolo*.onnx",
}
MARKS = {name: [pytest.mark.zoo] if name.startswith("export") else [] for name in MADE}


def test_every_python_example_is_run() -> None:
    assert set(MADE) == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    # Ultralytics, where it is installed, keeps its settings here and fetches nothing.
    for key, value in (("YOLO_CONFIG_DIR", str(tmp_path)), ("YOLO_OFFLINE", "1"), ("YOLO_AUTOINSTALL", "0")):
        monkeypatch.setenv(key, value)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (made,) = tmp_path.glob(MADE[name])
    onnx.checker.check_model(str(made))
