from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import prune
from models import corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[corpus.Entry]:
    """A corpus of two files: the demo, and one that is no model."""
    monkeypatch.setattr(corpus, "root", lambda: tmp_path)
    found = corpus.entries()[:2]
    for entry in found:
        entry.folder.mkdir()
        np.savez(entry.folder / "inputs.npz", image=np.random.default_rng(0).random((2, 1, 28, 28), np.float32))
    shutil.copy(ROOT / "models" / "fmnist_cnn.onnx", found[0].path)
    found[1].path.write_bytes(b"nothing")
    return found


def test_the_corpus_is_pruned_and_failures_are_said(
    entries: list[corpus.Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune.main(["--corpus", entries[0].name, "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 files lose 20% or more; 0 are not well" in shown
    assert "shapes kept" in shown
    assert prune.main(["--corpus", entries[1].name]) == 1
    assert "failed: " in capsys.readouterr().out


def test_a_name_that_is_no_case_is_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        prune.main(["nonsense"])
    assert stopped.value.code == 2
    assert prune.subject("nonsense") is None
