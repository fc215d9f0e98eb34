"""The corpus: described so that it can be built, its inputs what their descriptions say, failures told."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# models/ is no installed package: it is imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import corpus, packages
from models.corpus import Input
from models.packages import ZooError

ARCHITECTURES = corpus.architectures()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_has_inputs_that_can_be_made(name: str) -> None:
    architecture = ARCHITECTURES[name]
    arrays = corpus.samples(architecture)
    assert arrays and set(architecture.exporters) <= set(corpus.EXPORTERS)
    sizes: dict[str, int] = {}
    for key, array in arrays.items():
        spec = architecture.inputs[key]
        assert array.shape == spec.shape and 0 not in array.shape
        # A size that is left open has one value, wherever it is named: torch exports it as one symbol.
        for axis, size in spec.names.items():
            assert sizes.setdefault(size, spec.shape[axis]) == spec.shape[axis]


def test_there_are_enough_architectures_and_exporters() -> None:
    assert len(ARCHITECTURES) >= 40
    kinds = {entry.name.rpartition(".")[2] for entry in corpus.entries()}
    assert {"dynamo", "torchscript", "tf2onnx", "paddle"} <= kinds
    names = [entry.name for entry in corpus.entries()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", corpus.taken())
def test_file_comes_from_a_pinned_package(name: str) -> None:
    described = corpus.taken()[name]
    assert described["path"] in packages.digests(described["package"])
    assert all(Input.parse(text).shape for text in described["inputs"].values())


@pytest.mark.parametrize(
    ("text", "low", "high", "dtype"),
    [
        ("ids:5 a=3 40", 1, 4, "int64"),
        ("uniform 200", 0, 1, "float32"),
        ("normal 200", -8, 8, "float32"),
        ("ones 4", 1, 1, "int64"),
        ("true 4", 1, 1, "bool"),
    ],
)
def test_input_is_what_its_description_says(text: str, low: float, high: float, dtype: str) -> None:
    array = Input.parse(text).array(np.random.default_rng(0))
    assert array.dtype == dtype and array.min() >= low and array.max() <= high


def test_mask_hides_the_end_of_the_last_row() -> None:
    mask = Input.parse("mask batch=2 5").array(np.random.default_rng(0))
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_open_sizes_are_named() -> None:
    spec = Input.parse("ids:9 batch=2 3 sequence=10")
    assert (spec.kind, spec.limit, spec.shape, spec.names) == ("ids", 9, (2, 3, 10), {0: "batch", 2: "sequence"})


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ZooError, match="nonsense"):
        Input.parse("nonsense 3").array(np.random.default_rng(0))


def test_samples_are_the_same_every_time_and_differ_between_architectures() -> None:
    first, other = ARCHITECTURES["vit"], ARCHITECTURES["deit"]
    assert np.array_equal(*(corpus.samples(first)["pixel_values"] for _ in range(2)))
    assert not np.array_equal(corpus.samples(first)["pixel_values"], corpus.samples(other)["pixel_values"])


def test_choose_takes_architectures_and_files() -> None:
    assert [e.name for e in corpus.choose(["bert"], None)] == ["bert.dynamo", "bert.torchscript"]
    assert [e.name for e in corpus.choose(["bert"], "dynamo")] == ["bert.dynamo"]
    assert [e.name for e in corpus.choose(["magika.tf2onnx"], None)] == ["magika.tf2onnx"]
    with pytest.raises(ZooError, match="bort"):
        corpus.choose(["bort"], None)


def test_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    folder = corpus.Entry("bert.dynamo").folder
    folder.mkdir(parents=True)
    (folder / "failure.txt").write_text("RuntimeError: no\n")
    assert corpus.main(["list"]) == 0
    assert "bert.dynamo                          RuntimeError: no" in capsys.readouterr().out
    assert not corpus.built()


def test_unknown_name_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.main(["build", "bort"]) == 2
    assert "bort" in capsys.readouterr().err


@pytest.mark.zoo
@pytest.mark.parametrize("entry", corpus.built(), ids=lambda entry: entry.name)
def test_built_file_runs_on_its_inputs(entry: corpus.Entry) -> None:
    corpus.check(entry.path, entry.inputs())
