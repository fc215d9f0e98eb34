"""A stand-in for onnxruntime with a CUDA device: put on the path of a worker as ``onnxruntime``. It computes nothing.

What is done with it is written to the file named by FAKE_LOG, one line each.
"""

import os
from types import SimpleNamespace

import numpy as np

__version__ = "0.fake"
PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def log(*words):
    with open(os.environ["FAKE_LOG"], "a") as file:  # noqa: PTH123
        print(*words, file=file)


def set_default_logger_severity(level):
    pass


def disable_telemetry_events():
    pass


def preload_dlls():
    log("preload_dlls")


def get_available_providers():
    return PROVIDERS


def get_ep_devices():
    return [SimpleNamespace(ep_name="CPUExecutionProvider", device=SimpleNamespace(type="CPU"))] + [
        SimpleNamespace(ep_name=name, device=SimpleNamespace(type="GPU")) for name in _plugins
    ]


_plugins = []


def register_execution_provider_library(name, path):
    log("register", name, path)
    if "deviceless" not in path:
        _plugins.append("PluggedExecutionProvider")


class SessionOptions:
    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value

    def register_custom_ops_library(self, path):
        log("custom_ops", path)

    def add_provider_for_devices(self, devices, options):
        log("devices", [d.ep_name for d in devices], options)


class OrtValue:
    @staticmethod
    def ortvalue_from_numpy(array, device, index):
        assert isinstance(array, np.ndarray)
        log("value", list(array.shape), device, index)
        return OrtValue()


class Binding:
    def bind_ortvalue_input(self, name, value):
        log("input", name)

    def bind_output(self, name, device, index):
        log("output", name, device, index)

    def bind_ortvalue_output(self, name, value):
        log("output-value", name)

    def synchronize_outputs(self):
        log("synchronize")


class InferenceSession:
    def __init__(self, path, sess_options, providers=None, enable_fallback=1):
        if "refused" in path and providers and providers[0][0] == "CUDAExecutionProvider":
            assert not enable_fallback
            raise RuntimeError("no such option")
        log("session", providers, sess_options.entries)
        if "crash" in path:
            os.abort()
        self.fell_back = "fallback" in path

    def get_inputs(self):
        return [SimpleNamespace(name="x", type="tensor(float)")]

    def get_outputs(self):
        return [SimpleNamespace(name="y")]

    def get_providers(self):
        return ["CPUExecutionProvider"] if self.fell_back else PROVIDERS

    def io_binding(self):
        return Binding()

    def run(self, names, feeds):
        log("run")
        return [np.zeros((1, 3), np.float32)]

    def run_with_iobinding(self, binding):
        log("run-bound")

    def get_provider_graph_assignment_info(self):
        def part(name, *ops):
            nodes = [SimpleNamespace(op_type=op) for op in ops]
            return SimpleNamespace(ep_name=name, get_nodes=lambda: nodes)

        return [
            part("CUDAExecutionProvider", "Conv", "Relu"),
            part("CPUExecutionProvider", "NonMaxSuppression", "TopK", "TopK"),
        ]
