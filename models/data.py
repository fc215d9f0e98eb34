"""Writes and reads samples: a `.npz` with samples on axis 0, or a folder of `.npz` files with one sample each."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.packages import ZooError

Sample = dict[str, NDArray[Any]]


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` lightly compressed: image arrays are hundreds of megabytes, and numpy's own level is slow."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            # A fixed date makes the same arrays the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array, order="C"), allow_pickle=False)


def write_folder(folder: Path, samples: Iterable[Mapping[str, NDArray[Any]]]) -> None:
    """Write each sample as `NNNN.npz` in a new folder."""
    folder.mkdir(parents=True)
    for number, sample in enumerate(samples):
        write_npz(folder / f"{number:04}.npz", sample)


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a `.npz` (each a slice of length 1 of every array) or of a folder of `.npz` files."""
    if path.is_dir():
        for file in sorted(path.glob("*.npz")):
            with np.load(file, allow_pickle=False) as arrays:
                yield dict(arrays)
    elif path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            whole = dict(arrays)
        lengths = {name: len(array) for name, array in whole.items()}
        if len(set(lengths.values())) != 1:
            raise ZooError(f"{path}: its arrays have different numbers of samples on axis 0: {lengths}")
        for k in range(next(iter(lengths.values()))):
            yield {name: array[k : k + 1] for name, array in whole.items()}
    else:
        raise ZooError(f"{path} does not exist; fetch the model again")
