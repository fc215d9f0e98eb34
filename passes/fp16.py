"""fp16: the model in half precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxslim.contract import Context, Effect, Outcome, Pass
from onnxslim.precision import lower


@dataclasses.dataclass(frozen=True)
class Fp16(Pass):
    """Computes in float16 wherever operators, kernels and numbers allow it; half the size, and faster on GPUs.

    Types are checked against the schemas of the operators. What would overflow stays in float32: nodes with a constant
    beyond 65504 (or so small that it would vanish), and nodes that touch a value which the calibration data, or
    generated inputs, show near that. Subgraphs stay in float32; so do the inputs and outputs of the model, unless
    keep_io=false: whoever feeds it must then give float16, and gets float16.
    CPUs have few float16 kernels: ONNX Runtime then casts around every node, and the report says that it is slower.

    Options:
        keep: names of nodes, or operator types, that stay in float32.
        keep_io: leave the types of the inputs and outputs of the model as they are.
        samples: how many samples are looked at for values that would overflow.
    """

    name: ClassVar[str] = "fp16"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    keep: tuple[str, ...] = ()
    keep_io: bool = True
    samples: int = 32

    def __post_init__(self) -> None:
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    @property
    def retypes(self) -> bool:
        return not self.keep_io

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return lower(model, ir.DataType.FLOAT16, ctx, keep=self.keep, samples=self.samples, keep_io=self.keep_io)
