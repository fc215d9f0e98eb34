"""`frontier`: from wherever the samples have come to, the values behind it are what the whole model gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from onnxslim import data, frontier, runtime
from onnxslim import model as model_io

sys.path.insert(0, str(Path(__file__).parent))
from layered import feeds, layered
from strategies import graphs


def opened(proto: onnx.ModelProto, samples: list[dict[str, np.ndarray]]) -> tuple[object, frontier.Frontier]:
    model = model_io.load(proto)
    return model, frontier.Frontier(data.open_data(samples, data.input_specs(model)), threads=1)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_what_lies_behind_any_place_is_what_the_whole_gives(
    case: tuple[onnx.ModelProto, dict[str, np.ndarray]],
) -> None:
    proto, feed = case
    model, front = opened(proto, [feed])
    nodes = list(model.graph)
    names = [v.name for v in model.graph.outputs if v.producer() is nodes[-1]]
    (whole,) = runtime.tap(model, names, [feed], threads=1)
    for place in range(len(nodes)):
        front.advance(model, place)
        assert front.place == place
        (found,) = front.tap(model, names)
        assert sum(1 for _ in front.part(model, names).graph) <= len(nodes) - place
        for name in names:
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-4)


def test_samples_stay_where_the_values_of_the_next_place_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, front = opened(layered(), feeds(4))
    front.advance(model, 1)
    held = sum(sum(a.nbytes for a in feed.values()) for feed in front.feeds())
    monkeypatch.setattr(frontier, "LIMIT", held - 1)  # the output of the Relu is as large as its input
    front.advance(model, 2)
    assert front.place == 1
    wanted = [runtime.load(model)(feed)["y"] for feed in feeds(4)]
    for found, want in zip(front.tap(model, ["y"]), wanted, strict=True):
        np.testing.assert_allclose(found["y"], want, atol=1e-5)
    front.advance(model, 4)  # behind the second convolution there are fewer
    assert front.place == 4


def test_a_place_is_left_behind_for_good() -> None:
    model, front = opened(layered(), feeds(2))
    front.advance(model, 4)
    front.advance(model, 2)
    assert front.place == 4
    assert [sorted(values) for values in front.tap(model, ["f"])] == [["f"]] * 2
