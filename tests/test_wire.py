"""Reading around the weights of a file, and writing them back: the bytes that protobuf itself writes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxslim
from onnxslim import model as model_io
from onnxslim import runtime, wire
from onnxslim.errors import ModelError
from onnxslim.graph import set_constant

TYPES = [np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.bool_]


def add(arrays: list[np.ndarray]) -> onnx.ModelProto:
    """A model that reads each of ``arrays`` once."""
    names = [f"w{k}" for k in range(len(arrays))]
    nodes = [onnx.helper.make_node("Identity", [n], [f"y{n}"]) for n in names]
    outputs = [
        onnx.helper.make_tensor_value_info(f"y{n}", onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True)]
    graph = onnx.helper.make_graph(nodes, "g", [], outputs, weights, doc_string="after the weights")
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(proto, {"key": "value"})
    return proto


def fill(content: bytes, spans: dict[int, wire.Span], file: bytes) -> onnx.ModelProto:
    """The outline with its weights put back by protobuf."""
    proto = onnx.ModelProto.FromString(content)
    for k, span in spans.items():
        assert not proto.graph.initializer[k].HasField("raw_data")
        proto.graph.initializer[k].raw_data = file[span.start : span.end]
    return proto


arrays = st.lists(
    st.tuples(st.sampled_from(TYPES), st.sampled_from([0, 1, 127, 1023, 1024, 1025, 5000])).map(
        lambda t: (np.arange(t[1]) % 2).astype(t[0])
    ),
    max_size=5,
)


@given(arrays)
def test_an_outline_and_its_weights_are_the_file(weights: list[np.ndarray]) -> None:
    proto = add(weights)
    file = proto.SerializeToString()
    content, spans = wire.outline(file)
    assert fill(content, spans, file) == proto
    assert set(spans) == {k for k, a in enumerate(weights) if a.nbytes >= wire.LARGE}
    assert len(content) < len(file) - sum(a.nbytes for a in weights if a.nbytes >= wire.LARGE) + 100


@given(arrays)
def test_pieces_are_what_protobuf_serializes(weights: list[np.ndarray]) -> None:
    proto = add(weights)
    want = proto.SerializeToString(deterministic=True)
    tensors: dict[str, ir.TensorProtocol] = {f"w{k}": ir.tensor(a) for k, a in enumerate(weights)}
    parts = wire.pieces(proto, tensors)
    file = io.BytesIO()
    wire.write(parts, file)
    assert file.getvalue() == want
    assert sum(map(wire.size, parts)) == len(want)


def test_fields_may_come_in_any_order_and_unknown_ones_stay() -> None:
    proto = add([np.ones(2000, np.float32)])
    tensor = proto.graph.initializer[0]
    raw = onnx.TensorProto(raw_data=tensor.raw_data).SerializeToString()
    tensor.ClearField("raw_data")
    unknown = b"\xfa\x7f\x02ab" + b"\x8d\x80\x01" + b"1234"  # field 2047 of 2 bytes, field 2049 of 4 fixed bytes
    weight = raw + tensor.SerializeToString() + unknown
    del proto.graph.initializer[:]
    graph = b"\x2a" + _length(weight) + weight + unknown + proto.graph.SerializeToString()
    proto.ClearField("graph")
    file = b"\x3a" + _length(graph) + graph + unknown + proto.SerializeToString()
    content, spans = wire.outline(file)
    assert len(spans) == 1 and len(content) < len(file) - 7900
    assert fill(content, spans, file) == onnx.ModelProto.FromString(file)


def _length(content: bytes) -> bytes:
    return wire._varint(len(content))


def test_what_no_serializer_writes_comes_back_whole() -> None:
    proto = add([np.ones(2000, np.float32)])
    file = proto.SerializeToString()
    twice = file + onnx.ModelProto(graph=onnx.GraphProto(name="again")).SerializeToString()  # protobuf merges them
    for strange in (twice, file[:-1], file[: len(file) // 2], b"\xff" * 2000, b"not a model" * 200, b""):
        assert wire.outline(strange) == (strange, {})


def test_a_weight_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    proto = add([np.ones(2000, np.float32)])
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    path = tmp_path / "short.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"'w0' has 7996 bytes, its shape \[2000\] needs 8000"):
        model_io.load(path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_linked_file_is_read(tmp_path: Path, link: object) -> None:
    proto = add([np.arange(2000, dtype=np.float32)])
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "content").write_bytes(proto.SerializeToString())
    assert callable(link)
    link(tmp_path / "blobs" / "content", tmp_path / "model.onnx")
    result = onnxslim.optimize(tmp_path / "model.onnx", "simplify", bench=False)
    assert result.exit_code == 0


def test_a_result_outlives_its_file(tmp_path: Path) -> None:
    """Also where the result replaces the file, and where another model is written over it in place."""
    path = tmp_path / "model.onnx"
    path.write_bytes(add([np.arange(2000, dtype=np.float32), np.ones((40, 40), np.int64)]).SerializeToString())
    result = onnxslim.optimize(path, "simplify", bench=False)
    want = model_io.to_bytes(result.model)
    result.save(path)
    assert path.read_bytes() == want
    path.write_bytes(b"x" * 10)
    result.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == want


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(add([np.arange(2000, dtype=np.float32), np.ones(3000, np.float32)]).SerializeToString())
    model = model_io.load(path)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert all(isinstance(t, ir.ExternalTensor) and t.raw is None for t in tensors)
    np.testing.assert_array_equal(model.graph.initializers["w0"].const_value.numpy(), np.arange(2000))
    assert [t.raw is None for t in tensors] == [False, True]
    model_io.forget_weights(model)
    assert all(t.raw is None for t in tensors)


def test_a_file_is_run_by_reference_to_its_own_weights(tmp_path: Path) -> None:
    weights = [np.arange(2000, dtype=np.float32), np.arange(5, dtype=np.int64)]
    path = tmp_path / "model.onnx"
    path.write_bytes(add(weights).SerializeToString())
    referring = model_io.file_by_reference(path)
    assert referring is not None and len(referring[0]) < 2000
    chosen = runtime.options(threads=1)
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", str(referring[1]))
    got = runtime.load(referring[0], chosen=chosen)({})
    for k, array in enumerate(weights):
        np.testing.assert_array_equal(got[f"yw{k}"], array)
    path.write_bytes(add(weights[1:]).SerializeToString())
    assert model_io.file_by_reference(path) is None


def test_new_weights_that_are_large_are_not_serialized_beside_those_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(add([np.arange(2000, dtype=np.float32), np.ones(3000, np.float32)]).SerializeToString())
    model = model_io.load(path)
    set_constant(model.graph.initializers["w1"], np.zeros(3000, np.float32))
    assert model_io.by_reference(model, 12_000) is not None
    assert model_io.by_reference(model, 11_999) is None
