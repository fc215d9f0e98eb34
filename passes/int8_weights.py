"""int8_weights: weights in 8 bits, activations in float."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from onnxslim.blockwise import WeightOnly


@dataclasses.dataclass(frozen=True)
class Int8Weights(WeightOnly):
    """Stores the weights of MatMul and Gemm in 8 bits, with a scale and zero point per block.

    ONNX Runtime runs them as MatMulNBits (opset 21, to which the model is raised), which reads a fraction of the bytes.
    With calibration data the weights are rounded so that the products, not the weights, are off by least (GPTQ);
    without, to nearest. Convolutions, embeddings and recurrent layers have no such kernels and stay as they are.

    Options:
        block: how many inputs of an output share a scale: a power of two, at least 16.
        keep: names of layers (nodes) that stay in float.
        samples: how many calibration samples are used at most.
    """

    name: ClassVar[str] = "int8_weights"
    bits: ClassVar[int] = 8
