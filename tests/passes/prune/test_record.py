from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.errors import UsageError
from onnxslim.graph import constant
from onnxslim.passes.prune import Prune
from onnxslim.passes.prune.importance import RIDGE
from onnxslim.passes.prune.record import composed

sys.path.insert(0, str(Path(__file__).parents[2]))

from graph_builder import Builder

MODEL = Path(__file__).parents[3] / "models" / "fmnist_cnn.onnx"


@pytest.fixture(scope="module")
def ctx() -> Context:
    with np.load(MODEL.parent / "fmnist_calib.npz") as calib:
        samples = [{"image": calib["image"][k : k + 1]} for k in range(16)]
    return Context(data_io.open_data(samples, data_io.input_specs(model_io.load(str(MODEL)))), threads=1)


def test_a_plan_says_what_stays_and_is_replayed(ctx: Context, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    first, second, original = (model_io.load(str(MODEL)) for _ in range(3))
    Prune(macs=0.7, refit=False, record=path).apply(first, ctx)
    kept = json.loads(Path(path).read_text())["weights"]
    assert kept
    for name, axes in kept.items():
        array = np.asarray(constant(original.graph.initializers[name]))
        now = np.asarray(constant(first.graph.initializers[name]))
        for axis, indices in axes.items():
            array = np.take(array, indices, axis=int(axis))
        assert array.shape == now.shape
        np.testing.assert_allclose(array, now, rtol=1e-6)  # unrefitted: what is kept is as it was
    Prune(plan=path, refit=False).apply(second, ctx)
    for name, value in first.graph.initializers.items():
        np.testing.assert_array_equal(
            np.asarray(constant(value)), np.asarray(constant(second.graph.initializers[name]))
        )


@pytest.mark.parametrize("options", [{"macs": 0.6}, {"tolerance": 0.1}, {"params": 0.8, "only": ("first", "last")}])
def test_a_replay_gives_the_same_file(tmp_path: Path, options: dict[str, Any]) -> None:
    b = Builder()
    x = b.op("Conv", b.input("x", "n", 3, 6, 6), b.w(32, 3, 3, 3, name="first"), pads=[1] * 4)  # without a bias
    x = b.relu(b.conv(b.relu(x), 32, 24))
    x = b.op("Flatten", b.op("GlobalAveragePool", b.relu(b.conv(x, 24, 16, 1))))
    proto = b.proto(b.op("Gemm", x, b.w(16, 5, name="last"), b.w(5)))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(8)]
    context = Context(data_io.open_data(samples, data_io.input_specs(model_io.load(proto))), threads=1)
    path = str(tmp_path / "plan.json")
    first, second = model_io.load(proto), model_io.load(proto)
    outcome = Prune(**options, record=path).apply(first, context)
    assert outcome.stats["removed"] and outcome.stats["refitted"]
    assert {family["ridge"] for family in json.loads(Path(path).read_text())["families"]} != {RIDGE}
    Prune(plan=path).apply(second, context)
    assert model_io.to_bytes(first) == model_io.to_bytes(second)


def test_families_that_share_a_tensor_are_told_apart(tmp_path: Path) -> None:
    """Heads and positions within the heads are carried by the same tensors."""
    b = Builder()
    x = b.input("x", 2, 5, 12)
    q, k, v = (b.heads(b.dense(x, 12, 16), 4, 4) for _ in range(3))
    proto = b.proto(b.dense(b.join(b.attend(q, k, v), 16), 16, 3))
    samples = [{"x": np.random.default_rng(k).standard_normal((2, 5, 12)).astype(np.float32)} for k in range(6)]
    context = Context(data_io.open_data(samples, data_io.input_specs(model_io.load(proto))), threads=1)
    path = str(tmp_path / "plan.json")
    first, second = model_io.load(proto), model_io.load(proto)
    outcome = Prune(ratio=0.6, refit=False, record=path).apply(first, context)
    assert len(outcome.stats["widths"]) > 1
    names = [family["name"] for family in json.loads(Path(path).read_text())["families"]]
    assert len(set(names)) == len(names)
    Prune(plan=path, refit=False).apply(second, context)
    shapes = [{n: v.shape for n, v in m.graph.initializers.items()} for m in (first, second)]
    assert shapes[0] == shapes[1]


def test_what_is_no_plan_for_this_model_is_refused(ctx: Context, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for content, message in (
        ("{", "not a plan"),
        ('{"version": 9, "families": []}', "version 9"),
        ('{"version": 1, "families": [{"name": "x", "units": 4, "removed": [1]}]}', "another model"),
        ('{"version": 1, "families": [], "weights": {"w": {"0": [1]}}}', "lossless"),
        ("[]", "not a plan"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            Prune(plan=str(path)).apply(model_io.load(str(MODEL)), ctx)
    with pytest.raises(UsageError, match="cannot be read"):
        Prune(plan=str(tmp_path / "none.json")).apply(model_io.load(str(MODEL)), ctx)


def test_indices_of_what_is_left_refer_to_the_original() -> None:
    first = {"a": {0: np.array([0, 2, 3, 5])}}
    second = {"a": {0: np.array([1, 3]), 1: np.array([4])}, "b": {0: np.array([7])}}
    found = composed(first, second)
    assert found["a"][0].tolist() == [2, 5]
    assert found["a"][1].tolist() == [4]
    assert found["b"][0].tolist() == [7]
