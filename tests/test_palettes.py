"""`palettes` and `cluster`: few values per weight, chosen for what they multiply, looked up at load time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome
from onnxslim.errors import UsageError
from onnxslim.graph import constant, opset
from onnxslim.palettes import nearest, palette
from onnxslim.passes.cluster import Cluster
from onnxslim.passes.sparsify import Sparsify

sys.path.insert(0, str(Path(__file__).parent))
import layered as layered_nets
from layered import WIDTHS, feeds, gap, layered


def apply(proto: onnx.ModelProto, item: Cluster, synthetic: bool = False) -> tuple[ir.Model, Outcome]:
    model, outcome, warnings = layered_nets.apply(proto, item, synthetic)
    assert warnings == []
    return model, outcome


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-8, 8, width=32)),
    st.sampled_from([1, 2, 4, 16, 256]),
)
def test_the_values_are_means_and_no_worse_than_even_steps(numbers: np.ndarray, count: int) -> None:
    values = palette(numbers, count)
    assert 1 <= len(values) <= count
    assert (np.diff(values) > 0).all()
    taken = nearest(values, numbers)
    gaps = np.abs(numbers[:, None] - values)
    assert (np.abs(numbers - values[taken]) <= gaps.min(1) + 1e-6).all()
    if len(np.unique(numbers)) <= count:
        assert (values[taken] == numbers).all()
    elif (numbers != 0).mean() > 0.99 or count == 1:
        low, high = float(numbers.min()), float(numbers.max())
        even = np.linspace(low, high, count) if count > 1 else np.array([numbers.mean()])
        worst = np.square(numbers[:, None] - even).min(1).sum()
        assert np.square(numbers - values[taken]).sum() <= 1.5 * worst + 1e-6


def test_many_numbers_of_a_normal_distribution_reach_the_optimum() -> None:
    """Max (1960) gives the least squared errors for 4 and 16 values: 0.1175 and 0.009497."""
    numbers = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    for count, least in ((4, 0.1175), (16, 0.009497)):
        values = palette(numbers, count)
        error = float(np.square(numbers - values[nearest(values, numbers)]).mean())
        assert error == pytest.approx(least, rel=0.02)


def test_numbers_that_matter_more_draw_the_values() -> None:
    numbers = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    importance = np.where(numbers > 1, 50.0, 1.0)
    errors = [
        np.square(numbers - v[nearest(v, numbers)]) for v in (palette(numbers, 8), palette(numbers, 8, importance))
    ]
    assert (errors[1] * importance).sum() < 0.6 * (errors[0] * importance).sum()


@pytest.mark.parametrize("bits", [3, 8])
def test_weights_are_looked_up_once(bits: int) -> None:
    proto = layered()
    model, outcome = apply(proto, Cluster(bits=bits, fidelity=0))
    assert outcome.stats["weights"] == len(WIDTHS)
    assert outcome.stats["rounded"] == 4
    assert outcome.stats["looked_up_at_run_time"] == 0
    executed = [n.op_type for n in runtime.optimized(model).graph]
    assert "Gather" not in executed
    assert "Cast" not in executed
    stored = ir.DataType.UINT4 if bits == 3 else ir.DataType.UINT8
    assert sum(v.dtype == stored for v in model.graph.initializers.values()) == len(WIDTHS)
    assert opset(model) == (21 if bits == 3 else 17)
    assert model_io.weight_bytes(model) < (0.16 if bits == 3 else 0.34) * model_io.weight_bytes(model_io.load(proto))
    assert gap(proto, model) < (0.4 if bits == 3 else 0.02)


def test_without_a_palette_the_values_are_written() -> None:
    proto = layered()
    model, outcome = apply(proto, Cluster(bits=4, palette=False, fidelity=0, keep=("gemm",)))
    assert [n.op_type for n in model.graph] == [n.op_type for n in model_io.load(proto).graph]
    for name in WIDTHS:
        array = constant(model.graph.initializers[name])
        assert array is not None
        assert (len(np.unique(array)) <= 16) == (name != "gemm_w")
    assert outcome.stats["deflated_bytes"] < 0.4 * outcome.stats["deflated_bytes_before"]
    assert [(s.node, s.reason) for s in outcome.skipped] == [("gemm", "asked to stay as it is")]


def test_data_make_it_better() -> None:
    proto = layered()
    gaps = [gap(proto, apply(proto, Cluster(bits=3, fidelity=0), synthetic)[0]) for synthetic in (False, True)]
    assert gaps[0] < 0.7 * gaps[1]


@pytest.mark.parametrize("palette", [True, False])
def test_layers_stay_as_they_are_until_the_outputs_bear_the_others(palette: bool) -> None:
    proto = layered()
    free, _ = apply(proto, Cluster(bits=1, palette=palette, fidelity=0))
    model, outcome = apply(proto, Cluster(bits=1, palette=palette, fidelity=0.95))
    assert gap(proto, free) ** 2 > 0.05
    assert gap(proto, model) ** 2 < 0.08
    assert outcome.stats["fidelity"] >= 0.95
    named = [s.node for s in outcome.skipped if "of an output's variance" in s.reason]
    assert named
    assert outcome.stats["weights"] == len(WIDTHS) - len(named)
    stored = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT4]
    assert len(stored) == (outcome.stats["weights"] if palette else 0)


def test_zeros_stay_zeros() -> None:
    model = model_io.load(layered())
    samples = data.open_data(feeds(), data.input_specs(model))
    ctx = Context(calibration=samples, threads=1)
    Sparsify(pattern="2:4", fidelity=0).apply(model, ctx)
    before = {n: constant(model.graph.initializers[n]) for n in WIDTHS}
    Cluster(bits=4, palette=False, fidelity=0).apply(model, ctx)
    for name, old in before.items():
        new = constant(model.graph.initializers[name])
        assert old is not None and new is not None
        assert (new[old == 0] == 0).all()


def test_tables_are_weights_too() -> None:
    table = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"], name="embed")],
        "g",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(table, "table")],
    )
    model = model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    ids = np.arange(7)
    samples = data.open_data([{"ids": ids}], data.input_specs(model))
    outcome = Cluster().apply(model, Context(calibration=samples, threads=1))
    assert outcome.stats["weights"] == 1
    np.testing.assert_allclose(runtime.load(model)({"ids": ids})["y"], table[ids], atol=0.05)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_no_index_has(bits: int) -> None:
    with pytest.raises(UsageError, match="between 1 and 8"):
        Cluster(bits=bits)
