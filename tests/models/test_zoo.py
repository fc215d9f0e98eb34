"""The zoo: described in full, scored rightly, its committed demo good; with `-m zoo`, every fetched model too."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

# models/ is no installed package: it is imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import corpus, metrics, packages, zoo
from models.data import read_samples, write_folder, write_npz

ROOT = Path(__file__).resolve().parents[2]
MODELS = zoo.load_models()
FETCHED = [name for name, model in MODELS.items() if model.build]


# What models.toml says


@pytest.mark.parametrize("name", MODELS)
def test_model_is_described_in_full(name: str) -> None:
    model = MODELS[name]
    assert model.summary and model.licence and model.inputs
    assert all(package in packages.catalogue()["package"] for package in model.packages)
    assert callable(zoo.resolve_metric(model.metric))
    assert 0.5 < model.float_metric <= 1
    if model.build:
        module, _, function = model.build.partition(":")
        text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert f"def {function}(folder: Path)" in text


@pytest.mark.parametrize("name", packages.catalogue()["package"])
def test_package_is_pinned(name: str) -> None:
    entry = packages.catalogue()["package"][name]
    assert entry["source"] in ("pypi", "debian")
    assert entry["version"] and entry["licence"]
    assert packages.digests(name)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in packages.digests(name).values())


def test_every_package_is_used() -> None:
    used = {package for model in MODELS.values() for package in model.packages}
    used |= {described["package"] for described in corpus.taken().values()}
    assert used == set(packages.catalogue()["package"])


def test_committed_files_are_small_and_nothing_of_agpl_is_among_them() -> None:
    for name, model in MODELS.items():
        if not model.build:
            assert "GPL" not in model.licence, name
            for file in (model.path, model.folder / model.calibration, model.folder / model.evaluation):
                assert file.stat().st_size < 2_000_000, file


# The committed demo


def test_demo_classifies_fashion() -> None:
    model = MODELS["fmnist_cnn"]
    assert zoo.evaluate(model, model.path)["top1"] == pytest.approx(model.float_metric, abs=2e-3)
    assert model.float_metric >= 0.9


def test_demo_data_is_named_like_its_input() -> None:
    model = MODELS["fmnist_cnn"]
    calibration = list(read_samples(model.folder / model.calibration))
    assert len(calibration) == 256
    assert all(set(sample) == {"image"} and sample["image"].shape == (1, 1, 28, 28) for sample in calibration[:3])
    assert set(next(read_samples(model.folder / model.evaluation))) == {"image", "labels"}


# Scores on cases worked out by hand


def test_top1_accepts_one_right_class_or_several() -> None:
    outputs = {"scores": np.array([[0, 3, 1], [5, 0, 1]], np.float32)}
    assert metrics.top1(outputs, {"labels": np.array([1, 2])}) == 0.5
    assert metrics.top1(outputs, {"labels": np.array([[2, 1], [0, -1]])}) == 1.0
    assert metrics.top1(outputs, {"labels": np.array([[2, -1], [1, 2]])}) == 0.0


def read_aloud(*path: int, classes: int = 6) -> dict[str, np.ndarray]:
    return {"text": np.eye(classes, dtype=np.float32)[list(path)][None]}


def test_ocr_exact_removes_repeats_blanks_and_spaces() -> None:
    outputs = read_aloud(1, 1, 0, 1, 5, 2, 0, 3)
    assert metrics.ctc_decode(outputs["text"][0]) == [1, 1, 5, 2, 3]
    assert metrics.ocr_exact(outputs, {"labels": np.array([[1, 1, 2, 5, 3]])}) == 1.0
    assert metrics.ocr_exact(outputs, {"labels": np.array([[1, 2, 3]])}) == 0.0
    assert metrics.ocr_exact(read_aloud(0, 0), {"labels": np.array([[4]])}) == 0.0


def test_text_boxes_f1_counts_hits_misses_and_ghosts() -> None:
    page = np.zeros((1, 1, 100, 200), np.float32)
    page[0, 0, 23:31, 24:96] = 0.9
    box = [18, 17, 102, 37]
    assert metrics.text_boxes_f1({"p": page}, {"labels": np.array([[box]])}) == 1.0
    assert metrics.text_boxes_f1({"p": page}, {"labels": np.array([[box, [120, 60, 180, 80]]])}) == pytest.approx(2 / 3)
    page[0, 0, 70:80, 150:190] = 0.9
    assert metrics.text_boxes_f1({"p": page}, {"labels": np.array([[box, [-1] * 4]])}) == pytest.approx(2 / 3)
    assert metrics.text_boxes_f1({"p": page * 0}, {"labels": np.array([[box]])}) == 0.0


def test_correlations_follow_the_gold_scores_and_ignore_padding() -> None:
    tokens = np.zeros((4, 2, 2), np.float32)
    tokens[:, 0] = [[1, 0], [1, 0.1], [1, 0], [0, 1]]
    tokens[:, 1] = 99
    mask = np.array([[1, 0]] * 4)
    pairs = {"attention_mask": mask, "labels": np.array([9.0, 1.0])}
    assert metrics.pairs_spearman({"h": tokens}, pairs) == pytest.approx(1)
    vectors = metrics.embed({"h": tokens}, pairs)
    gold = vectors @ vectors.T
    assert metrics.similarity_pearson({"h": tokens}, {"attention_mask": mask, "labels": gold}) == pytest.approx(1)
    assert metrics.similarity_pearson({"h": tokens}, {"attention_mask": mask, "labels": -gold}) == pytest.approx(-1)


def test_speech_accuracy_and_cosine() -> None:
    assert metrics.speech_accuracy({"output": np.array([[0.9], [0.2]])}, {"labels": np.array([1, 1])}) == 0.5
    assert metrics.cosine(np.array([1.0, 0.0]), np.array([[2.0, 0.0]])) == pytest.approx(1)
    assert metrics.cosine(np.zeros(2), np.zeros(2)) == 1.0
    assert metrics.cosine(np.zeros(2), np.ones(2)) == 0.0


# Data, cache and command line


def test_samples_survive_writing_and_the_bytes_do_not_change(tmp_path: Path) -> None:
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "labels": np.arange(3)}
    write_npz(tmp_path / "a.npz", arrays)
    write_npz(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert [sample["x"].tolist() for sample in read_samples(tmp_path / "a.npz")] == arrays["x"][:, None].tolist()
    write_folder(tmp_path / "folder", [{"x": np.zeros((1, k))} for k in (3, 5)])
    assert [sample["x"].shape for sample in read_samples(tmp_path / "folder")] == [(1, 3), (1, 5)]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), packages.atomic_folder(tmp_path / "model") as scratch:
        (scratch / "half").touch()
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_build_replaces_the_one_before(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with packages.atomic_folder(tmp_path / "model") as scratch:
            (scratch / "file").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    entry = {"source": "pypi", "version": "1", "sha256": {"a.bin": "0" * 64}}
    monkeypatch.setattr(packages, "catalogue", lambda: {"package": {"altered": entry}})
    folder = tmp_path / "packages" / "pypi-altered-1"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"other")
    with pytest.raises(packages.ZooError, match=r"a\.bin has sha256 .* delete"):
        packages.take("altered", "a.bin")


def test_commands_explain_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    assert zoo.main(["path", "nothing"]) == 2
    assert "no model 'nothing'; there are fmnist_cnn" in capsys.readouterr().err
    assert zoo.main(["path", "silero_vad"]) == 2
    assert "fetch silero_vad" in capsys.readouterr().err
    assert zoo.main(["evaluate", "fmnist_cnn", str(tmp_path / "none.onnx")]) == 2
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert zoo.main(["evaluate", "fmnist_cnn", str(tmp_path / "bad.onnx")]) == 2
    assert "cannot load" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["fetch"])


def test_missing_builders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(packages.ZooError, match=r'needs torch.*pip install "onnxslim\[zoo\]"'):
        zoo.fetch(MODELS["efficientnet_lite0"])


def test_list_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MODELS)
    assert zoo.main(["flags", "fmnist_cnn"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0::2] == ["--calib", "--eval", "--metric"]
    assert all(Path(word).is_file() for word in (words[1], words[3]))


# Fetched models


@pytest.mark.zoo
@pytest.mark.parametrize("name", FETCHED)
def test_fetched_model_has_its_metric(name: str) -> None:
    model = MODELS[name]
    zoo.fetch(model)
    values = zoo.evaluate(model, model.path)
    expected = {model.metric: model.float_metric}
    expected |= {key: more["float_metric"] for key, more in model.more_metrics.items()}
    for key, value in expected.items():
        assert values[key.rpartition(":")[2]] == pytest.approx(value, abs=0.01)
