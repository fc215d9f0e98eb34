"""Loading every form of model, refusing what is broken, and saving so that nothing is ever half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim import inference, runtime
from onnxslim import model as model_io
from onnxslim.errors import ModelError, OnnxslimError, UsageError

X = np.random.default_rng(3).standard_normal((2, 2, 8, 8)).astype(np.float32)


def _answer(model: Any) -> np.ndarray:
    return runtime.load(model)({"x": X})["y"]


@pytest.fixture
def wanted(proto: onnx.ModelProto) -> np.ndarray:
    return _answer(proto.SerializeToString())


def test_every_form_loads_to_the_same_model(proto: onnx.ModelProto, tiny: Path, wanted: np.ndarray) -> None:
    content = proto.SerializeToString(deterministic=True)
    forms = [tiny, str(tiny), content, bytearray(content), proto, ir.from_proto(proto)]
    loaded = [model_io.to_bytes(model_io.load(form)) for form in forms]
    assert len(set(loaded)) == 1
    assert np.allclose(_answer(loaded[0]), wanted, atol=1e-6)
    assert proto.SerializeToString(deterministic=True) == content, "the given message was changed"


def test_an_exported_program_is_a_form(proto: onnx.ModelProto) -> None:
    class Program:
        model = ir.from_proto(proto)

    class Older:
        model_proto = proto

    assert model_io.to_bytes(model_io.load(Program())) == model_io.to_bytes(model_io.load(Older()))


def test_a_given_ir_model_is_not_changed(proto: onnx.ModelProto) -> None:
    source = ir.from_proto(proto)
    loaded = model_io.load(source)
    next(iter(loaded.graph)).name = "changed"
    loaded.graph.inputs[0].shape = None
    assert next(iter(source.graph)).name == "conv"
    assert source.graph.inputs[0].shape is not None


def test_metadata_survives(proto: onnx.ModelProto) -> None:
    proto.producer_name, proto.doc_string = "somebody", "a text"
    helper.set_model_props(proto, {"character": "a\nb"})
    result = model_io.to_proto(model_io.load(proto))
    assert (result.producer_name, result.doc_string) == ("somebody", "a text")
    assert {p.key: p.value for p in result.metadata_props} == {"character": "a\nb"}


def test_functions_are_inlined_and_constants_lifted() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[n, 2, 8, 8] x) => (float[n, 2, 8, 8] y) { y = own.shift(x) }
        <domain: "own", opset_import: ["" : 17]>
        shift (a) => (b) { c = Constant <value_float = 2.5> ()  b = Add(a, c) }
    """)
    model = model_io.load(proto)
    assert [node.op_type for node in model.graph] == ["Add"]
    assert not model.functions
    assert np.array_equal(_answer(model), X + np.float32(2.5))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_sparse_initializers_become_dense(flat: bool, inside: bool) -> None:
    dense = np.zeros((8, 8), np.float32)
    dense[1, 2], dense[5, 0] = 3, -4
    places = np.array([1 * 8 + 2, 5 * 8]) if flat else np.array([[1, 2], [5, 0]])
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [2], [3.0, -4.0]),
        helper.make_tensor("i", TensorProto.INT64, places.shape, places.ravel()),
        [8, 8],
    )
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "b", [], [out])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "o", [], [out])
    if inside:
        node = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other)
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2, 8, 8])],
        [numpy_helper.from_array(np.array(True), "yes")] if inside else [],
    )
    holder = graph.node[0].attribute[0].g if inside else graph
    if inside and graph.node[0].attribute[0].name != "then_branch":
        holder = graph.node[0].attribute[1].g
    holder.sparse_initializer.append(sparse)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = proto.SerializeToString()
    assert np.allclose(_answer(model_io.load(proto)), X @ dense, atol=1e-5)
    assert proto.SerializeToString() == content


def test_initializers_listed_as_inputs_become_constants(proto: onnx.ModelProto, wanted: np.ndarray) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("w2", TensorProto.FLOAT, [4, 3]))
    model = model_io.load(proto)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert "'w2'" in model.meta[model_io.WARNINGS][0]
    assert np.allclose(_answer(model), wanted, atol=1e-6)


def test_outputs_without_a_declared_shape_are_fine(proto: onnx.ModelProto, wanted: np.ndarray) -> None:
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    content = proto.SerializeToString()
    model = model_io.load(proto)
    assert np.allclose(_answer(model), wanted, atol=1e-6)
    assert model.graph.outputs[0].shape is not None, "it can be inferred"
    assert proto.SerializeToString() == content


def test_training_information_is_dropped_and_said(proto: onnx.ModelProto) -> None:
    proto.training_info.add().algorithm.name = "sgd"
    assert "training_info" in model_io.load(proto).meta[model_io.WARNINGS][0]
    assert proto.training_info


def test_an_unsorted_graph_is_refused(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    for source in (proto, ir.from_proto(proto)):
        with pytest.raises(ModelError, match=r"not valid|not a valid"):
            model_io.load(source)


def _edit(proto: onnx.ModelProto, **changes: Any) -> bytes:
    for name, value in changes.items():
        setattr(proto, name, value)
    return proto.SerializeToString()


def test_broken_files_are_model_errors(proto: onnx.ModelProto, tmp_path: Path) -> None:
    content = proto.SerializeToString()
    no_graph, no_opset, future, cycle, dangling = (onnx.ModelProto.FromString(content) for _ in range(5))
    no_graph.ClearField("graph")
    no_opset.ClearField("opset_import")
    future.opset_import[0].version = 9999
    cycle.graph.node[0].input[0] = "y"
    dangling.graph.node[0].input[1] = "nowhere"
    cases = {
        "empty": (b"", r"is empty \(0 bytes\)"),
        "half": (content[: len(content) // 2], "not an ONNX file, or truncated"),
        "text": (b"hello, this is no model\n" * 20, "not an ONNX"),
        "zip": (b"PK\x03\x04" + bytes(100), "not an ONNX"),
        "no graph": (no_graph.SerializeToString(), "no graph"),
        "no opset": (no_opset.SerializeToString(), "imports no opset"),
        "future": (future.SerializeToString(), r"uses opset 9999; .*update onnx"),
        "cycle": (cycle.SerializeToString(), "not a valid ONNX model"),
        "dangling": (dangling.SerializeToString(), "not a valid ONNX model"),
    }
    for name, (broken, message) in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(broken)
        for source in (path, broken):
            with pytest.raises(ModelError, match=message):
                model_io.load(source)
                pytest.fail(f"{name} was accepted")
    for source in (tmp_path, tmp_path / "missing.onnx", 3, None):
        with pytest.raises(ModelError):
            model_io.load(source)


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_damage_never_crashes_the_reader(draw: st.DataObject) -> None:
    content = bytearray(_DAMAGED)
    if draw.draw(st.booleans()):
        del content[draw.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(draw.draw(st.integers(0, 6))):
        if content:
            content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    try:
        model = model_io.load(bytes(content))
    except OnnxslimError:
        return
    model_io.to_bytes(model)


def _small() -> bytes:
    """Much structure and few weights, so that damage hits the structure."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[n, 4] x, bool c) => (float[n, 4] y) <float[2] w = {1, 2}, int64[1] one = {1}> {
            s = If (c) <then_branch = t () => (a) { a = Relu(x) }, else_branch = e () => (b) { b = own.f(x) }>
            u = Unsqueeze(s, one)
            y = Squeeze(u, one)
        }
        <domain: "own", opset_import: ["" : 17]>
        f (p) => (q) { q = Neg(p) }
    """)
    return proto.SerializeToString()


_DAMAGED = _small()


def _external(proto: onnx.ModelProto, folder: Path, location: str = "weights.bin") -> Path:
    """The model with ``w1`` in an external file of ``folder``."""
    folder.mkdir(exist_ok=True)
    tensor = next(t for t in proto.graph.initializer if t.name == "w1")
    (folder / "weights.bin").write_bytes(bytes(16) + tensor.raw_data)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "16"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "external.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read_and_inlined(proto: onnx.ModelProto, tmp_path: Path, wanted: np.ndarray) -> None:
    path = _external(proto, tmp_path / "in")
    model = model_io.load(path)
    assert model_io.size(path, model) == path.stat().st_size + (tmp_path / "in" / "weights.bin").stat().st_size
    saved = model_io.save(model, tmp_path / "out.onnx")
    assert np.allclose(_answer(str(saved)), wanted, atol=1e-6)
    with pytest.raises(ModelError, match="give the path"):
        model_io.load(path.read_bytes())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", "", ".", "link", "no-such-file"])
def test_external_data_outside_the_folder_is_refused(proto: onnx.ModelProto, tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    path = _external(proto, tmp_path / "in", location)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"outside the folder|does not exist"):
        model_io.load(path)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "9999999"), ("length", "9999999"), ("length", "4"), ("offset", "-4"), ("offset", "x")]
)
def test_external_data_of_the_wrong_size_is_refused(
    proto: onnx.ModelProto, tmp_path: Path, key: str, value: str
) -> None:
    path = _external(proto, tmp_path / "in")
    broken = onnx.load(path, load_external_data=False)
    tensor = next(t for t in broken.graph.initializer if t.name == "w1")
    next(e for e in tensor.external_data if e.key == key).value = value
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(ModelError, match="external data of 'w1'"):
        model_io.load(path)


def test_external_data_without_a_length_must_hold_the_tensor(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = _external(proto, tmp_path / "in")
    broken = onnx.load(path, load_external_data=False)
    tensor = next(t for t in broken.graph.initializer if t.name == "w1")
    del tensor.external_data[2]
    path.write_bytes(broken.SerializeToString())
    model_io.load(path)
    (tmp_path / "in" / "weights.bin").write_bytes(bytes(40))
    with pytest.raises(ModelError, match="external data of 'w1'"):
        model_io.load(path)


def test_saving_gives_the_same_bytes_every_time(proto: onnx.ModelProto, tmp_path: Path) -> None:
    models = [model_io.load(proto) for _ in range(2)]
    for model in models:
        model_io.strip_shapes(model)
    files = [model_io.save(m, tmp_path / f"{k}.onnx").read_bytes() for k, m in enumerate(models)]
    assert files[0] == files[1]
    assert len(files[0]) <= len(proto.SerializeToString()) + 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.onnx", "1.onnx"]


def test_external_output_owns_its_data(proto: onnx.ModelProto, tmp_path: Path, wanted: np.ndarray) -> None:
    path = tmp_path / "out.onnx"
    model = model_io.load(proto)
    model_io.save(model, path, external=True)
    (data,) = tmp_path.glob("*.data")
    assert np.allclose(_answer(str(path)), wanted, atol=1e-6)
    model_io.save(model, path, external=True)
    assert list(tmp_path.glob("*.data")) == [data], "the same weights have the same file"
    other = model_io.load(proto)
    other.graph.initializers["w1"].const_value = ir.tensor(np.zeros((4, 2, 3, 3), np.float32), name="w1")
    model_io.save(other, path, external=True)
    (newer,) = tmp_path.glob("*.data")
    assert newer != data, "the old model's weights went with it"
    assert not np.allclose(_answer(str(path)), wanted, atol=1e-3)
    model_io.save(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx"]


def test_text_stays_inside(tmp_path: Path) -> None:
    names = np.array([f"class {k}, 猫" for k in range(1000)], object)
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
        helper.make_node("Gather", ["n", "i"], ["y"]),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["data", "w"], ["x"]), *nodes],
        "g",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
        [numpy_helper.from_array(names, "n"), numpy_helper.from_array(np.eye(8, 1000, 7, np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = model_io.load(proto)
    path = model_io.save(model, tmp_path / "out.onnx", external=True)
    feed = {"data": np.eye(1, 8, dtype=np.float32)}
    assert list(tmp_path.glob("*.data"))
    with model_io.on_disk(model) as temporary:
        for file in (path, temporary):
            assert runtime.load(file)(feed)["y"].tolist() == ["class 7, 猫"]


def test_data_that_somebody_refers_to_stays(proto: onnx.ModelProto, tmp_path: Path, wanted: np.ndarray) -> None:
    path, copy = tmp_path / "out.onnx", tmp_path / "copy.onnx"
    model_io.save(model_io.load(proto), path, external=True)
    (data,) = tmp_path.glob("*.data")
    copy.write_bytes(path.read_bytes())
    loaded = model_io.load(path)
    model_io.save(model_io.load(copy), path)
    assert data.exists() and np.allclose(_answer(str(copy)), wanted, atol=1e-6)
    model_io.save(model_io.load(proto), path, external=True)
    copy.unlink()
    model_io.save(loaded, path)
    assert data.exists(), "the model in memory has its weights there"
    for _ in range(2):
        other = model_io.save(model_io.load(proto), tmp_path / "out.model", external=True)
        assert np.allclose(_answer(str(other)), wanted, atol=1e-6), "whatever a model is called"
    assert np.allclose(_answer(model_io.to_bytes(loaded)), wanted, atol=1e-6)


def test_saving_over_the_file_that_the_weights_are_read_from(
    proto: onnx.ModelProto, tmp_path: Path, wanted: np.ndarray
) -> None:
    path = model_io.save(model_io.load(proto), tmp_path / "m.onnx", external=True)
    for external in (True, False):
        model_io.save(model_io.load(path), path, external=external)
        assert np.allclose(_answer(str(path)), wanted, atol=1e-6)


@pytest.mark.parametrize("target", ["", "missing/out.onnx"])
def test_a_place_that_cannot_be_written_is_a_model_error(proto: onnx.ModelProto, tmp_path: Path, target: str) -> None:
    with pytest.raises(ModelError):
        model_io.save(model_io.load(proto), tmp_path / target)
    assert not list(tmp_path.iterdir())


_KILLED = """
import sys, numpy as np, onnx_ir as ir
from onnxslim import model as model_io
model = model_io.load(sys.argv[1])
big = ir.tensor(np.ones(2_000_000, np.float32), name="big")
model.graph.register_initializer(ir.Value(name="big", const_value=big))
print("ready", flush=True)
while True:
    model_io.save(model, sys.argv[2], external=sys.argv[3] == "external")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["inline", "external"])
def test_a_kill_while_saving_leaves_a_whole_file(tiny: Path, tmp_path: Path, wanted: np.ndarray, kind: str) -> None:
    out = tmp_path / "out.onnx"
    model_io.save(model_io.load(tiny), out)
    for k in range(4):
        command = [sys.executable, "-c", _KILLED, str(tiny), str(out), kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.013 * (1 + 5 * k))
            process.send_signal(signal.SIGKILL)
        assert np.allclose(_answer(str(out)), wanted, atol=1e-6)


def test_an_error_while_writing_leaves_the_old_file(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="No space left"):
        model_io.save(model_io.load(proto), out)
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_fixed_shapes_reach_the_outputs(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    model_io.fix_shapes(model, {"x": [5, 2, 8, 8]})
    assert model.graph.outputs[0].shape == ir.Shape([5, 3])


@pytest.mark.parametrize("shapes", [{"z": [1]}, {"x": [5, 2, 8]}, {"x": [5, 3, 8, 8]}])
def test_fixed_shapes_that_do_not_fit_are_usage_errors(proto: onnx.ModelProto, shapes: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError, match="--fix-shape"):
        model_io.fix_shapes(model_io.load(proto), shapes)


def test_shapes_are_written_only_where_asked(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    assert len(model_io.to_proto(model).graph.value_info) == 4
    model_io.strip_shapes(model)
    assert not model_io.to_proto(model).graph.value_info
    inference.run(model)
    assert len(model_io.to_proto(model).graph.value_info) == 4


def test_bytes_of_a_model_too_large_for_protobuf_are_refused(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_io.load(proto)
    monkeypatch.setattr(model_io, "INLINE_LIMIT", 100)
    with pytest.raises(ModelError, match="save to a path"):
        model_io.to_bytes(model)
    assert model_io.weight_bytes(model) == 4 * (4 * 2 * 9 + 4 + 12 + 3)


def test_large_weights_are_saved_externally(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: np.ndarray
) -> None:
    monkeypatch.setattr(model_io, "INLINE_LIMIT", 100)
    path = model_io.save(model_io.load(proto), tmp_path / "out.onnx")
    assert list(tmp_path.glob("*.data"))
    assert np.allclose(_answer(str(path)), wanted, atol=1e-6)
