"""The samples that calibrate and judge, and the original ready to run on them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxslim import data as data_io
from onnxslim import runtime, verify
from onnxslim.checks import generated
from onnxslim.contract import Context
from onnxslim.data import Data, Source
from onnxslim.errors import DataError, ModelError

# Samples that are generated without data.
_SYNTHETIC = 8
# A message of the user with more bytes is not serialized, what was read from it is run.
_MESSAGE = 256_000_000
_HELD_OUT = 0.25

Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Given:
    """The data and shapes that the user gave."""

    calibration: Source | None
    evaluation: Source | None
    shapes: Shapes

    @property
    def any(self) -> bool:
        return self.calibration is not None or self.evaluation is not None

    @property
    def same(self) -> bool:
        """The same samples were given twice."""
        named = isinstance(self.calibration, str | os.PathLike) and isinstance(self.evaluation, str | os.PathLike)
        return self.calibration == self.evaluation if named else self.calibration is self.evaluation


@dataclasses.dataclass(frozen=True)
class Samples:
    """What calibrates and what judges; ``unseen`` when the two are apart."""

    calibration: Data
    judging: Data
    synthetic: bool
    unseen: bool


def choose(
    model: ir.Model, source: Any, given: Given, lossy: bool, must_run: bool, ctx: Context
) -> tuple[Samples, runtime.Runner | None]:
    """The samples, and the original ready to run; no runner, but a warning, where it runs on no generated input."""
    try:
        specs = data_io.input_specs(model)
        judging = None if given.evaluation is None else data_io.open_data(given.evaluation, specs, what="evaluation")
        if given.calibration is not None:
            seen = data_io.open_data(given.calibration, specs)
            runner = runtime.load_lean(model, source, threads=ctx.threads)
        else:
            seen, runner = generated(model, source, _SYNTHETIC, seed=ctx.seed, shapes=given.shapes, threads=ctx.threads)
        # Samples that only judge are held back, unless nothing learns from the others.
        unseen = not given.same if judging is not None else lossy and len(seen) > 1
        if judging is None:
            seen, judging = seen.split(_HELD_OUT) if lossy else (seen, seen)
        for data in (judging, seen):
            verify.original_outputs(runner, data, 0)
    except (ModelError, DataError) as error:
        if must_run:
            raise
        ctx.warnings.insert(0, f"NOT VERIFIED: the original could not be run on generated inputs ({error})")
        nothing = Data("nothing", 0, lambda k: {}, ())
        return Samples(nothing, nothing, True, False), None
    return Samples(seen, judging, given.calibration is None, unseen), runner


def as_given(source: Any, loaded: ir.Model) -> ir.Model | str | bytes:
    """What ONNX Runtime loads as the original: the user's own file or message, so that reading it is verified too."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, onnx.ModelProto) and source.ByteSize() < _MESSAGE:
        return bytes(source.SerializeToString())
    return loaded
