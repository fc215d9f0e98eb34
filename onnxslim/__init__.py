"""Make any ONNX file smaller and faster, with the proof that it is still right.

    result = onnxslim.optimize("in.onnx", "prune(ratio=0.3),int8", calibration="data.npz")
    result.save("out.onnx")

Everything is imported on first use: ``import onnxslim`` itself costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim.api import Result, optimize
    from onnxslim.dropin import slim
    from onnxslim.errors import CheckError, DataError, InputError, ModelError, OnnxslimError, UsageError
    from onnxslim.report import Report

# ONNX Runtime as it is distributed reports the models it loads to its makers, from a thread of its own and with an id
# that it leaves in the home folder. It reads this when it is imported; processes started from here inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_WHERE = {
    "CheckError": "errors",
    "DataError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "OnnxslimError": "errors",
    "Report": "report",
    "Result": "api",
    "UsageError": "errors",
    "optimize": "api",
    "slim": "dropin",
}

__all__ = [
    "CheckError",
    "DataError",
    "InputError",
    "ModelError",
    "OnnxslimError",
    "Report",
    "Result",
    "UsageError",
    "__version__",
    "optimize",
    "slim",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        import importlib.metadata

        value: Any = importlib.metadata.version("onnxslim")
    elif name in _WHERE:
        value = getattr(importlib.import_module(f"onnxslim.{_WHERE[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
