"""int8_weights: weights in 8 bits, activations in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxslim.blockwise import Format, store
from onnxslim.contract import Context, Effect, Outcome, Pass


@dataclasses.dataclass(frozen=True)
class Int8Weights(Pass):
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
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    block: int = 32
    keep: tuple[str, ...] = ()
    samples: int = 32

    def __post_init__(self) -> None:
        self.require(
            self.block >= 16 and self.block & (self.block - 1) == 0,
            f"block={self.block} must be a power of two and at least 16",
        )
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return store(model, Format(8, self.block), ctx, keep=self.keep, samples=self.samples)
