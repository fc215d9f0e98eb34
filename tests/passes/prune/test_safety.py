"""A family whose removal is not what masking it is stays whole, and the others leave all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim import coupling, rules, runtime
from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.passes.prune import Prune, safety

sys.path.insert(0, str(Path(__file__).parents[2]))

from graph_builder import Builder, image


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that mixes up the channels."""

    def reversed_channels(c: coupling.Coupling, node: object) -> None:
        value = node.inputs[0]  # type: ignore[attr-defined]
        axes = list(c.axes(value))
        axes[1] = axes[1][::-1].copy()
        c.set(node.outputs[0], axes)  # type: ignore[attr-defined]

    monkeypatch.setitem(rules.RULES, "Elu", reversed_channels)


def _proto(second: str) -> onnx.ModelProto:
    b = Builder()
    x = b.relu(b.conv(image(b), 3, 8))
    return b.proto(b.conv(b.op(second, b.conv(x, 8, 8)), 8, 2))


def _context(proto: onnx.ModelProto) -> Context:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(8)]
    return Context(data_io.open_data(samples, data_io.input_specs(model_io.load(proto))), threads=1)


@pytest.mark.usefixtures("lying")
def test_the_family_at_fault_is_put_back() -> None:
    proto = _proto("Elu")
    model, ctx = model_io.load(proto), _context(proto)
    before = runtime.load(model)(ctx.calibration.feed(ctx.calibration[0]))
    outcome = Prune(ratio=0.4).apply(model, ctx)
    assert [s.node for s in outcome.skipped if s.reason.startswith("put back: ")] == ["Conv_2_0"]
    assert list(outcome.stats["widths"]) == ["Conv_0_0"]
    assert outcome.stats["oracle"] <= safety.ORACLE
    after = runtime.load(model)(ctx.calibration.feed(ctx.calibration[0]))
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    weights = model.graph.initializers
    assert weights["w0"].shape[0] == weights["w2"].shape[1] < 8 == weights["w2"].shape[0]


@pytest.mark.usefixtures("lying")
def test_only_the_unsound_family_is_at_fault() -> None:
    proto = _proto("Elu")
    model, ctx = model_io.load(proto), _context(proto)
    feed = ctx.calibration.feed(ctx.calibration[0])
    families = coupling.analyze(model, feed).families
    removals = {family.name: family.atoms[:3] for family in families}
    assert len(removals) == 2
    assert safety.at_fault(model, feed, removals, ctx) == ["Conv_2_0"]
    assert all(value.shape[0] in (8, 2) for value in model.graph.initializers.values())  # nothing was cut
