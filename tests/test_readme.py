"""What the README prints works: its two commands are there, its Python runs, and its options exist.

Its other commands run with those of docs/, in test_docs.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from onnxslim import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_exactly_two_commands_to_begin_with() -> None:
    job, tests = _blocks("sh")
    assert job.count("\n") == tests.count("\n") == 1
    for word in shlex.split(job):
        if word.startswith("models/"):
            assert (ROOT / word).is_file()
    assert "pytest" in tests


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (code,) = _blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out.onnx").exists()


def test_every_option_in_the_text_exists() -> None:
    known = {option for command in cli.cli.commands.values() for p in command.params for option in p.opts}
    scripts = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
    known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', scripts))
    mentioned = set(
        re.findall(r"`?(--[a-z][a-z0-9-]+)", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE))
    )
    assert mentioned <= known | {"--help"}
