"""`onnxslim.slim`, called as exporters call the package of that name."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim import runtime
from onnxslim.errors import CheckError, DataError, ModelError, UsageError

X = np.random.default_rng(9).standard_normal((1, 2, 8, 8)).astype(np.float32)


def _wasteful() -> onnx.ModelProto:
    """Conv, BatchNormalization, an Identity, a Relu and shape arithmetic that a simplifier removes."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((4, 2, 3, 3)),
        "scale": rng.random(4) + 0.5,
        "bias": rng.standard_normal(4),
        "mean": rng.standard_normal(4),
        "var": rng.random(4) + 0.5,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["b"], name="bn"),
        helper.make_node("Identity", ["b"], ["i"], name="identity"),
        helper.make_node("Relu", ["i"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["y"], name="flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="exporter")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(_wasteful(), path)
    return path


def _answer(model: Any) -> np.ndarray:
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return next(iter(runtime.load(content)({"x": X}).values()))


WANTED = _answer(_wasteful())


def _ops(model: onnx.ModelProto | Path) -> Counter[str]:
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    return Counter(node.op_type for node in proto.graph.node)


def test_as_ultralytics_calls_it(source: Path) -> None:
    model_onnx = onnx.load(source)
    before = model_onnx.SerializeToString()
    model_onnx = onnxslim.slim(model_onnx)
    assert isinstance(model_onnx, onnx.ModelProto)
    model_onnx.metadata_props.add(key="names", value="{0: 'person'}")
    onnx.save(model_onnx, source)
    onnx.checker.check_model(str(source), full_check=True)
    assert _ops(source) == Counter(["Conv", "Relu", "Flatten"])
    assert np.allclose(_answer(str(source)), WANTED, atol=1e-5)
    assert onnx.load_from_string(before).SerializeToString() == before


def test_as_optimum_calls_it(source: Path) -> None:
    from onnxslim import slim

    slimmed = slim(str(source))
    assert slimmed is not None
    onnx.save(slimmed, source)
    assert np.allclose(_answer(str(source)), WANTED, atol=1e-5)
    assert slim(str(source), str(source)) is None, "in place"
    assert np.allclose(_answer(str(source)), WANTED, atol=1e-5)


def test_as_scripts_call_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    options: dict[str, Any] = {
        "no_shape_infer": False,
        "skip_fusion_patterns": False,
        "no_constant_folding": False,
        "save_as_external_data": False,
        "verbose": False,
    }
    assert onnxslim.slim(model=str(source), output_model=str(out), **options) is None
    assert np.allclose(_answer(str(out)), WANTED, atol=1e-5)
    assert onnxslim.slim(source, out, input_shapes=["x:1,2,8,8"], model_check=True) is None
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_what_the_model_says_about_itself_stays(source: Path) -> None:
    slimmed = onnxslim.slim(source)
    assert slimmed is not None
    assert (slimmed.producer_name, slimmed.ir_version, slimmed.opset_import[0].version) == ("exporter", 8, 17)
    assert slimmed.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_shapes_are_inferred_unless_told_not_to(source: Path) -> None:
    with_shapes, without = onnxslim.slim(source), onnxslim.slim(source, no_shape_infer=True)
    assert with_shapes is not None
    assert without is not None
    assert len(with_shapes.graph.value_info) == 2
    assert not without.graph.value_info
    assert np.allclose(_answer(without), WANTED, atol=1e-5)


@pytest.mark.parametrize("skip", [{"skip_optimizations": ["graph_fusion"]}, {"skip_fusion_patterns": ["FusionConvBN"]}])
def test_skipping_fusions_keeps_the_nodes(source: Path, skip: dict[str, Any]) -> None:
    slimmed = onnxslim.slim(source, **skip)
    assert slimmed is not None
    assert _ops(slimmed) == Counter(["Conv", "BatchNormalization", "Relu", "Flatten"])


def test_skipping_everything_changes_nothing(source: Path) -> None:
    names = ["constant_folding", "graph_fusion", "dead_node_elimination", "subexpression_elimination", "weight_tying"]
    slimmed = onnxslim.slim(source, skip_optimizations=names)
    assert slimmed is not None
    assert _ops(slimmed) == _ops(source)


def test_outputs_and_inputs_can_be_cut(source: Path) -> None:
    slimmed = onnxslim.slim(source, outputs=["b", "c:fp32"])
    assert slimmed is not None
    assert [o.name for o in slimmed.graph.output] == ["b", "c"]
    got = runtime.load(slimmed.SerializeToString())({"x": X})
    assert np.allclose(np.maximum(got["b"], 0).reshape(1, -1), WANTED, atol=1e-5)
    tail = onnxslim.slim(source, inputs=["b"], model_check=True)
    assert tail is not None
    assert [i.name for i in tail.graph.input] == ["b"]
    again = runtime.load(tail.SerializeToString())({"b": got["b"]})
    assert np.allclose(again["y"], WANTED, atol=1e-5)
    middle = onnxslim.slim(source, inputs=["c"], outputs=["r"])
    assert middle is not None
    assert _ops(middle) == Counter(["BatchNormalization", "Relu"])
    assert not {"w"} & {t.name for t in middle.graph.initializer}


def test_a_static_shape_can_be_overridden(source: Path) -> None:
    fixed = onnxslim.slim(source, input_shapes={"x": [4, 2, 8, 8]})
    other = onnxslim.slim(fixed, input_shapes=["x:2,2,8,8"])
    assert other is not None
    assert other.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_external_data(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "out.onnx"
    out.parent.mkdir()
    big = onnx.load(source)
    big.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((64, 2, 3, 3), np.float32), "w"))
    for k in range(1, 5):
        big.graph.initializer[k].CopyFrom(
            numpy_helper.from_array(np.ones(64, np.float32), big.graph.initializer[k].name)
        )
    big.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4096
    onnxslim.slim(big, out, save_as_external_data=True)
    assert len(list(out.parent.glob("*.data"))) == 1
    assert _answer(str(out)).shape == (1, 4096)


def test_verification_inputs(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    for text in ("x:3,2,8,8", f"x:{tmp_path / 'x.npy'}"):
        assert onnxslim.slim(source, model_check=True, model_check_inputs=[text]) is not None
    np.save(tmp_path / "bad.npy", X[0])
    with pytest.raises(DataError, match="shape"):
        onnxslim.slim(source, model_check=True, model_check_inputs=[f"x:{tmp_path / 'bad.npy'}"])
    with pytest.raises(DataError, match="readable"):
        onnxslim.slim(source, model_check_inputs=["x:missing.npy"])


def test_inspection(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = source.read_bytes()
    assert onnxslim.slim([str(source), onnx.load(source)], dump_to_disk=True) is None
    assert onnxslim.slim(source, inspect=True) is None
    assert capsys.readouterr().out.count("BatchNormalization") == 3
    rows = (tmp_path / "in.onnx_model_info.csv").read_text().splitlines()
    assert len(rows) == 6
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"dtype": "int8"},
        {"size_threshold": 1024},
        {"skip_optimizations": ["constant_folding"]},
        {"skip_optimizations": ["everything"]},
        {"skip_fusion_patterns": ["EliminationSlice"]},
        {"skip_fusion_patterns": ["FusionNothing"]},
        {"inputs": ["nothing"]},
        {"outputs": ["nothing"]},
        {"outputs": ["y:fp16"]},
        {"outputs": ["y:float"]},
        {"inputs": ["r"], "outputs": ["b"]},
        {"input_shapes": ["x:1,2"]},
        {"input_shapes": ["x:a,b"]},
        {"input_shapes": ["z:1"]},
        {"dump_to_disk": True},
        {"quantize": True},
    ],
)
def test_what_is_not_supported_is_an_error(source: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        onnxslim.slim(source, **options)


def test_dtype_of_a_float32_model_is_no_change(source: Path) -> None:
    assert onnxslim.slim(source, dtype="fp32") == onnxslim.slim(source)


def test_a_model_of_the_plugin_world_passes_through(caplog: pytest.LogCaptureFixture) -> None:
    proto = _wasteful()
    proto.graph.node[3].op_type, proto.graph.node[3].domain = "EfficientNMS", "trt"
    proto.opset_import.append(helper.make_opsetid("trt", 1))
    with caplog.at_level(logging.WARNING, "onnxslim"):
        slimmed = onnxslim.slim(proto)
    assert slimmed is not None
    assert _ops(slimmed)["EfficientNMS"] == 1
    assert "NOT VERIFIED" in caplog.text
    with pytest.raises(CheckError, match="model_check"):
        onnxslim.slim(proto, model_check=True)


def test_unusable_models_are_model_errors(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    for source in (tmp_path / "broken.onnx", tmp_path / "missing.onnx", 3):
        with pytest.raises(ModelError):
            onnxslim.slim(source)


def test_the_name_is_the_function_whatever_was_imported() -> None:
    import importlib

    importlib.import_module("onnxslim.dropin")
    assert callable(onnxslim.slim)
    assert callable(onnxslim.optimize)
