"""Which layers lose time on integers, by times of kernels that are given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxslim.passes.int8 import speed
from onnxslim.passes.int8.prepare import Prepared

sys.path.insert(0, str(Path(__file__).parent))
from test_int8 import samples
from test_int8_accuracy import chain, prepared


@pytest.fixture(scope="module")
def ready() -> Prepared:
    found = prepared(chain(), samples((1, 8, 12, 12)))
    assert found.products == ["first", "second", "third", "fourth", "fifth", "last"]
    return found


def losing(ready: Prepared, slow: dict[str, float]) -> dict[str, str]:
    """With every kernel at 1 ms in float and 0.9 ms on integers, but ``slow`` ones."""
    floats = dict.fromkeys([*ready.products, "a6", "a7"], 1.0)
    return speed._losing(ready, ready.products, floats, dict.fromkeys(floats, 0.9) | slow)


def test_nothing_loses_where_everything_is_faster(ready: Prepared) -> None:
    assert losing(ready, {}) == {}


@pytest.mark.parametrize("name", ["first", "third", "last"])
def test_a_layer_that_is_slow_does_not_take_its_region_along(ready: Prepared, name: str) -> None:
    found = losing(ready, {name: 9.0})
    assert list(found) == [name]
    assert found[name].startswith("slower")


def test_a_region_loses_by_what_lies_between_its_layers(ready: Prepared) -> None:
    found = losing(ready, {"a6": 9.0})
    assert sorted(found) == sorted(ready.products)
    assert all("region" in reason for reason in found.values())


def test_where_a_layer_is_cut_out_the_conversions_count(ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not in the profile, in which the layer still ran on integers: what others of their kind take counts."""
    assert list(losing(ready, {"second": 9.0})) == ["second"]
    monkeypatch.setattr(speed, "_per_element", lambda *_: 2e-3)
    found = losing(ready, {"second": 9.0, "x_QuantizeLinear": 0.0})
    assert "region" in found["first"]
