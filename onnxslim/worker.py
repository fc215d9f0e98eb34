"""Measures models in the interpreter that has the execution provider: copied there, needs onnxruntime and numpy only.

`onnxruntime`, `onnxruntime-gpu` and `onnxruntime-openvino` cannot live in one environment. This file is therefore
copied with `rounds` and started as ``/their/python -m PACKAGE.worker``; it imports nothing else of onnxslim. Requests
and answers are lines of JSON on stdin and stdout; arrays travel as ``.npz`` files. A request is ``{"do": NAME, ...}``
with the arguments of the method `Worker.NAME`; an answer is ``{"ok": RESULT}``, or ``{"error": TEXT}`` on one line.

``ep`` in a request says how sessions are made:

    provider   name that ONNX Runtime knows it by, ``CUDAExecutionProvider``
    options    its options by name, texts
    config     session configuration entries by name, texts
    library    plugin library to register, or ``package``: a Python package that says where its library is;
               ``hardware`` chooses among the devices it offers, ``CPU``, ``GPU`` or ``NPU``
    threads_option  name of the provider's own option for the number of threads
    affinity   cores that the process may use
    bind       ``cuda``: inputs and outputs stay on the device and every pass ends with a synchronization
    custom_ops libraries of custom operators, absolute paths
    graph      capture the work of a pass once and replay it (CUDA graphs; implies fixed shapes)
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .rounds import Call, block

_FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


def fitted(inputs: Sequence[Any], feed: Mapping[str, Any]) -> dict[str, Any]:
    """What a session with ``inputs`` takes of a sample; floats are converted where it declares another float type."""
    wanted = {i.name: _FLOATS.get(i.type) for i in inputs}
    arrays = {name: feed[name] for name in wanted}
    return {
        name: array.astype(kind) if (kind := wanted[name]) is not None and _other_float(array, kind) else array
        for name, array in arrays.items()
    }


def _other_float(array: Any, kind: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.dtype != kind


def mute(ort: Any) -> None:
    """Have ONNX Runtime report nothing more about models, unless the environment says that it may.

    Where it was imported before onnxslim, and on Windows, the variable alone comes too late or is not read.
    """
    if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
        ort.disable_telemetry_events()


class Session:
    """One model on one execution provider; ``session(k)`` runs it once on sample k, cyclically."""

    def __init__(
        self, path: str, ep: Mapping[str, Any], feeds: Sequence[Mapping[str, np.ndarray]], threads: int, **more: Any
    ) -> None:
        import onnxruntime as ort

        self.ort = ort
        self.ep = ep
        start = time.perf_counter()
        self.session = ort.InferenceSession(path, **session_arguments(ort, ep, threads, **more))
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.outputs = [o.name for o in self.session.get_outputs()]
        names = [i.name for i in self.session.get_inputs()]
        lacking = [name for name in names if feeds and name not in feeds[0]]
        if lacking:
            raise ValueError(f"{path}: has the input {lacking[0]!r}, the samples have {sorted(feeds[0])}")
        self.feeds = [fitted(self.session.get_inputs(), feed) for feed in feeds]
        self._bound: list[Any] = []
        self._call: Call = self._plain
        if ep.get("bind"):
            self._bind(path, threads)

    def __call__(self, k: int) -> Any:
        return self._call(k)

    def _plain(self, k: int) -> Any:
        return self.session.run(None, self.feeds[k % len(self.feeds)])

    def _bind(self, path: str, threads: int) -> None:
        """Put the inputs on the device; with a captured graph the outputs too get one address for good."""
        device, ort = str(self.ep["bind"]), self.ort
        index = device_index(self.ep)
        graph = bool(self.ep.get("graph"))
        fixed: list[Any] = []
        if graph:
            # Captured work reads and writes the addresses of its capture: sizes come from a session without one.
            plain = {**self.ep, "graph": False, "bind": None}
            sizes = Session(path, plain, self.feeds[:1], threads).session.run(None, self.feeds[0])
            fixed = [ort.OrtValue.ortvalue_from_numpy(array, device, index) for array in sizes]
        for feed in self.feeds[:1] if graph else self.feeds:
            binding = self.session.io_binding()
            for name, array in feed.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, index))
            for position, name in enumerate(self.outputs):
                if graph:
                    binding.bind_ortvalue_output(name, fixed[position])
                else:
                    binding.bind_output(name, device, index)
            self._bound.append(binding)
        self._call = self._on_device

    def _on_device(self, k: int) -> None:
        binding = self._bound[k % len(self._bound)]
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def session_arguments(
    ort: Any, ep: Mapping[str, Any], threads: int, *, config: Mapping[str, str] | None = None, profile: str = ""
) -> dict[str, Any]:
    """Arguments of ``InferenceSession`` for an execution provider, followed by the CPU for what it does not take."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 4
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    for key, value in {**ep.get("config", {}), **(config or {})}.items():
        chosen.add_session_config_entry(key, value)
    for library in ep.get("custom_ops", ()):
        chosen.register_custom_ops_library(library)
    if profile:
        chosen.enable_profiling = True
        chosen.profile_file_prefix = profile
    name, options = str(ep["provider"]), {k: str(v) for k, v in ep.get("options", {}).items()}
    if ep.get("graph"):
        options["enable_cuda_graph"] = "1"
    if threads and ep.get("threads_option"):
        options.setdefault(str(ep["threads_option"]), str(threads))
    if ep.get("library") or ep.get("package"):
        devices = [d for d in ort.get_ep_devices() if d.ep_name == name]
        wanted = str(ep.get("hardware", ""))
        devices = [d for d in devices if not wanted or str(d.device.type).rpartition(".")[2] == wanted.upper()]
        if not devices:
            raise ValueError(f"{name} offers no {wanted or 'device'} on this machine")
        chosen.add_provider_for_devices(devices[:1], options)
        return {"sess_options": chosen}
    providers: list[Any] = [(name, options)]
    if name != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    # A provider that refuses its options is an error, not a reason to measure the CPU in its place.
    return {"sess_options": chosen, "providers": providers, "enable_fallback": 0}


class Worker:
    """Answers requests; each method is one kind of request and returns plain values."""

    def __init__(self) -> None:
        import onnxruntime as ort

        self.ort = ort
        mute(ort)
        ort.set_default_logger_severity(4)
        self._registered: dict[str, str] = {}  # provider by library

    def hello(self, ep: Mapping[str, Any]) -> dict[str, Any]:
        """Get ready for ``ep``; what is here: ``version``, ``providers``, ``available`` and, for plugins, its name."""
        if ep.get("affinity"):
            if not hasattr(os, "sched_setaffinity"):
                raise ValueError("affinity: this system has no call that binds a process to cores")
            cores = os.sched_getaffinity(0)
            try:
                os.sched_setaffinity(0, {int(core) for core in ep["affinity"]})
            except OSError:
                raise ValueError(f"affinity: no such core; there are {sorted(cores)}") from None
        if ep.get("bind") == "cuda" and hasattr(self.ort, "preload_dlls"):
            self.ort.preload_dlls()
        name = self._register(ep)
        here = list(self.ort.get_available_providers())
        here += [d.ep_name for d in self.ort.get_ep_devices()] if hasattr(self.ort, "get_ep_devices") else []
        return {
            "version": self.ort.__version__,
            "python": platform.python_version(),
            "providers": list(dict.fromkeys(here)),
            "provider": name,
            "available": name in here,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    def _register(self, ep: Mapping[str, Any]) -> str:
        """Register the library of a plugin, once, and return the name of its execution provider."""
        library, package, name = ep.get("library"), ep.get("package"), str(ep.get("provider") or "")
        if not library and not package:
            return name
        if package:
            module = importlib.import_module(str(package))
            library, name = module.get_library_path(), name or module.get_ep_name()
        if str(library) not in self._registered:
            before = {d.ep_name for d in self.ort.get_ep_devices()}
            self.ort.register_execution_provider_library(name or Path(str(library)).stem, str(library))
            found = [d.ep_name for d in self.ort.get_ep_devices() if d.ep_name not in before]
            if not found:
                raise ValueError(f"{library} is registered, but offers no device on this machine")
            self._registered[str(library)] = name if name in found else found[0]
        return self._registered[str(library)]

    def block(
        self, models: Sequence[Mapping[str, Any]], ep: Mapping[str, Any], seconds: float, seed: str
    ) -> dict[str, list[Any]]:
        """One `block` of all ``models``: each has ``path``, ``threads`` and ``feeds`` (files of one sample each)."""
        feeds = {tuple(m["feeds"]): read_feeds(m["feeds"]) for m in models}

        def maker(model: Mapping[str, Any]) -> Callable[[], Call]:
            return lambda: Session(model["path"], ep, feeds[tuple(model["feeds"])], int(model["threads"]))

        alone = ep["provider"] == "CPUExecutionProvider"
        single = [alone and int(m["threads"]) == 1 for m in models]
        return block([maker(m) for m in models], seconds, random.Random(seed), single=single)

    def cold(self, path: str, ep: Mapping[str, Any], feeds: Sequence[str], threads: int) -> dict[str, Any]:
        """Load and run once; meant as the first and only work of a process.

        Returns ``load_ms``, ``first_ms``, ``peak_bytes`` (of the process), ``runtime_bytes`` (of it before loading) and
        ``device_bytes`` (taken on the device, None where that cannot be told).
        """
        samples = read_feeds(feeds[:1])
        before, device = peak_memory(), device_memory(ep)
        session = Session(path, ep, samples, threads)
        start = time.perf_counter()
        session(0)
        first = 1e3 * (time.perf_counter() - start)
        taken = device_memory(ep)
        return {
            "load_ms": session.load_ms,
            "first_ms": first,
            "peak_bytes": peak_memory(),
            "runtime_bytes": before,
            "device_bytes": taken - device if taken is not None and device is not None else None,
        }

    def placement(self, path: str, ep: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Where the nodes go: ``nodes`` is {provider: {operator: count}}, ``providers`` those that the session uses."""
        config = {"session.record_ep_graph_assignment_info": "1"}
        session = Session(path, {**ep, "bind": None, "graph": False}, [], threads, config=config).session
        nodes: dict[str, collections.Counter[str]] = {}
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return {"providers": session.get_providers(), "nodes": None}
        for part in session.get_provider_graph_assignment_info():
            nodes.setdefault(part.ep_name, collections.Counter()).update(n.op_type for n in part.get_nodes())
        return {"providers": session.get_providers(), "nodes": {name: dict(count) for name, count in nodes.items()}}

    def profile(
        self, path: str, ep: Mapping[str, Any], feeds: Sequence[str], threads: int, rounds: int
    ) -> list[dict[str, Any]]:
        """Kernels that ran, the median ms of a pass each takes, and the element types it reads.

        One row per node: ``name``, ``operator``, ``provider``, ``inputs`` (element types), ``ms``, ``calls`` per pass.
        """
        with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
            unbound = {**ep, "bind": None, "graph": False}
            session = Session(path, unbound, read_feeds(feeds), threads, profile=str(Path(folder) / "profile"))
            for k in range(rounds):
                session(k)
            events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
        return kernels(events, rounds)

    def run(self, path: str, ep: Mapping[str, Any], feeds: Sequence[str], threads: int, out: str) -> list[str]:
        """Outputs for every sample, written to ``out`` as ``{sample}:{output}``; the names of the outputs."""
        session = Session(path, {**ep, "bind": None, "graph": False}, read_feeds(feeds), threads)
        arrays: dict[str, Any] = {}
        for k in range(len(feeds)):
            arrays.update((f"{k}:{n}", a) for n, a in zip(session.outputs, session(k), strict=True))
        np.savez(out, **arrays)
        return session.outputs


def kernels(events: Sequence[Mapping[str, Any]], passes: int) -> list[dict[str, Any]]:
    """The kernel rows of a profile of ``passes`` passes; the first pass is left out when there are more."""
    times: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name = name.removesuffix("_kernel_time")
        times.setdefault(name, []).append(float(event["dur"]) / 1e3)
        arguments = event.get("args", {})
        facts[name] = {
            "name": name,
            "operator": arguments.get("op_name", ""),
            "provider": arguments.get("provider", ""),
            "inputs": [key for shape in arguments.get("input_type_shape", []) for key in shape],
        }
    rows = []
    for name, found in times.items():
        calls = max(1, round(len(found) / passes))
        warm = found[calls:] if passes > 1 else found
        # A node in a loop body runs several times per pass: what counts is its share of one pass.
        rows.append({**facts[name], "calls": calls, "ms": statistics.median(warm or found) * len(found) / passes})
    return rows


def read_feeds(paths: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """One sample per ``.npz`` file: ``names``, and ``a0`` for the first of them, ``a1`` and so on.

    Texts come back as Python objects, which is what ONNX Runtime takes.
    """
    feeds = []
    for path in paths:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[f"a{k}"] for k in range(len(archive["names"]))]
            names = [str(name) for name in archive["names"]]
        feeds.append({n: a.astype(object) if a.dtype.kind == "U" else a for n, a in zip(names, arrays, strict=True)})
    return feeds


def peak_memory() -> int | None:
    """Largest resident size of this process so far, bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # the resource usage that a process begins with may be that of the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def device_index(ep: Mapping[str, Any]) -> int:
    """Which of several devices of its kind the provider runs on."""
    return int(ep.get("options", {}).get("device_id", 0))


def device_memory(ep: Mapping[str, Any]) -> int | None:
    """Bytes in use on the NVIDIA device, by its management library; None elsewhere or without it."""
    if ep.get("bind") != "cuda":
        return None

    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), Memory()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(device_index(ep), ctypes.byref(handle)):
        return None
    return None if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.used)


def serve(requests: Any, answers: Any) -> None:
    """Answer requests line by line until the other side closes."""
    worker: Worker | None = None
    for line in requests:
        request = json.loads(line)
        try:
            worker = worker or Worker()
            answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # whatever a runtime raises is an answer
            text = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": text, "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve stdin; whatever libraries print goes to stderr, since stdout carries the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
