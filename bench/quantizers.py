"""Quantizers that live in environments of their own: run by path in the interpreter that has one.

/their/python -I bench/quantizers.py NAME SOURCE TARGET SAMPLES

SAMPLES is a folder of `.npz` files of one sample each: `names`, and `a0` for the first of them, `a1` and so on. Each
function quantizes as the documentation of its tool says to begin with, to 8 bits, for the CPU. This file imports
nothing of onnxslim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, np.ndarray]]


def read(folder: Path) -> Feeds:
    """The samples, in order."""
    feeds = []
    # Numbers behind the names are not padded.
    for path in sorted(folder.glob("*.npz"), key=lambda path: (len(path.name), path.name)):
        with np.load(path, allow_pickle=False) as archive:
            names = [str(name) for name in archive["names"]]
            feeds.append({name: archive[f"a{k}"] for k, name in enumerate(names)})
    return feeds


class Reader:
    """Samples in the form that the quantizers built on ONNX Runtime's want: `get_next` until None, `rewind`."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._left: Iterator[Mapping[str, Any]] = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        """The next sample."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(self._feeds)

    def reset_iter(self) -> None:
        """`rewind`, as ONNX Runtime's readers call it."""
        self.rewind()

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._feeds)


def nncf(source: Path, target: Path, feeds: Feeds) -> None:
    """`nncf.quantize` with its defaults: performance preset, fast bias correction."""
    import nncf
    import onnx

    made = nncf.quantize(onnx.load(str(source)), nncf.Dataset(feeds), subset_size=len(feeds))
    onnx.save(made, str(target))


def quark(source: Path, target: Path, feeds: Feeds) -> None:
    """AMD Quark's 8-bit configuration for CPUs: A8W8 with its default calibration."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    config = get_default_config("A8W8")
    ModelQuantizer(Config(global_quant_config=config)).quantize_model(str(source), str(target), Reader(feeds))


def inc(source: Path, target: Path, feeds: Feeds) -> None:
    """Neural Compressor's static quantization with its defaults."""
    from onnx_neural_compressor import data_reader
    from onnx_neural_compressor.quantization import config, quantize

    class Calibration(Reader, data_reader.CalibrationDataReader):
        pass

    quantize(str(source), str(target), config.StaticQuantConfig(calibration_data_reader=Calibration(feeds)))


if __name__ == "__main__":
    name, given = sys.argv[1], [Path(argument) for argument in sys.argv[2:]]
    {"nncf": nncf, "quark": quark, "inc": inc}[name](given[0], given[1], read(given[2]))
