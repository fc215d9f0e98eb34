"""Models, data and passes that many tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper

from onnxslim import pipeline
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.errors import UsageError
from onnxslim.graph import constant, set_constant

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(scope="session")
def cnn() -> dict[str, str]:
    """The committed Fashion-MNIST network with its data: ``model``, ``calib``, ``eval``."""
    files = {"model": "fmnist_cnn.onnx", "calib": "fmnist_calib.npz", "eval": "fmnist_eval.npz"}
    return {name: str(MODELS / file) for name, file in files.items()}


def tiny_proto(batch: int | str = "n") -> onnx.ModelProto:
    """Conv 2→4, Relu, mean, Gemm 4→3: input ``x`` (n, 2, 8, 8), output ``y`` (n, 3)."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((4, 2, 3, 3)),
        "b1": rng.standard_normal(4),
        "w2": rng.standard_normal((4, 3)),
        "b2": rng.standard_normal(3),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1], name="conv"),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
            helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
            helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="gemm"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def proto() -> onnx.ModelProto:
    """A new copy of the tiny model: Conv 2→4, Relu, mean, Gemm 4→3, symbolic batch."""
    return tiny_proto()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny model as a file."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny_proto().SerializeToString())
    return path


@pytest.fixture
def samples() -> Callable[..., dict[str, np.ndarray]]:
    """``samples(n)``: arrays for the tiny model, samples on axis 0, with labels."""

    def make(count: int = 8, seed: int = 1) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "x": rng.standard_normal((count, 2, 8, 8)).astype(np.float32),
            "labels": rng.integers(0, 3, count),
        }

    return make


@dataclasses.dataclass(frozen=True)
class Keep(Pass):
    """Leaves everything as it is.

    The second paragraph.
    """

    name: ClassVar[str] = "keep"
    effect: ClassVar[Effect] = Effect.EXACT

    level: int = 1
    names: tuple[str, ...] = ()
    ratio: float | None = None
    fast: bool = False
    word: str = "a"

    def __post_init__(self) -> None:
        self.require(self.level >= 0, f"level={self.level} must be at least 0")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return Outcome({"kept": len(list(model.graph))}, [Skip("conv", "nothing to do")])


def _scale(model: ir.Model, by: float) -> None:
    weight = next(v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) > 1)
    array = constant(weight)
    assert array is not None
    set_constant(weight, (array * by).astype(array.dtype))


@dataclasses.dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the first weight and says so."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[tuple[str, ...]] = ("keep",)
    needs_data: ClassVar[bool] = True

    by: float = 0.99
    fidelity: float = 0.0

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        _scale(model, self.by)
        return Outcome({"scaled": 1, "samples": len(ctx.calibration)})


@dataclasses.dataclass(frozen=True)
class Lie(Pass):
    """Promises to change nothing and multiplies a weight."""

    name: ClassVar[str] = "lie"
    effect: ClassVar[Effect] = Effect.ROUNDING

    by: float = 1.01

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        _scale(model, self.by)
        return Outcome({"lied": 1})


@dataclasses.dataclass(frozen=True)
class Crash(Pass):
    """Breaks the graph and raises."""

    name: ClassVar[str] = "crash"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        model.graph.outputs.clear()
        raise ZeroDivisionError("on purpose")


@dataclasses.dataclass(frozen=True)
class Grow(Pass):
    """Puts an Identity in front of every output."""

    name: ClassVar[str] = "grow"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        old = model.graph.outputs[0]
        name, old.name = old.name, f"{old.name}_inner"
        node = ir.node("Identity", [old], name="identity")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, old.type, old.shape
        model.graph.append(node)
        model.graph.outputs[0] = node.outputs[0]
        return Outcome()


@dataclasses.dataclass(frozen=True)
class Last(Pass):
    """Must come last."""

    name: ClassVar[str] = "last"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[tuple[str, ...]] = ("keep",)
    last: ClassVar[bool] = True

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return Outcome()


PASSES: dict[str, Any] = {cls.name: cls for cls in (Crash, Grow, Keep, Last, Lie, Scale)}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes crash, grow, keep, last, lie and scale the installed passes, and returns their classes by name."""

    def find(name: str) -> type[Pass]:
        if name not in PASSES:
            raise UsageError(f"unknown pass {name!r}")
        return PASSES[name]

    monkeypatch.setattr(pipeline, "registry", lambda: PASSES)
    monkeypatch.setattr(pipeline, "find", find)
    return PASSES
