"""Sessions of one model that differ in the content of its weights only; its graph is serialized once for all."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxslim import model as model_io
from onnxslim import runtime


class Variants:
    """``model`` as it is now, and as it is with other weights (`set_constant`) of the same types and shapes.

    Where the weights are too many for a message, every session is made from the whole model.
    """

    def __init__(self, model: ir.Model, *, threads: int = 0) -> None:
        self._model = model
        self._threads = threads
        self._first = {name: value.const_value for name, value in model.graph.initializers.items()}
        self._proto: onnx.ModelProto | None = None
        if model_io.weight_bytes(model) < runtime.IN_MEMORY:
            self._proto = onnx.ModelProto.FromString(model_io.to_bytes(model))
            self._tensors = {tensor.name: tensor for tensor in self._proto.graph.initializer}

    def load(self) -> runtime.Runner:
        """A session with the weights that the model has now."""
        if self._proto is None:
            return runtime.load(self._model, threads=self._threads)
        changed = [
            (self._tensors[name], value.const_value)
            for name, value in self._model.graph.initializers.items()
            if value.const_value is not self._first[name] and value.const_value is not None
        ]
        before = [tensor.SerializeToString() for tensor, _ in changed]
        for tensor, content in changed:
            tensor.CopyFrom(ir.to_proto(content))
        runner = runtime.load(self._proto.SerializeToString(), threads=self._threads)
        for (tensor, _), old in zip(changed, before, strict=True):
            tensor.ParseFromString(old)
        return runner

    def restore(self) -> None:
        """Give the model its first weights back."""
        for name, content in self._first.items():
            value = self._model.graph.initializers[name]
            if value.const_value is not content:
                value.const_value = content
