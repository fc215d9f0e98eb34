"""What int8 leaves in float, put together as the lossless passes would."""

from __future__ import annotations

import onnx_ir as ir

from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.errors import ModelError
from onnxslim.noise import noise
from onnxslim.passes.fuse import Fuse
from onnxslim.restoring import FEWEST

# Share of an output's variance by which rounding in another order may move it: some 1e-4 of its deviation.
ROUNDING = 1e-8


class Remainder:
    """`Fuse` for models of which some layers run on integers.

    What runs on integers is found in the graph as it was before, where sums and factors per channel are operators with
    integer kernels; only then is the rest fused. A stored value moves by a whole step where rounding differs, so that
    the two files cannot be compared with each other: that the fused function is the same is proven in float.

    Args:
        model: the float model; it is not changed.
        data: samples to prove it on.
        opset: see `Fuse`. ONNX Runtime finds Gelu in what it is made of, but not where that reads a DequantizeLinear,
            which it copies for each of its readers.
    """

    def __init__(self, model: ir.Model, data: Data, ctx: Context, opset: int = 0) -> None:
        self.ctx = ctx
        self.item = Fuse(opset=opset)
        fused = model.clone()
        fused.meta.update(model.meta)
        done = self.item.apply(fused, ctx).stats
        self.done = bool(done) and self._same(model, fused, data)
        self.model = fused if self.done else model  # the model in float

    def _same(self, model: ir.Model, fused: ir.Model, data: Data) -> bool:
        try:
            runners = [runtime.load(m, threads=self.ctx.threads) for m in (model, fused)]
            pairs = []
            for feed in data.spread(FEWEST).feeds():
                exact, other = (runtime.arrays(runtime.run(runner, feed)) for runner in runners)
                pairs.append((exact, other))
        except ModelError:
            return False
        return noise(pairs) <= ROUNDING

    def fuse(self, model: ir.Model) -> ir.Model:
        """``model``, some layers of which run on integers by now, with the others fused; changed in place."""
        if self.done:
            self.item.apply(model, self.ctx)
        return model
