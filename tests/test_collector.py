"""The collector of cyclic garbage runs less often for a while, and then as before."""

from __future__ import annotations

import gc

import pytest

from onnxslim import collector


def test_the_process_gets_its_own_setting_back() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), collector.calm():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before


@pytest.mark.parametrize("count", [0, 1_000_000])
def test_who_collects_never_or_seldom_is_left_alone(count: int) -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(count, 10, 10)
        with collector.calm():
            assert gc.get_threshold() == (count, 10, 10)
    finally:
        gc.set_threshold(*before)
