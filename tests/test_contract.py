"""The base class of passes and its context."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from onnxslim.contract import Context, NoProgress, literal
from onnxslim.data import Data
from onnxslim.errors import UsageError


def test_only_changed_options_are_written(passes: dict[str, Any]) -> None:
    keep = passes["keep"]
    assert str(keep()) == "keep"
    assert str(keep(level=2, names=("a", "b"))) == "keep(level=2, names=['a', 'b'])"
    assert str(keep(ratio=0.5, fast=True)) == "keep(ratio=0.5, fast=true)"


def test_options_are_frozen(passes: dict[str, Any]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        passes["keep"]().level = 3


def test_a_bad_option_names_the_pass(passes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="keep: level=-1"):
        passes["keep"](level=-1)


def test_literal_forms() -> None:
    assert [literal(v) for v in (True, None, 1.5, "a'b", ("x", 1))] == ["true", "none", "1.5", '"a\'b"', "['x', 1]"]


def test_every_rng_of_a_context_draws_the_same_numbers() -> None:
    ctx = Context(Data("nothing", 0, lambda k: {}, ()), seed=3)
    first = ctx.rng().random(4)
    assert np.array_equal(first, ctx.rng().random(4))
    assert not np.array_equal(first, dataclasses.replace(ctx, seed=4).rng().random(4))


def test_no_progress_yields_everything() -> None:
    assert list(NoProgress().track(range(3), total=3, label="x")) == [0, 1, 2]
