"""Weights in a file beside the model: writing them there, and which files belong to which model."""

from __future__ import annotations

import glob
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxslim import protos, wire


class _Inside(ir.StringTensor):
    """Text, which is never so large that it goes to another file: those hold nothing but numbers."""

    @property
    def nbytes(self) -> int:
        return 0


def write(model: ir.Model, path: Path) -> Path:
    """Write ``model`` to ``path``; returns the file beside it that holds the weights, should there be any."""
    clone = model.clone()
    for value in clone.graph.initializers.values():
        text = value.const_value
        if isinstance(text, ir.StringTensor):
            value.const_value = _Inside(text.string_data(), shape=ir.Shape(text.shape.numpy()), name=value.name)
    weights = path.parent / "weights.data"
    ir.save(clone, path, external_data=weights.name)
    return weights


def owned(path: Path) -> set[Path]:
    """The data files that an earlier save to ``path`` left beside it."""
    pattern = f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.data"
    return referred(path).intersection(path.parent.resolve().glob(pattern)) if path.exists() else set()


def referred(path: Path) -> set[Path]:
    """The files that hold weights of the model in the file ``path``; none where that is no model."""
    try:
        proto = onnx.ModelProto.FromString(wire.outline_file(path)[0])
    except (OSError, DecodeError):
        return set()
    return {(path.parent / location).resolve() for location in protos.locations(proto)}
