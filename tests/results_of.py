"""What tests of `optimize` ask for and look at."""

from __future__ import annotations

from typing import Any

import numpy as np

import onnxslim
from onnxslim import runtime

X = np.random.default_rng(9).standard_normal((3, 2, 8, 8)).astype(np.float32)


def optimize(model: Any, text: Any = "keep", **options: Any) -> onnxslim.Result:
    """Without a benchmark."""
    return onnxslim.optimize(model, text, **{"bench": False, **options})


def answer(model: Any) -> np.ndarray:
    """What a tiny model makes of `X`."""
    return runtime.load(model)({"x": X})["y"]


def kept(result: onnxslim.Result) -> str:
    """The passes that were not undone, as text."""
    return result.model.metadata_props["onnxslim.pipeline"]
