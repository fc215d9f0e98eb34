"""bench/readme.py: the README's tables and picture are those of docs/measured.json, and a run replaces its rows."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

# bench/ and models/ are no installed packages: they are imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import peers, readme, zoo
from bench.table import Row


def made(**changes: Any) -> Row:
    """A row of bench/zoo.py."""
    size = {"nodes": 10, "parameters": 1000, "macs": 1, "bytes": 4000}
    values: dict[str, Any] = {
        "metric": {"top1": (0.9, 0.89)},
        "before": size,
        "after": {**size, "bytes": 1000, "parameters": 950, "nodes": 12},
        "latency": {"speedup": 2.0, "interval": [1.9, 2.1]},
    }
    return Row(**{"model": "fmnist_cnn", "recipe": "prune,int8", "lossless": False, **values, **changes})


def test_the_readme_is_what_its_data_say() -> None:
    assert readme.main(["--check"]) == 0, "run python bench/readme.py"


def test_every_name_is_that_of_a_model_or_a_recipe() -> None:
    assert set(readme.NAMES) == set(readme.RECIPES) == set(zoo.recipes("; ".join(readme.RECIPES)))
    assert set(readme.MODELS) <= set(zoo.zoo.load_models())
    assert all(recipe.removeprefix(peers.PREFIX) in peers.PEERS for recipe in readme.RECIPES if ":" in recipe)


def test_a_new_run_replaces_its_rows_and_keeps_the_others() -> None:
    old = [readme.fact(made(recipe=recipe), {"cpu": "old"}) for recipe in ("int8", "peer:nncf")]
    new = [readme.fact(made(recipe=recipe), {"cpu": "new"}) for recipe in ("prune,int8", "peer:nncf")]
    rows = readme.merged(old, new)
    assert [(row["recipe"], row["environment"]["cpu"]) for row in rows] == [
        ("prune,int8", "new"), ("int8", "old"), ("peer:nncf", "new"),
    ]  # fmt: skip


def test_tables_and_picture_show_the_figures() -> None:
    rows = [readme.fact(made(), {}), readme.fact(made(recipe="peer:nncf"), {})]
    text = readme.tables(rows)
    assert "| Fashion-MNIST CNN | top-1 | 90.0 % | 89.0 % | -5.0 % | -75 % | 2.00x (1.90 to 2.10) |" in text
    assert "| Fashion-MNIST CNN | NNCF | 90.0 % → 89.0 % | -75 % | 10 → 12 | 2.00x (1.90 to 2.10) |" in text
    root = ET.fromstring(readme.picture(rows))
    name = root.tag.removesuffix("svg")
    texts = [node.text for node in root.iter(f"{name}text")]
    assert texts.count("2.00x") == texts.count("25%") == 1, "the picture is of the main job alone"
    assert "prefers-color-scheme: dark" in readme.picture(rows)
    (dot,), bars = list(root.iter(f"{name}circle")), list(root.iter(f"{name}rect"))
    one, line = root.iter(f"{name}line")
    assert float(line.attrib["x1"]) < float(dot.attrib["cx"]) < float(line.attrib["x2"])
    # The bar of 2x ends twice as far from its beginning as the line of 1x stands.
    begin = float(bars[0].attrib["x"])
    assert float(bars[0].attrib["width"]) == pytest.approx(2 * (float(one.attrib["x1"]) - begin), abs=0.2)


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written goes to a folder of its own, where nothing has been measured."""
    for name in ("DATA", "PICTURE", "README"):
        monkeypatch.setattr(readme, name, tmp_path / name)
    readme.DATA.write_text("[]")
    readme.README.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")


@pytest.mark.parametrize("names", [[], ["minilm_l6"]])
def test_a_run_measures_what_is_named_and_keeps_what_succeeded(
    names: list[str], pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(arguments: list[str]) -> int:
        asked.extend(arguments[: arguments.index("--passes")])
        failed = made(recipe="peer:nncf", status="failed", latency={}, after={})
        rows = [dataclasses.asdict(row) for row in (made(model="minilm_l6"), failed)]
        Path(arguments[-1]).write_text(json.dumps({"environment": {"cpu": "x"}, "rows": rows}))
        return 1

    monkeypatch.setattr(zoo, "main", run)
    assert readme.main(["--run", *names]) == 1, "a cell failed"
    assert asked == (names or list(readme.MODELS))
    assert [(row["model"], row["recipe"]) for row in readme.load()] == [("minilm_l6", "prune,int8")]
    assert "all-MiniLM-L6-v2" in readme.README.read_text()


def test_bad_usage_is_one_line_and_writes_nothing(
    pages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = readme.README.read_text()
    monkeypatch.setattr(zoo, "main", lambda _: 2)
    assert readme.main(["--run", "minilm_l6"]) == 2
    assert readme.main(["--from", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith(f"readme: {tmp_path / 'none.json'}: not a result")
    assert readme.main(["--run", "--passes", "int8; fp16"]) == 2
    assert "the README shows no 'fp16'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        readme.main(["--run", "nope"])
    assert caught.value.code == 2
    assert "the README has no model 'nope': there are fmnist_cnn, " in capsys.readouterr().err
    assert readme.README.read_text() == before


def test_a_result_is_taken_over(pages: None, tmp_path: Path) -> None:
    failed = made(recipe="int8", status="failed", latency={}, after={})
    result = {"environment": {"cpu": "x"}, "rows": [dataclasses.asdict(row) for row in (made(), failed)]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert readme.main(["--from", str(tmp_path / "result.json")]) == 0
    assert [row["environment"] for row in readme.load()] == [{"cpu": "x"}]
    text = readme.README.read_text()
    assert re.fullmatch(r"before\n<!-- measured -->\n\| model .*2\.00x.*<!-- /measured -->\nafter\n", text, re.DOTALL)
    assert readme.main(["--check"]) == 0
    readme.README.write_text("no marks")
    with pytest.raises(ValueError, match="stand between"):
        readme.main([])
