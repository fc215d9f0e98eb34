"""Where an execution provider wants Q/DQ pairs, and how it wants numbers to be stored.

=========== =================== ======================================================================================
profile     activations         pairs
=========== =================== ======================================================================================
cpu         u8, zero point free around every integer operator, its result included
cpu-arm     s8, zero point free as for cpu
openvino    u8, zero point free in front of products: what follows one is merged into it, and all read what that stores
tensorrt    s8, zero point 0    as for openvino
=========== =================== ======================================================================================

Weights are s8 and symmetric everywhere; biases are int32 for the CPU, else float. CUDA's provider in
ONNX Runtime has no integer kernels for products.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxslim.quantization import QParams, activation_params
from onnxslim.units import Kind, Unit


@dataclasses.dataclass(frozen=True)
class Profile:
    """How one execution provider is served.

    Attributes:
        name: as the user types it.
        ep: the provider that measures it, as `onnxslim.runtime` calls it.
        machines: processors (`platform.machine`) that timing and the executed graph mean something on; empty: any.
        signed: activations are s8, not u8.
        symmetric: their zero point is 0.
        around: pairs stand around whole integer operators, and not only in front of products.
        pairwise: on x86 without VNNI its kernels add two products in 16 bits (`onnxslim.saturation`).
    """

    name: str
    ep: str
    machines: tuple[str, ...] = ()
    signed: bool = False
    symmetric: bool = False
    around: bool = True
    pairwise: bool = False

    @property
    def here(self) -> bool:
        """Whether the graph that ONNX Runtime's CPU provider executes on this machine is the one that is served."""
        return self.ep == "cpu" and (not self.machines or platform.machine() in self.machines)

    @property
    def dtype(self) -> ir.DataType:
        """Storage type of activations."""
        return ir.DataType.INT8 if self.signed else ir.DataType.UINT8

    def params(self, low: float, high: float) -> QParams:
        """Parameters that cover [low, high] and zero."""
        if self.symmetric:
            found = activation_params(0.0, max(-low, high, 0.0))
            return QParams(np.asarray(found.scale * np.float32(255 / 127)), np.array(0, np.int8))
        found = activation_params(low, high)
        if not self.signed:
            return found
        return QParams(found.scale, np.array(int(found.zero_point) - 128, np.int8))

    def units(self, units: Mapping[str, Unit]) -> dict[str, Unit]:
        """The units that this provider runs on integers, and what is stored for them."""
        if self.around:
            return dict(units)
        return {
            name: dataclasses.replace(unit, outputs=(), tail=None, needs_store=False)
            for name, unit in units.items()
            if unit.kind is Kind.PRODUCT
        }


CPU = Profile("cpu", "cpu", pairwise=True)
PROFILES = {
    profile.name: profile
    for profile in (
        CPU,
        Profile("cpu-arm", "cpu", ("aarch64", "arm64", "ARM64", "armv8l"), signed=True),
        Profile("openvino", "openvino", around=False, pairwise=True),
        Profile("tensorrt", "tensorrt", signed=True, symmetric=True, around=False),
    )
}
REFUSED = {
    "cuda": "ONNX Runtime's CUDA provider has no integer kernels for Conv, MatMul or Gemm, so that int8 would only add "
    "work: use fp16, or int4 for large decoders",
}
