"""Runs other people's tools on a model, as their documentation says to: the recipes named `peer:...` of bench/zoo.py.

`peer:ort-int8` is ONNX Runtime's own static quantization and runs in this environment. The others get a virtual
environment each, made on first use in `peers/` beside the zoo's cache: the simplifiers `peer:onnxslim` (the unrelated
tool of the same name) and `peer:onnxsim`, and the quantizers of bench/quantizers.py, which calibrate on the same
samples: `peer:nncf` (OpenVINO's), `peer:quark` (AMD's) and `peer:inc` (Neural Compressor).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import quantizers
from models.packages import cache_root

PREFIX = "peer:"


@dataclass(frozen=True)
class Peer:
    """A tool: packages of its own environment and the program run there with the input and the output file.

    Without a program it is a function of bench/quantizers.py, which gets the calibration data as well, or, without
    packages, a function of this module, run in this environment.
    """

    name: str
    lossless: bool
    packages: tuple[str, ...] = ()
    program: str = ""

    def command(self, source: Path, target: Path, calibration: Path) -> list[str]:
        """The command that makes ``target`` of ``source``; creates the tool's environment when it is missing.

        Raises:
            subprocess.CalledProcessError: the environment cannot be made.
        """
        if not self.packages:
            return [sys.executable, "-m", "bench.peers", self.name, str(source), str(target), str(calibration)]
        # Isolated: this repository has a package of the same name as one of the tools.
        isolated = [str(environment(self.name, self.packages)), "-I"]
        if self.program:
            return [*isolated, "-c", self.program, str(source), str(target)]
        script = Path(__file__).with_name("quantizers.py")
        samples = single(source, calibration, target.with_name("samples"))
        return [*isolated, str(script), self.name, str(source), str(target), str(samples)]


_UNDECLARED = ("prettytable", "psutil", "py-cpuinfo", "pydantic", "scipy", "transformers")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ort-int8", lossless=False),
        Peer(
            "onnxslim",
            lossless=True,
            packages=("onnxslim==0.1.98", "onnx==1.23.2"),
            program="import sys, onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2])",
        ),
        Peer(
            "onnxsim",
            lossless=True,
            packages=("onnxsim==0.8.1", "onnx==1.23.2", "onnxruntime==1.32.0"),
            program=(
                "import sys, onnx, onnxsim; model, same = onnxsim.simplify(sys.argv[1]); "
                "onnx.save(model, sys.argv[2]); sys.exit(not same)"
            ),
        ),
        Peer("nncf", lossless=False, packages=("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0")),
        Peer("quark", lossless=False, packages=("amd-quark==0.13", "onnxruntime==1.32.0", "torch==2.13.0")),
        Peer(
            "inc",
            lossless=False,
            # It imports more than it says it requires.
            packages=("onnx-neural-compressor==1.0", "onnxruntime==1.32.0", *_UNDECLARED),
        ),
    )
}


def single(source: Path, calibration: Path, folder: Path) -> Path:
    """``folder`` with one file for each sample of the calibration data, as bench/quantizers.py reads them."""
    from onnxslim import data, model, workers

    samples = data.open_data(calibration, data.input_specs(model.load(source)))
    folder.mkdir()
    workers.write_feeds(list(samples.feeds()), folder, "sample")
    return folder


def environment(name: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of a virtual environment with exactly these packages and what they require."""
    folder = cache_root().parent / "peers" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "packages.txt"
    if not done.is_file() or done.read_text().split() != list(packages):
        print(f"making an environment with {' '.join(packages)}: {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        done.write_text("\n".join(packages))
    return python


def ort_int8(source: Path, target: Path, calibration: Path) -> list[str]:
    """Quantize as ONNX Runtime's guide says: pre-processed, QDQ, u8 activations, s8 weights per channel, MinMax.

    Returns what was done differently from the recipe.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from onnxslim import data, model

    notes = []
    prepared = target.with_name(f"{target.stem}.prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception as error:  # symbolic shape inference raises bare exceptions; its guide says to leave it out then
        notes.append(f"pre-processed without symbolic shape inference, which fails: {str(error) or repr(error)}")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    samples = data.open_data(calibration, data.input_specs(model.load(source)))
    quantize_static(
        str(prepared),
        str(target),
        quantizers.Reader([dict(feed) for feed in samples.feeds()]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return notes


if __name__ == "__main__":
    assert sys.argv[1] == "ort-int8", sys.argv
    given = [Path(argument) for argument in sys.argv[2:]]
    warnings = ort_int8(*given)
    given[1].with_suffix(".json").write_text(json.dumps({"warnings": warnings}))
