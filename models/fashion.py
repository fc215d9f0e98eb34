"""Reads Fashion-MNIST out of Debian's package `dataset-fashion-mnist`."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.packages import take

FOLDER = "usr/share/datasets/fashion-mnist"


def load_images(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the images (N, 1, 28, 28) and labels of `split`, `train` or `t10k`.

    Pixels are divided by 256, not 255: such values have short mantissas, so the committed arrays compress far better.
    """
    raw = {}
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        name = f"{split}-{kind}-ubyte.gz"
        data = gzip.decompress(take("dataset-fashion-mnist", f"{FOLDER}/{name}").read_bytes())
        raw[kind] = np.frombuffer(data, np.uint8, offset=header)
    images: NDArray[Any] = raw["images-idx3"].reshape(-1, 1, 28, 28) / np.float32(256)
    return images.astype(np.float32), raw["labels-idx1"].astype(np.int64)
