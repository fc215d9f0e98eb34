"""bf16: the model in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.opset import raise_opset
from onnxslim.precision import lower


@dataclasses.dataclass(frozen=True)
class Bf16(Pass):
    """Stores weights in bfloat16, half the size, and computes in it where the execution provider has kernels.

    Where it has none, as ONNX Runtime's CPU provider for almost every operator, a Cast behind each weight gives float32
    back; it is computed once, when the model is loaded, so that the model is smaller on disk and as fast as before. The
    range is that of float32; eight bits of precision are left. The inputs and outputs of the model keep their types.

    Options:
        keep: names of nodes, or operator types, that stay in float32.
    """

    name: ClassVar[str] = "bf16"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    keep: tuple[str, ...] = ()

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        reason = raise_opset(model, 13)
        if reason is not None:
            return Outcome({"converted": 0}, [Skip("*", reason)])
        return lower(model, ir.DataType.BFLOAT16, ctx, keep=self.keep, store=True)
