"""Recipes: what ``onnxslim run`` makes of ``onnxslim.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxslim import cli, config
from onnxslim.errors import UsageError

OPTIONS = ("passes", "shape", "max-drop", "no-bench", "threads")


def _read(tmp_path: Path, text: str) -> list[config.Job]:
    path = tmp_path / "onnxslim.toml"
    path.write_text(text)
    return config.read(path, OPTIONS, ["no-bench"], ["shape"])


def test_what_a_model_has_of_its_own_goes_before(tmp_path: Path) -> None:
    first, second = _read(
        tmp_path,
        """
        passes = "simplify"
        no-bench = true
        [[model]]
        in = "a.onnx"
        out = "b.onnx"
        [[model]]
        in = "a.onnx"
        out = "c.onnx"
        passes = "fold"
        shape = ["x=1,2", "y=3"]
        threads = 2
        no-bench = false
        """,
    )
    assert first == config.Job("a.onnx", "b.onnx", ("--passes", "simplify", "--no-bench"))
    assert second.arguments == ("--passes", "fold", "--shape", "x=1,2", "--shape", "y=3", "--threads", "2")


MODEL = '[[model]]\nin = "a"\nout = "b"\n'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("passes = ", "not a TOML file"),
        ("", r"no \[\[model\]\]"),
        ("model = 3", r"no \[\[model\]\]"),
        ('[[model]]\nin = "a"', "'out' must be the name of a file"),
        (f'max-dorp = "1%"\n{MODEL}', "unknown option 'max-dorp': .*; did you mean 'max-drop'"),
        (f"no-bench = 1\n{MODEL}", "no-bench must be true or false"),
        (f"threads = true\n{MODEL}", "threads must be a text"),
        (f'passes = ["fold", "fuse"]\n{MODEL}', "passes takes one value, not a list"),
        (MODEL * 2, "two models would be written to b"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _read(tmp_path, text)


def _run(*args: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in args])
    return int(caught.value.code or 0)


def test_run_makes_every_model_beside_the_recipe(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: dict[str, Any]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = tmp_path / "onnxslim.toml"
    common = 'no-bench = true\nshape = ["x=2,2,8,8"]\n'
    recipe.write_text(
        f'{common}[[model]]\nin = "tiny.onnx"\nout = "a.onnx"\npasses = "keep"\n'
        '[[model]]\nin = "tiny.onnx"\nout = "b.onnx"\npasses = "keep(level=2)"\n'
    )
    assert _run("run", recipe) == 0
    made = [onnx.load(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    assert [{p.key: p.value for p in m.metadata_props}["onnxslim.pipeline"] for m in made] == ["keep", "keep(level=2)"]
    recipe.write_text(f'{common}[[model]]\nin = "tiny.onnx"\nout = "c.onnx"\npasses = "lie"\n')
    assert _run("run", recipe) == 1, "a check failed"
    assert _run("run") == 2, "there is none here"


def test_told_to_end_it_makes_no_more_models(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: dict[str, Any]
) -> None:
    recipe = tmp_path / "onnxslim.toml"
    models = "".join(f'[[model]]\nin = "tiny.onnx"\nout = "{k}.onnx"\n' for k in range(3))
    recipe.write_text(f'passes = "keep"\nno-bench = true\n{models}')
    for code, made in ((123, 3), (143, 1), (130, 1)):
        seen: list[int] = []
        monkeypatch.setattr(cli.guard, "also", lambda make, c=code, s=seen: s.append(1) or c)
        assert _run("run", recipe) == code
        assert len(seen) == made
