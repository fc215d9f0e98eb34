from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import pruners

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("goal", [0.9, 0.5, 0.31])
def test_bisection_comes_down_to_the_goal_and_ends_with_what_it_returns(goal: float) -> None:
    tried: list[float] = []

    def make(share: float) -> float:
        tried.append(share)
        return (1 - round(share * 64) / 64) ** 2  # widths are whole numbers

    share = pruners.bisect(make, goal)
    assert tried[-1] == share
    assert make(share) <= goal * (1 + pruners.CLOSE)
    assert make(share - 2 / 64) > goal * (1 - pruners.CLOSE)


def test_what_cannot_be_reached_is_the_most() -> None:
    tried: list[float] = []
    assert pruners.bisect(lambda share: tried.append(share) or 1.0, 0.5) == pruners.MOST == tried[-1]


def test_the_network_in_torch_is_that_of_the_file() -> None:
    torch = pytest.importorskip("torch")
    from onnxslim import runtime

    path = ROOT / "models" / "fmnist_cnn.onnx"
    image = np.random.default_rng(0).random((4, 1, 28, 28), np.float32)
    with torch.inference_mode():
        got = pruners.network("fmnist_cnn", path)(torch.from_numpy(image)).numpy()
    (want,) = runtime.load(path)({"image": image}).values()
    np.testing.assert_allclose(got, want, atol=1e-4)
