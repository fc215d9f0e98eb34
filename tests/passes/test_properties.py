"""Random graphs through the lossless passes: same outputs, same interface, nothing larger, nothing left over."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import apply, assert_same, interface, node_count
from strategies import AFFINE, LINEAR, MOVEMENT, Case, activation, graphs, pad, pool

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


def hold(case: Case, passes: str) -> None:
    model, feeds = case
    loaded, _ = apply(model, "")
    result, _ = apply(model, passes)
    assert_same(model, result, feeds)
    assert interface(result) == interface(loaded)
    assert node_count(result) <= node_count(loaded)
    reloaded, _ = apply(result, "")
    again, outcomes = apply(reloaded, passes)
    changed = again.SerializeToString(deterministic=True) != reloaded.SerializeToString(deterministic=True)
    assert not changed, f"the second time it did {[o.stats for o in outcomes]}"


@pytest.mark.parametrize("passes", ["simplify", "simplify,fold", "simplify,fold,fuse"])
@FEW
@given(case=graphs())
def test_lossless_passes_keep_any_graph(passes: str, case: Case) -> None:
    hold(case, passes)


@FEW
@given(case=graphs(templates=(*LINEAR, *AFFINE, *AFFINE, pad, pool)))
def test_fold_alone_keeps_graphs_full_of_candidates(case: Case) -> None:
    hold(case, "fold")


@FEW
@given(case=graphs(templates=(*LINEAR, *AFFINE, *AFFINE, pad, pool)))
def test_fold_never_grows_the_file(case: Case) -> None:
    model, _ = case
    simplified, _ = apply(model, "simplify")
    folded, _ = apply(simplified, "fold")
    assert folded.ByteSize() <= simplified.ByteSize()
    assert node_count(folded) <= node_count(simplified)


@FEW
@given(case=graphs(templates=(*LINEAR, *AFFINE, *AFFINE, *MOVEMENT, *MOVEMENT, activation)))
def test_what_fold_brings_together_is_simplified_at_once(case: Case) -> None:
    hold(case, "simplify,fold")


def test_equal_weights_count_as_shared_from_the_start() -> None:
    """What a copy of a weight costs depends on who else reads it, so that equal ones are made one before."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4, 5, 6] x) => (float[2, 4, 5, 6] y)
        <float[4] a = {1, 1, 1, 1}, float[4] b = {1, 1, 1, 1}, float[1, 1, 5, 1] c = {1, 2, 3, 4, 5}> {
            n = BatchNormalization(x, a, b, a, b)
            m = Neg(n)
            y = Add(m, c)
        }"""
    )
    hold((model, {"x": np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)}), "fold")
