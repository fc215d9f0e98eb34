"""Every form of data gives the same samples, is read lazily, and fails with one clear error."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.data import Data, InputSpec
from onnxslim.errors import DataError, OnnxslimError, UsageError

SPECS = [InputSpec("x", np.dtype(np.float32), (None, 2, 8, 8))]
Maker = Callable[..., dict[str, np.ndarray]]


def _same(data: Data, arrays: dict[str, np.ndarray]) -> None:
    assert len(data) == len(arrays["x"])
    for k, feed in enumerate(data.feeds()):
        assert set(feed) == {"x"}
        assert np.array_equal(feed["x"], arrays["x"][k : k + 1])
    assert np.array_equal(data[-1]["x"], arrays["x"][-1:])


def test_npz(tmp_path: Path, samples: Maker) -> None:
    arrays = samples()
    np.savez(tmp_path / "a.npz", **arrays)
    data = data_io.open_data(str(tmp_path / "a.npz"), SPECS)
    _same(data, arrays)
    assert np.array_equal(data[3]["labels"], arrays["labels"][3:4])


def test_folder_of_npz(tmp_path: Path, samples: Maker) -> None:
    arrays = samples()
    for k in range(8):
        np.savez(tmp_path / f"{k}.npz", x=arrays["x"][k : k + 1])
    _same(data_io.open_data(tmp_path, SPECS), arrays)


def test_onnx_test_data(tmp_path: Path, samples: Maker) -> None:
    arrays = samples(12)
    for k in range(12):  # numeric order: 10 after 9
        folder = tmp_path / f"test_data_set_{k}"
        folder.mkdir()
        tensor = numpy_helper.from_array(arrays["x"][k : k + 1], "x")
        (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    _same(data_io.open_data(tmp_path, SPECS), arrays)


def test_python_forms(samples: Maker) -> None:
    arrays = samples()
    rows = [{"x": arrays["x"][k : k + 1]} for k in range(8)]

    def stream() -> Iterator[dict[str, np.ndarray]]:
        yield from rows

    for source in (arrays, rows, stream(), data_io.open_data(rows, SPECS)):
        _same(data_io.open_data(source, SPECS), arrays)


def test_function_of_a_module_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: Maker
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **samples())
    Path("my_samples.py").write_text("import numpy\ndef load():\n    return dict(numpy.load('a.npz'))\n")
    _same(data_io.open_data("my_samples:load", SPECS), samples())


def test_a_sequence_is_read_one_sample_at_a_time(samples: Maker) -> None:
    read: list[int] = []

    class Lazy(list[Any]):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, k: Any) -> Any:
            read.append(k)
            return {"x": np.zeros((1, 2, 8, 8), np.float32)}

    data = data_io.open_data(Lazy(), SPECS)
    assert len(data) == 1000
    assert data[500]["x"].shape == (1, 2, 8, 8)
    assert set(read) == {0, 500}


def test_a_fixed_batch_takes_that_many_rows(samples: Maker) -> None:
    specs = [InputSpec("x", np.dtype(np.float32), (3, 2, 8, 8))]
    arrays = samples(8)
    data = data_io.open_data(arrays, specs)
    assert len(data) == 2
    assert np.array_equal(data[1]["x"], arrays["x"][3:6])
    assert data[1]["labels"].shape == (3,)
    with pytest.raises(DataError, match="holds 2 rows, the model takes 3"):
        data_io.open_data(samples(2), specs)


def test_text_inputs_are_fed_as_objects(tmp_path: Path) -> None:
    specs = [InputSpec("t", np.dtype(object), (None,))]
    np.savez(tmp_path / "a.npz", t=np.array(["one", "two"]))
    data = data_io.open_data(tmp_path / "a.npz", specs)
    assert next(data.feeds())["t"].dtype == object


@given(st.integers(1, 200), st.floats(0.05, 0.5))
def test_split_parts_cover_everything_once(count: int, held_out: float) -> None:
    data = Data("numbers", count, lambda k: {"x": np.array([k])}, ())
    first, second = data.split(held_out)
    numbers = [int(s["x"][0]) for part in (first, second) for s in part]
    if count == 1:
        assert numbers == [0, 0]
    else:
        assert sorted(numbers) == list(range(count))
        assert len(second) >= 1
        assert len(first) >= 1
        assert len(second) <= max(1, 1.5 * held_out * count + 1)


@given(st.integers(1, 60), st.integers(1, 60))
def test_spread_is_ordered_even_and_bounded(count: int, wanted: int) -> None:
    data = Data("numbers", count, lambda k: {"x": np.array([k])}, ())
    numbers = [int(s["x"][0]) for s in data.spread(wanted)]
    assert len(numbers) == min(count, wanted)
    assert numbers == sorted(set(numbers))
    if len(numbers) > 1:
        assert numbers[0] == 0
        assert numbers[-1] == count - 1
        assert np.ptp(np.diff(numbers)) <= 1
    assert [int(s["x"][0]) for s in data[1:]] == list(range(1, count))


def _broken_sources(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    good = np.zeros((2, 2, 8, 8), np.float32)
    files = {
        "name": {"y": good},
        "type": {"x": good.astype(np.float64)},
        "rank": {"x": good[0]},
        "shape": {"x": good[:, :1]},
        "counts": {"x": good, "labels": np.zeros(3)},
        "scalar": {"x": good, "mean": np.float32(1)},
        "empty": {"x": good[:0]},
        "nothing": {},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}, {"a": 2}], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": good}))
    (tmp_path / "text.npz").write_text("not a zip file")
    (tmp_path / "zero.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", good)
    (tmp_path / "empty_folder").mkdir()
    expected = {
        "name.npz": "no array named 'x'",
        "type.npz": "is float64, the model needs float32",
        "rank.npz": r"shape \[1, 8, 8\]",
        "shape.npz": r"shape \[1, 1, 8, 8\], the model needs \['any', 2, 8, 8\]",
        "counts.npz": "disagree on the number of samples .*may lie in a folder",
        "scalar.npz": "'mean' is a scalar",
        "empty.npz": "holds no sample",
        "nothing.npz": "no array named 'x'",
        "pickled.npz": "not a readable .npz",
        "pickle.npz": "not a readable .npz",
        "text.npz": "not a readable .npz",
        "zero.npz": "not a readable .npz",
        "array.npy": "is a .npy file",
        "missing.npz": "no such file",
        "empty_folder": "holds neither",
    }
    cases: dict[str, tuple[Any, str]] = {name: (tmp_path / name, text) for name, text in expected.items()}
    cases["list of arrays"] = [good], "sample 0 is ndarray"
    cases["number"] = 3, "is int"
    cases["module"] = "no_such_module:load", "cannot import"
    cases["not a function"] = "os:name", "is not a function"
    cases["raises"] = "os:abs_of_nothing", "cannot import"
    (tmp_path / "faulty_module.py").write_text("load = undefined")
    cases["a file"] = "./data.py:load", "cannot import"
    cases["faulty module"] = "faulty_module:load", "NameError: name 'undefined' is not defined"
    cases["ragged"] = [{"x": [[1.0], [1.0, 2.0]]}], "sample 0 raised ValueError"
    cases["wrong call"] = "os:stat", "raised TypeError"
    return cases


def test_unusable_data_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, (source, message) in _broken_sources(tmp_path).items():
        with pytest.raises((DataError, UsageError), match=message):
            data_io.open_data(source, SPECS)
            pytest.fail(f"{name} was accepted")


@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_a_damaged_npz_is_a_data_error_or_still_readable(
    draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez_compressed(path, x=np.arange(2 * 128, dtype=np.float32).reshape(2, 2, 8, 8))
    content = bytearray(path.read_bytes())
    if draw.draw(st.booleans()):
        content = content[: draw.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(draw.draw(st.integers(1, 8))):
            content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(OnnxslimError):
        data = data_io.open_data(path, SPECS)
        assert [feed["x"].shape for feed in data.feeds()] == [(1, 2, 8, 8)] * len(data)


def test_every_sample_of_a_folder_is_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", x=np.zeros((1, 2, 8, 8), np.float32))
    np.savez(tmp_path / "1.npz", z=np.zeros((1, 2, 8, 8), np.float32))
    data = data_io.open_data(tmp_path, SPECS)
    with pytest.raises(DataError, match="no array named 'x'"):
        list(data.feeds())


def test_a_sample_that_points_to_another_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1, 2, 8, 8])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    (tmp_path / "secret").write_bytes(bytes(512))
    with pytest.raises(DataError, match="refers to another file"):
        data_io.open_data(tmp_path, SPECS)


def _inputs(**shapes: list[Any]) -> Any:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    nodes = [helper.make_node("Identity", [n], [f"out_{n}"]) for n in shapes]
    outputs = [helper.make_tensor_value_info(f"out_{n}", TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(nodes, "g", values, outputs)
    return model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_synthetic_samples_fit_repeat_and_differ(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    one, two = (data_io.synthetic(model, 3, seed=5) for _ in range(2))
    specs = data_io.input_specs(model)
    for a, b in zip(one, two, strict=True):
        data_io.check_sample(a, specs, "synthetic")
        assert np.array_equal(a["x"], b["x"])
    assert not np.array_equal(one[0]["x"], one[1]["x"])
    assert not np.array_equal(one[0]["x"], data_io.synthetic(model, 1, seed=6)[0]["x"])


def test_one_symbol_has_one_size_everywhere() -> None:
    model = _inputs(x=["batch", "steps", 4], state=[2, "batch", 4], mask=["steps", "batch"], image=["batch", 3, -1, 5])
    shapes = {name: a.shape for name, a in data_io.synthetic(model, 1, seed=0)[0].items()}
    assert shapes == {"x": (1, 16, 4), "state": (2, 1, 4), "mask": (16, 1), "image": (1, 3, 64, 5)}
    given_shapes = data_io.synthetic(model, 1, seed=0, shapes={"x": (2, 7, 4)})[0]
    assert given_shapes["state"].shape == (2, 2, 4)
    assert given_shapes["mask"].shape == (7, 2)


@pytest.mark.parametrize("shapes", [{"z": [1]}, {"x": [1, 2, 8]}, {"x": [1, 3, 8, 8]}])
def test_a_shape_that_does_not_fit_is_a_usage_error(proto: onnx.ModelProto, shapes: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError, match="--shape"):
        data_io.synthetic(model_io.load(proto), 1, seed=0, shapes=shapes)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "uint8", "bool", "object", "complex64"])
def test_synthetic_arrays_have_the_declared_type(dtype: str) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = helper.make_tensor_value_info("x", kind, [2, 3])
    out = helper.make_tensor_value_info("y", kind, [2, 3])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    model = model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    array = data_io.synthetic(model, 1, seed=0)[0]["x"]
    assert array.dtype == np.dtype(dtype)
    assert array.shape == (2, 3)


def test_scale_grows_what_is_free() -> None:
    model = _inputs(x=["batch", "steps"], image=["batch", 3, "h", "w"], state=[2, None, 128])
    shapes = {name: a.shape for name, a in data_io.synthetic(model, 1, seed=0, scale=16)[0].items()}
    assert shapes == {"x": (1, 256), "image": (1, 3, 512, 512), "state": (2, 1, 128)}
