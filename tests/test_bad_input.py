"""Whatever is wrong with the input: one clear line on stderr, exit code 2, no output file, the input as it was."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim import cli

GOOD = np.zeros((4, 2, 8, 8), np.float32)


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def _fails(capsys: pytest.CaptureFixture[str], folder: Path, *args: str) -> str:
    """The one line on stderr of a command that must refuse its input and leave the folder as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, out, err = _run(capsys, *args)
    assert code == 2, err
    assert out == ""
    assert err.startswith("onnxslim: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    return err


def _models(proto: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """Broken models by file name, with what the error must say."""
    content = proto.SerializeToString()

    def edited(**changes: Any) -> onnx.ModelProto:
        copy = onnx.ModelProto.FromString(content)
        for name in changes:
            copy.ClearField(name)
        return copy

    old, new, outside, dangling, short, type_error = (onnx.ModelProto.FromString(content) for _ in range(6))
    old.opset_import[0].version, new.opset_import[0].version = -3, 999
    for model, location in ((outside, "../secret.bin"), (dangling, "gone.bin"), (short, "short.bin")):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    type_error.graph.node[1].op_type = "Not"
    (folder / "short.bin").write_bytes(bytes(8))
    (folder.parent / "secret.bin").write_bytes(bytes(4096))
    files = {
        "empty.onnx": b"",
        "truncated.onnx": content[:-100],
        "text.onnx": b"# not a model\n" * 30,
        "pickle.onnx": pickle.dumps({"a": 1}),
        "image.onnx": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "no_graph.onnx": edited(graph=None).SerializeToString(),
        "no_opset.onnx": edited(opset_import=None).SerializeToString(),
        "old.onnx": old.SerializeToString(),
        "new.onnx": new.SerializeToString(),
        "outside.onnx": outside.SerializeToString(),
        "dangling.onnx": dangling.SerializeToString(),
        "short.onnx": short.SerializeToString(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "empty.onnx": "is empty",
        "truncated.onnx": "truncated",
        "text.onnx": "not an ONNX",
        "pickle.onnx": "not an ONNX",
        "image.onnx": "not an ONNX",
        "no_graph.onnx": "no graph",
        "no_opset.onnx": "imports no opset",
        "old.onnx": "uses opset -3",
        "new.onnx": "uses opset 999",
        "outside.onnx": "outside the folder",
        "dangling.onnx": "'gone.bin' of 'w1' does not exist",
        "short.onnx": "truncated",
        "missing.onnx": "no such file",
        ".": "is a folder",
    }


def test_broken_models(proto: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    out = str(folder / "out.onnx")
    for name, message in _models(proto, folder).items():
        assert message in _fails(capsys, folder, str(folder / name), out), name
        assert message in _fails(capsys, folder, "inspect", str(folder / name)).replace("No such", "no such"), name


def _data(folder: Path) -> dict[str, str]:
    """Unusable calibration data by file name, with what the error must say."""
    arrays: dict[str, dict[str, Any]] = {
        "name.npz": {"y": GOOD},
        "type.npz": {"x": GOOD.astype(np.float64)},
        "shape.npz": {"x": GOOD[:, :1]},
        "rank.npz": {"x": GOOD[:, 0]},
        "empty.npz": {"x": GOOD[:0]},
        "counts.npz": {"x": GOOD, "labels": np.zeros(3, np.int64)},
        "pickled.npz": {"x": np.array([{}, {}], dtype=object)},
    }
    for name, content in arrays.items():
        np.savez(folder / name, **content)
    (folder / "pickle.npz").write_bytes(pickle.dumps(GOOD))
    (folder / "unreadable.npz").write_bytes(b"PK\x03\x04 and nothing more")
    (folder / "npy.npz").write_bytes(b"\x93NUMPY\x01\x00 broken")
    return {
        "name.npz": "no array named 'x'",
        "type.npz": "array 'x' is float64, the model needs float32",
        "shape.npz": "has shape [1, 1, 8, 8], the model needs ['any', 2, 8, 8]",
        "rank.npz": "has shape [1, 8, 8]",
        "empty.npz": "holds no sample",
        "counts.npz": "disagree on the number of samples",
        "pickled.npz": "not a readable .npz file",
        "pickle.npz": "not a readable .npz file",
        "unreadable.npz": "not a readable .npz file",
        "npy.npz": "not a readable .npz file",
        "missing.npz": "no such file",
        "no.module:load": "cannot import",
        "os:stat": "raised TypeError",
        "./own.py:load": "cannot import",
        "a" * 300 + ".npz": "File name too long",
    }


@pytest.mark.parametrize("option", ["--calib", "--eval"])
def test_unusable_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, message in _data(folder).items():
        where = name if ":" in name else str(folder / name)
        assert message in _fails(capsys, tmp_path, str(tiny), str(tmp_path / "out.onnx"), option, where), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passes", "prunne"], "did you mean 'prune'"),
        (["--passes", ""], "an empty item"),
        (["--passes", "prune(ratio=0.5"], "unclosed"),
        (["--passes", "prune(ratio=lots)"], "ratio"),
        (["--passes", "prune(ratio=7)"], "ratio"),
        (["--passes", "simplify(unknown=1)"], "unknown option 'unknown'"),
        (["--passes", "int8,prune"], "prune must come before int8"),
        (["--metric", "top2"], "unknown metric 'top2'"),
        (["--metric", "top1"], "has no array 'labels'"),
        (["--max-drop", "little"], "max drop"),
        (["--target", "tpu"], "unknown target"),
        (["--shape", "x"], "give NAME=1,3,224,224"),
        (["--shape", "x=1,two"], "give NAME=1,3,224,224"),
        (["--shape", "x=1,2,8"], "does not fit"),
        (["--shape", "z=1,2,8,8"], "no input 'z'"),
        (["--fix-shape", "x=1,3,8,8"], "does not fit"),
        (["--threads", "-1"], "--threads"),
        (["--seed", "x"], "--seed"),
        (["--no-such-option"], "--no-such-option"),
        (["one", "more"], "unexpected extra argument"),
        (["--json", "j" * 300], "File name too long"),
    ],
)
def test_bad_usage(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in _fails(capsys, tmp_path, str(tiny), str(tmp_path / "out.onnx"), *options)


def test_the_output_must_be_another_file_in_a_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.onnx").symlink_to(tiny)
    (tmp_path / "folder").mkdir()
    for out in (str(tiny), "tiny.onnx", "./folder/../tiny.onnx", "link.onnx"):
        assert "is the input, which is never touched" in _fails(capsys, tmp_path, str(tiny), out)
    assert "is the input" in _fails(capsys, tmp_path, str(tiny), "out.onnx", "--json", str(tiny))
    assert "need a file of their own" in _fails(capsys, tmp_path, str(tiny), "o.onnx", "--json", "o.onnx")
    assert "is a folder" in _fails(capsys, tmp_path, str(tiny), "folder")
    assert "does not exist" in _fails(capsys, tmp_path, str(tiny), "nowhere/out.onnx")
    assert "Missing argument" in _fails(capsys, tmp_path, str(tiny))


def test_other_commands(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in _fails(capsys, tmp_path, "compare", str(tiny), "missing.onnx").lower()
    assert "unknown execution provider" in _fails(capsys, tmp_path, "bench", str(tiny), "--ep", "tpu")
    assert "unknown pass" in _fails(capsys, tmp_path, "passes", "nothing")
    assert "no input" in _fails(capsys, tmp_path, "inspect", str(tiny), "--shape", "z=1")
    other = helper.make_graph(
        [helper.make_node("Relu", ["z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(other, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert "has the inputs ['z']" in _fails(capsys, tmp_path, "compare", str(tiny), str(path))
    assert "has the input 'z'" in _fails(capsys, tmp_path, "bench", str(tiny), str(path))


# Every command that writes reports, with the files that it reads.
REPORTING = {
    "inspect": ["a.onnx"],
    "inspect --prunable": ["a.onnx"],
    "compare": ["a.onnx", "b.onnx", "--data", "x.npz"],
    "bench": ["a.onnx", "b.onnx", "--data", "x.npz", "--seconds", "0.1"],
    "bench compare": ["old.json", "new.json"],
    "doctor": [],
}


@pytest.fixture
def desk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of `REPORTING`, where no command gets as far as its work."""
    desk = tmp_path / "desk"
    (desk / "folder").mkdir(parents=True)
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(tiny, desk / name)
    np.savez(desk / "x.npz", x=GOOD)
    for name in ("old.json", "new.json"):
        (desk / name).write_text("{}")
    monkeypatch.chdir(desk)

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    for function in ("inspection.inspect", "prunable.facts", "comparison.compare", "bench.run", "bench_runs.compare"):
        monkeypatch.setattr(f"onnxslim.{function}", work)
    monkeypatch.setattr("onnxslim.pages.doctor", work)
    return desk


@pytest.mark.parametrize(
    ("command", "view"),
    [
        (command, view)
        for command in REPORTING
        for view in ("--json", "--csv", "--markdown")
        if command != "doctor" or view == "--json"  # the only one that it has
    ],
)
def test_reports_that_cannot_be_written_are_found_before_the_work(
    desk: Path, capsys: pytest.CaptureFixture[str], command: str, view: str
) -> None:
    words = [*command.split(), *REPORTING[command], view]
    assert "folder: is a folder; give a file name" in _fails(capsys, desk, *words, "folder")
    assert "the folder nowhere does not exist" in _fails(capsys, desk, *words, "nowhere/report")
    for name in REPORTING[command]:
        if (desk / name).is_file():
            assert f"{name}: is the input, which is never touched" in _fails(capsys, desk, *words, name)


@pytest.mark.parametrize("command", [name for name in REPORTING if name != "doctor"])
def test_reports_need_files_of_their_own(desk: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = [*command.split(), *REPORTING[command]]
    assert "need a file of their own" in _fails(capsys, desk, *words, "--json", "r", "--csv", "./r")
    assert "only one of them can go to stdout" in _fails(capsys, desk, *words, "--csv", "--markdown")


@pytest.mark.parametrize("command", ["inspect", "compare", "bench"])
def test_every_model_is_looked_for_before_the_work(
    desk: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    first = [] if command == "inspect" else ["a.onnx"]
    assert "gone.onnx: no such file" in _fails(capsys, desk, command, *first, "gone.onnx")
    assert "folder: is a folder, not an ONNX file" in _fails(capsys, desk, command, *first, "folder")


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "a.onnx", "--seconds", "nan"],
        ["bench", "a.onnx", "--seconds", "inf"],
        ["bench", "a.onnx", "--threads", ""],
        ["bench", "a.onnx", "--batch", ""],
        ["compare", "a.onnx", "b.onnx", "--max-error", "nan"],
    ],
)
def test_numbers_that_are_none(desk: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert f"Invalid value for '{words[-2]}'" in _fails(capsys, desk, *words)


def test_a_report_that_the_system_refuses_is_no_defect(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "r.json: cannot be written: No space left" in _fails(
        capsys, tmp_path, "inspect", str(tiny), "--json", "r.json"
    )


def test_models_that_the_runtime_refuses_are_bad_input_once_data_is_given(
    proto: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Own", "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    path = tmp_path / "own.onnx"
    onnx.save(proto, path)
    np.savez(tmp_path / "x.npz", x=GOOD)
    assert "cannot load it" in _fails(capsys, tmp_path, str(path), "out.onnx", "--calib", str(tmp_path / "x.npz"))


def test_a_name_that_is_no_text_is_a_name(proto: onnx.ModelProto, tmp_path: Path) -> None:
    names = [os.fsencode(tmp_path) + name for name in (b"/caf\xe9.onnx", b"/out-\xe9.onnx")]
    Path(os.fsdecode(names[0])).write_bytes(proto.SerializeToString())
    command = [sys.executable, "-m", "onnxslim", *names, "--no-bench"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert Path(os.fsdecode(names[1])).exists()
    command[3] = os.fsencode(tmp_path) + b"/none-\xe9.onnx"
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2 and b"no such file" in done.stderr


@pytest.mark.parametrize("kind", ["truncated", "pickled data", "unknown pass"])
def test_a_real_process_says_it_in_one_line(proto: onnx.ModelProto, tmp_path: Path, kind: str) -> None:
    content = proto.SerializeToString()
    (tmp_path / "in.onnx").write_bytes(content[:-50] if kind == "truncated" else content)
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object) if kind == "pickled data" else GOOD)
    options = ["--passes", "nothing"] if kind == "unknown pass" else ["--calib", "x.npz"]
    command = [sys.executable, "-m", "onnxslim", "in.onnx", "out.onnx", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("onnxslim: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "repro").exists()


def _gatherer() -> onnx.ModelProto:
    """Looks rows up and multiplies them: an index that is not in the table fails when the model runs."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gatherer",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "L"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "L", 64])],
        [weight("table", 32, 64), weight("w1", 64, 128), weight("w2", 128, 64)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("form", ["npz", "folder"])
@pytest.mark.parametrize("option", ["--calib", "--eval"])
@pytest.mark.parametrize(
    "passes",
    [
        "simplify",
        "int8(measure=false)",
        "dynamic_int8(measure=false)",
        "prune(ratio=0.3)",
        "sparsify(ratio=0.3)",
        "cluster",
        "int4",
        "fp16",
    ],
)
def test_a_sample_that_the_original_cannot_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], passes: str, option: str, form: str
) -> None:
    onnx.save(_gatherer(), tmp_path / "in.onnx")
    ids = np.random.default_rng(1).integers(0, 32, (12, 5))
    # All that calibrate but the first, of which a pass may take only some; and one that is held out to judge.
    for bad in ([1, 2, 3, 6, 7, 8, 9], [11]):
        broken = ids.copy()
        broken[bad, 2] = 99
        if form == "npz":
            data = tmp_path / "data.npz"
            np.savez(data, ids=broken)
            where = [f"{data}: sample {k}: " for k in bad]
        else:
            data = tmp_path / "data"
            data.mkdir(exist_ok=True)
            for k in range(len(broken)):
                np.savez(data / f"{k:02}.npz", ids=broken[k : k + 1])
            where = [f"{data / f'{k:02}.npz'}: " for k in bad]
        options = ["--passes", passes, option, str(data), "--no-bench"]
        error = _fails(capsys, tmp_path, str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), *options)
        assert any(name in error for name in where)
        assert "the original model: fails on inputs {'ids': [1, 5]}" in error
        assert "leave it out" in error


def test_a_later_sample_of_the_wrong_shape_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for k in range(6):
        np.savez(data / f"{k}.npz", x=GOOD[:1, : 1 if k == 2 else 2])
    for option in ("--calib", "--eval"):
        error = _fails(capsys, tmp_path, str(tiny), str(tmp_path / "out.onnx"), option, str(data), "--no-bench")
        assert f"{data / '2.npz'}: array 'x' has shape [1, 1, 8, 8]" in error
