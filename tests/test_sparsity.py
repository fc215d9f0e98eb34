"""`sparsity` and `sparsify`: the cheapest weights go, and the others make up for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim import model as model_io
from onnxslim.contract import Outcome
from onnxslim.errors import UsageError
from onnxslim.graph import constant
from onnxslim.passes.sparsify import Sparsify
from onnxslim.pipeline import parse
from onnxslim.sparsity import Costs, Layer, Pattern
from onnxslim.weights import find_weights

sys.path.insert(0, str(Path(__file__).parent))
import layered as layered_nets
from layered import gap, layered

RNG = np.random.default_rng(0)


def apply(proto: onnx.ModelProto, item: Sparsify, synthetic: bool = False) -> tuple[ir.Model, Outcome]:
    model, outcome, warnings = layered_nets.apply(proto, item, synthetic)
    assert len(warnings) == ("deflated_bytes" in outcome.stats)
    return model, outcome


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: a for n, v in model.graph.initializers.items() if (a := constant(v)) is not None and a.ndim > 1}


def layer(seed: int, directions: int = 6) -> tuple[Layer, np.ndarray]:
    """A Gemm of the model of `layered` with the second moments of inputs of few directions, and these inputs."""
    rng = np.random.default_rng(seed)
    model = model_io.load(layered())
    weight = next(w for w in find_weights(model)[0] if w.name == "gemm")
    array = constant(weight.value)
    assert array is not None
    width = array.shape[weight.axis]
    x = rng.standard_normal((400, directions)) @ rng.standard_normal((directions, width))
    x += 0.3 * rng.standard_normal(x.shape)
    return Layer(weight, array, (x.T @ x / len(x))[None]), x.astype(np.float32)


@pytest.mark.parametrize("goal", [0.3, 0.7, Pattern(2, 4), Pattern(1, 4)])
def test_what_stays_is_the_least_squares_solution(goal: float | Pattern) -> None:
    found, _ = layer(1)
    rows = found.weight.rows(found.thinned(goal))[0]
    for row, old in zip(rows[:5], found.rows[0][:5], strict=True):
        kept = row != 0
        moments = found.moments[0].astype(np.float64)
        exact = np.linalg.solve(moments[np.ix_(kept, kept)], moments[kept] @ old)
        np.testing.assert_allclose(row[kept], exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("goal", [0.5, Pattern(2, 4)])
def test_refitting_is_better_than_setting_to_zero(goal: float | Pattern) -> None:
    found, x = layer(2)
    blind = Layer(found.weight, found.array, None)
    errors = [
        float(np.square(x @ (one.weight.rows(one.thinned(goal)) - found.rows)[0].T).sum()) for one in (found, blind)
    ]
    assert errors[0] < 0.3 * errors[1]


def test_without_data_the_smallest_go_and_the_others_stay() -> None:
    found, _ = layer(3)
    blind = Layer(found.weight, found.array, None)
    thin = blind.thinned(0.4)
    assert (thin == 0).mean() == pytest.approx(0.4, abs=1e-3)
    assert np.abs(found.array[thin == 0]).max() <= np.abs(found.array[thin != 0]).min()
    assert (thin[thin != 0] == found.array[thin != 0]).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(hnp.arrays(np.float32, st.integers(50, 400), elements=st.floats(2.0**-40, 1, width=32)), min_size=1),
    st.floats(0.05, 0.95),
)
def test_the_limit_leaves_the_ratio_below_it(costs: list[np.ndarray], ratio: float) -> None:
    table = Costs()
    for part in costs:
        table.add(part)
    everything = np.concatenate(costs).astype(np.float64)
    limit = table.limit(ratio)
    # A bin is less than one percent wide.
    assert (everything <= limit * 1.01).mean() >= ratio - 1e-9
    assert (everything < limit / 1.02).mean() <= ratio + 1e-9


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8)])
def test_patterns_hold_along_the_inputs_of_every_layer(kept: int, of: int) -> None:
    proto = layered()
    model, outcome = apply(proto, Sparsify(pattern=f"{kept}:{of}", fidelity=0))
    axes = {"conv_w": 1, "matmul_w": 0, "gemm_w": 1, "lstm_w": 2, "lstm_r": 2}
    found = arrays(model)
    for name, axis in axes.items():
        groups = np.moveaxis(found[name], axis, -1).reshape(-1, of)
        assert ((groups != 0).sum(1) <= kept).all()
        assert (groups != 0).any()
    assert outcome.stats["zeros"] == pytest.approx(1 - kept / of, abs=0.01)
    assert {s.node: s.reason for s in outcome.skipped} == {"stem": f"its 3 inputs are no multiple of {of}"}


def test_ratios_are_of_all_layers_together() -> None:
    proto = layered()
    model, outcome = apply(proto, Sparsify(ratio=0.5, fidelity=0, keep=("gemm",)))
    assert outcome.stats["zeros"] == pytest.approx(0.5, abs=0.01)
    assert outcome.stats["refitted"] == 3
    old, new = arrays(model_io.load(proto)), arrays(model)
    assert (old["gemm_w"] == new["gemm_w"]).all()
    shares = [(new[n] == 0).mean() for n in ("conv_w", "matmul_w", "lstm_w")]
    assert max(shares) - min(shares) > 0.02
    assert outcome.stats["deflated_bytes"] < 0.8 * outcome.stats["deflated_bytes_before"]
    assert outcome.stats["deflated_bytes_before"] > 0.8 * len(proto.SerializeToString())


def test_data_make_it_better() -> None:
    proto = layered()
    gaps = [gap(proto, apply(proto, Sparsify(ratio=0.5, fidelity=0), synthetic)[0]) for synthetic in (False, True)]
    assert gaps[0] < 0.6 * gaps[1]


@pytest.mark.parametrize("fidelity", [0.9, 0.999])
def test_as_many_zeros_as_the_outputs_bear(fidelity: float) -> None:
    proto = layered()
    model, outcome = apply(proto, Sparsify(fidelity=fidelity))
    assert outcome.stats["fidelity"] >= fidelity
    assert gap(proto, model) ** 2 < 3 * (1 - fidelity)
    more, _ = apply(proto, Sparsify(ratio=min(outcome.stats["zeros"] + 0.2, 0.99), fidelity=0))
    assert gap(proto, more) ** 2 > 0.5 * (1 - fidelity)


@pytest.mark.parametrize("options", [{"pattern": "1:4"}, {"ratio": 0.7}])
def test_layers_stay_as_they_are_until_the_outputs_bear_the_others(options: dict[str, Any]) -> None:
    proto = layered()
    old = arrays(model_io.load(proto))
    (free, all_of_it), (model, outcome) = (apply(proto, Sparsify(fidelity=f, **options)) for f in (0, 0.9))
    assert "fidelity" not in all_of_it.stats
    assert gap(proto, free) ** 2 > 0.1
    assert gap(proto, model) ** 2 < 0.15
    assert outcome.stats["fidelity"] >= 0.9
    same = [name for name, array in arrays(model).items() if (array == old[name]).all()]
    named = [s.node for s in outcome.skipped if "of an output's variance" in s.reason]
    assert 0 < len(named) < all_of_it.stats["sparse_layers"]
    assert outcome.stats["sparse_layers"] == all_of_it.stats["sparse_layers"] - len(named)
    assert len(same) >= len(named)


def test_nothing_is_guessed_without_data() -> None:
    proto = layered()
    model, outcome = apply(proto, Sparsify(), synthetic=True)
    assert outcome.stats["sparse_layers"] == 0
    assert all("no calibration data" in s.reason for s in outcome.skipped)
    assert not any((a == 0).any() for a in arrays(model).values())


@pytest.mark.parametrize(
    "text",
    [
        "sparsify(ratio=0)", "sparsify(ratio=1.0)", "sparsify(pattern='4:4')", "sparsify(pattern='half')",
        "sparsify(ratio=0.5, pattern='2:4')", "sparsify(fidelity=1.0)", "sparsify(samples=0)",
        "sparsify(fidelity=0)",
    ],
)  # fmt: skip
def test_options_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="sparsify"):
        parse(text)


def test_the_text_of_a_pattern_is_read_back() -> None:
    (item,) = parse("sparsify(pattern='2:4')")
    assert parse(str(item)) == [item]
