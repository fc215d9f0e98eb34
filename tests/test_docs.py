"""What docs/ and examples/ print works: commands are understood, links lead somewhere, pages are the docstrings."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest

import onnxslim
from onnxslim import cli, config

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]


def _blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def _commands() -> list[str]:
    lines = [line for page in DOCS for block in _blocks(page, "sh") for line in block.splitlines()]
    yaml = [ROOT / "examples" / name for name in ("github-action.yml", "pre-commit-config.yaml")]
    lines += [m for path in yaml for m in re.findall(r"(?:run|entry): (onnxslim .*)", path.read_text())]
    return [line for line in lines if line.startswith("onnxslim")]


@pytest.mark.parametrize("line", _commands())
def test_commands_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    name = words[0] if words[0] in cli.cli.commands else cli.DEFAULT
    # Commands keep the help option of their first context: it must be that of the command line.
    above = click.Context(cli.cli, **cli.cli.context_settings)
    cli.cli.commands[name].make_context(name, words[1:] if name == words[0] else words, parent=above)


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
    (job,) = config.read(path, options, [])
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


@pytest.mark.parametrize("name", ["drop_in", pytest.param("export_torch", marks=pytest.mark.zoo)])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    onnx.checker.check_model("slim.onnx")
