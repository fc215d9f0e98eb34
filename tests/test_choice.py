"""Which candidate is worth having."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim import choice, runtime, timing
from onnxslim.choice import fastest, slower_layer
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import add_constant


def weighing(numbers: int) -> ir.Model:
    """A model with a weight of so many numbers."""
    graph = ir.Graph([], [], nodes=[], name="g")
    add_constant(graph, "w", np.zeros(numbers, np.float32))
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("speeds", "least", "name"),
    [
        ([1.3, 1.31, 1.29], 1.0, "a"),  # within noise the first one is preferred
        ([1.3, 1.4, 1.5], 1.0, "c"),
        ([1.3, 1.5, 1.51], 1.0, "b"),
        ([0.8, 0.99], 1.0, None),
        ([0.8, 1.01], 1.0, "b"),
        ([0.8, 1.01], 1.02, None),
    ],
)
def test_the_preferred_unless_another_is_clearly_faster(
    speeds: list[float], least: float, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [weighing(3 - (k > 0)) for k in range(len(speeds) + 1)]
    seen = []

    def compare(sources: list[ir.Model], *_: object, **__: object) -> timing.Comparison:
        seen.extend(sources)
        found = [speed for source in sources for m, speed in zip(models, (1.0, *speeds), strict=True) if m is source]
        return timing.Comparison([], found, [(s - 0.5, s + 0.5) for s in found])

    monkeypatch.setattr(runtime, "compare_models", compare)
    context = Context(Data("nothing", 0, [].__getitem__, []))
    found = fastest(models[0], dict(zip("abc", models[1:], strict=False)), [], context, least=least)
    assert found.name == name
    assert found.speeds == dict(zip("abc", speeds, strict=False))
    assert [id(m) for m in seen[: len(models)]] == [id(m) for m in models]
    if name is None:
        assert f"{max(speeds):.2f}x at best" in found.refusal


@pytest.mark.parametrize(
    ("numbers", "low", "chosen"),
    [(3, 0.99, False), (3, 1.01, True), (4, 0.99, False), (2, 0.99, True)],
)
def test_what_is_not_smaller_must_be_faster_beyond_noise(
    numbers: int, low: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = timing.Comparison([], [1.0, 1.04], [(1.0, 1.0), (low, 1.1)])
    monkeypatch.setattr(runtime, "compare_models", lambda *_, **__: timed)
    context = Context(Data("nothing", 0, [].__getitem__, []))
    found = fastest(weighing(3), {"a": weighing(numbers)}, [], context)
    assert found.name == ("a" if chosen else None)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ((0.97, 0.8, 1.2), (1.2, 1.1, 1.3), "b"),  # disturbed, it seems
        ((1.1, 0.9, 1.3), (0.98, 0.95, 1.01), None),
        ((0.97, 0.94, 0.99), None, None),  # clear at once
        ((1.2, 1.1, 1.3), None, "b"),
    ],
)
def test_what_noise_leaves_open_is_measured_again(
    first: tuple[float, ...], second: tuple[float, ...] | None, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = dict(zip("xab", map(weighing, (3, 2, 2)), strict=True))
    asked: list[tuple[list[str], float]] = []

    def compare(sources: list[ir.Model], *_: object, seconds: float, **__: object) -> timing.Comparison:
        asked.append(([k for m in sources for k in models if models[k] is m], seconds))
        found = [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), first] if len(sources) == 3 else [(1.0, 1.0, 1.0), second]
        assert all(found)
        return timing.Comparison([], [f[0] for f in found if f], [f[1:] for f in found if f])  # type: ignore[misc]

    monkeypatch.setattr(runtime, "compare_models", compare)
    context = Context(Data("nothing", 0, [].__getitem__, []))
    chosen = fastest(models["x"], {k: models[k] for k in "ab"}, [], context)
    assert chosen.name == name
    assert chosen.speeds == {"a": 0.5, "b": (second or first)[0]}
    assert [names for names, _ in asked] == ([["x", "a", "b"], ["x", "b"]] if second else [["x", "a", "b"]])
    assert [seconds for _, seconds in asked] == sorted(seconds for _, seconds in asked)


def test_a_layer_goes_back_where_that_is_clearly_faster() -> None:
    assert slower_layer(1.0, 0.5) is None
    assert slower_layer(1.0, 1.0 / choice._CLEAR - 0.01) is None
    assert "2.000 ms, 1.000 ms in float" in (slower_layer(1.0, 2.0) or "")
    assert slower_layer(0.0, 2.0) is None
    assert slower_layer(2.0, 0.0) is None
