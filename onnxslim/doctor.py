"""What this installation can do: versions, execution providers that really run a model, instruction sets of the CPU."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# What decides how fast ONNX Runtime's kernels are: dot products of bytes above all.
INSTRUCTION_SETS = (
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PACKAGES = (
    "onnxslim",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "numpy",
    "scipy",
    "click",
    "rich",
)


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what onnxslim stands on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def processor() -> tuple[str, tuple[str, ...]]:
    """Model name of the CPU and the instruction sets of `INSTRUCTION_SETS` it has (Linux; elsewhere unknown)."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return name, tuple(s for s in INSTRUCTION_SETS if s in flags)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """The part of a report that says where its figures were measured."""
    name, sets = processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "instruction_sets": list(sets),
        "cores": cores(),
        "versions": versions(),
    }


def providers() -> dict[str, str]:
    """For each execution provider: ``runs``, ``runs in PYTHON`` (an environment of its own), or why it does not.

    Found by running a small convolution on it in this process.
    """
    import numpy as np
    import onnx_ir as ir

    from onnxslim import eps, runtime
    from onnxslim.errors import OnnxslimError

    rng = np.random.default_rng(0)
    data = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4, 8, 8]))
    weight = ir.tensor(rng.standard_normal((8, 4, 3, 3), np.float32), name="w")
    kernel = ir.Value(name="w", const_value=weight, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([8, 4, 3, 3]))
    node = ir.node("Conv", [data, kernel])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([1, 8, 6, 6])
    graph = ir.Graph(
        [data], [node.outputs[0]], nodes=[node], initializers=[kernel], opset_imports={"": 17}, name="probe"
    )
    model = ir.Model(graph, ir_version=8)
    feeds = {"x": rng.standard_normal((1, 4, 8, 8), np.float32)}
    wanted = runtime.load(model)(feeds)["y"]
    results = {}
    for ep in eps.PROVIDERS:
        try:
            runner = runtime.load(model, ep=ep)
            got = runtime.run(runner, feeds)["y"]
        except OnnxslimError as error:
            prepared = eps.interpreter(ep)
            results[ep] = f"runs in {prepared}" if prepared.exists() else f"does not run: {error}"
            continue
        used = runner.session.get_providers()
        if eps.PROVIDERS[ep] not in used:
            results[ep] = f"does not run: ONNX Runtime fell back to {used[0]}"
        elif not np.allclose(got, wanted, rtol=1e-2, atol=1e-2):
            results[ep] = f"runs, but its result is off by {np.abs(got - wanted).max():.1e}"
        else:
            results[ep] = "runs"
    return results
