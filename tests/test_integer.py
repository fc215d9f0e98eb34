"""`integer` and `selectors`: what runs on integers is counted in the graph that is executed, and the rest explained."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from onnxslim import integer, runtime
from onnxslim import model as model_io
from onnxslim.errors import UsageError
from onnxslim.selectors import RULES, findings, wrong_results

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_proto
from qdq_nets import DEFECTS, OPS, PLANTED, gap, group, outputs, planted


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bias", ["int32", "float", None])
def test_a_whole_group_runs_on_integers(op: str, bias: str | None) -> None:
    proof = integer.prove(model_io.load(group(op, bias=bias)))
    assert [layer.name for layer in proof.integer] == ["layer0"]
    assert proof.fraction == 1
    assert not proof.wrong
    assert proof.to_dict()["not_integer"] == []


@pytest.mark.parametrize(("op", "defect"), PLANTED)
def test_every_planted_defect_is_found(op: str, defect: str) -> None:
    proof = integer.prove(model_io.load(planted(op, defect)))
    (layer,) = proof.layers
    rule = DEFECTS[defect][0]
    assert rule in RULES
    # Either it runs in float, and that is why, or it runs on integers and computes something else.
    assert rule in ((layer.rule,) if layer.kernel is None else tuple(f.rule for f in proof.wrong))


@pytest.mark.parametrize(
    ("op", "defect"), [p for p in PLANTED if p[1] in ("scales along the wrong axis", "wrong bias scale")]
)
def test_wrong_results_are_really_wrong(op: str, defect: str) -> None:
    proto = planted(op, defect)
    meant, got = (outputs(proto, op, optimize=optimize) for optimize in (False, True))
    assert bool(integer.prove(model_io.load(proto)).wrong) == (gap(meant, got) > 0.02)


@pytest.mark.parametrize("where", ["result", "weight"])
def test_other_storage_types_are_named(where: str) -> None:
    """8-bit floats, and 4-bit integers made of a float weight at run time, have no integer kernel and no range."""
    kind = onnx.TensorProto.FLOAT8E4M3FN if where == "result" else onnx.TensorProto.INT4
    proto = group("Gemm")
    graph = proto.graph
    zero = onnx.helper.make_tensor("other", kind, [], [0])
    graph.initializer.append(zero)
    if where == "result":
        for node in graph.node:
            node.input[:] = ["other" if name == "y0_z" else name for name in node.input]
    else:
        node = next(n for n in graph.node if n.output[0] == "w0")
        node.input[:] = ["w_stored", "one", "other"]
        weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
        arrays = {"w_float": weight, "one": np.float32(1)}
        graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items())
        graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", ["w_float", "one", "other"], ["w_stored"]))
    proto.opset_import[0].version, proto.ir_version = 21, 10
    model = model_io.load(proto)
    layer = next(node for node in model.graph if node.name == "layer0")
    assert "storage-type" in [finding.rule for finding in findings(layer)]
    assert integer.prove(model).fraction == 0


def test_maps_among_the_outputs_do_not_hide_the_graph() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
        g (float[n, 32] x) => (seq(map(int64, float)) y) {
            a = MatMul(x, w) y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (a) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((32, 2), np.float32), "w"))
    assert [layer.op_type for layer in integer.prove(model_io.load(proto)).layers] == ["MatMul"]


def test_macs_are_weighed_and_not_only_layers() -> None:
    """One of two layers of the same size reads a signed value with two readers, and the other is whole."""
    model = model_io.load(group("Conv", copies=2, storage=np.int8, readers=2))
    proof = integer.prove(model)
    assert [layer.kernel for layer in proof.layers] == [None, "QLinearConv"]
    assert proof.fraction == pytest.approx(0.5)
    assert "50.0% of the MACs" in (integer.missed(proof, 0.95) or "")
    assert "layer0" in (integer.missed(proof, 0.95) or "")
    assert integer.missed(proof, 0.5) is None


def test_float_products_and_other_operators_are_named() -> None:
    proof = integer.prove(model_io.load(tiny_proto()))
    assert [(x.name, x.rule) for x in proof.layers] == [("conv", "float-input"), ("gemm", "float-input")]
    assert proof.fraction == 0


def test_only_cpu_shows_its_kernels() -> None:
    with pytest.raises(UsageError, match="cpu"):
        integer.prove(model_io.load(group()), ep="openvino")


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.feeds = iter([{"x": rng.standard_normal((1, 2, 8, 8)).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.mark.parametrize("activation", [QuantType.QUInt8, QuantType.QInt8])
def test_files_of_onnxruntime(tmp_path: Path, activation: QuantType) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(tiny_proto(), source)
    quantize_static(
        source, target, _Reader(), quant_format=QuantFormat.QDQ, activation_type=activation,
        weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    model = model_io.load(target)
    proof = integer.prove(model)
    kernels = [n.op_type for n in runtime.optimized(model).graph if n.op_type in integer.KERNELS]
    assert sum(proof.kernels.values()) == len(kernels)
    assert len(proof.layers) == 2
    assert all(layer.kernel or layer.rule != "unknown" for layer in proof.layers)


def test_operators_that_are_integer_in_the_file_count(tmp_path: Path) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "dynamic.onnx"
    onnx.save(tiny_proto(), source)
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    proof = integer.prove(model_io.load(target))
    kinds = {layer.op_type: layer.kernel for layer in proof.layers}
    assert kinds["Conv"] is None
    assert sum(k is not None for k in kinds.values()) == 1


@pytest.mark.parametrize(("text", "value"), [("95%", 0.95), ("0.95", 0.95), (" 100% ", 1.0), ("0", 0.0)])
def test_shares(text: str, value: float) -> None:
    assert integer.share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "95", "-1%", "101%", "much", "nan"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="95%"):
        integer.share(text)


def test_models_whose_weights_lie_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files behind the session are gone when the graph is looked at, and some weights are still in them."""
    monkeypatch.setattr(runtime, "IN_MEMORY", 0)
    proof = integer.prove(model_io.load(group("Conv", copies=2, storage=np.int8, readers=2)))
    assert [layer.kernel for layer in proof.layers] == [None, "QLinearConv"]


def test_a_sound_group_breaks_no_rule() -> None:
    node = next(n for n in model_io.load(group("Gemm")).graph if n.name == "layer0")
    assert findings(node) == wrong_results(node) == []
