"""Execution providers as the user writes them, and the interpreters they run in.

Grammar of ``--ep``: items separated by commas, each ``NAME``, ``NAME(option=value, ...)`` and, where another
interpreter has the provider, ``@/path/to/python`` behind it:

    cpu,openvino@/path/to/python,cuda(graph=true)

============ ===================================================================================================
``cpu``      ``affinity=[0, 1]`` cores; ``spin=true`` threads spin after a pass too, as ONNX Runtime's default has it
``cuda``     ``device=0``; ``graph=true`` capture and replay; ``copy=true`` count the copies to and from the device
``openvino`` ``device=CPU`` (GPU, NPU); ``precision=FP32`` (FP16, ACCURACY); ``cache=FOLDER``; ``streams=1``
``plugin``   ``package=MODULE`` or ``library="FILE"`` to register; ``name=PROVIDER``; ``hardware=CPU`` (GPU, NPU)
============ ===================================================================================================

Other options go to the provider as they are; it refuses those that it does not know.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxslim.errors import UsageError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# What brings a provider, in an environment of its own.
PACKAGES = {
    "cpu": ("onnxruntime",),
    "cuda": ("onnxruntime-gpu[cuda,cudnn]",),
    "openvino": ("onnxruntime-openvino",),
}
# Idle threads of one session would spin on the cores that the session measured next needs. Within a pass they may: a
# session has them spin by default, and without that a model of short kernels loses a quarter of its speed.
_QUIET = {"session.force_spinning_stop": "1"}
# Our option names for those of the providers.
_NAMES = {
    "cuda": {"device": "device_id"},
    "openvino": {"device": "device_type", "cache": "cache_dir", "streams": "num_streams"},
}
_PLUGIN = "plugin"


@dataclasses.dataclass(frozen=True)
class Ep:
    """One execution provider to measure on: what the user called it, its options, and its interpreter (None: find)."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    python: str | None = None

    @property
    def label(self) -> str:
        """The provider with its options, without the interpreter and folders: what tables call it."""
        shown = {k: Path(v).name if k in ("library", "cache") else _text(v) for k, v in self.options.items()}
        inside = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.name}({inside})" if inside else self.name

    def request(self) -> dict[str, Any]:
        """What `onnxslim.worker` is told about it."""
        options = dict(self.options)
        found: dict[str, Any] = {"provider": PROVIDERS.get(self.name, ""), "config": {}}
        if not options.pop("spin", False):
            found["config"] = dict(_QUIET)
        affinity = options.pop("affinity", None)
        if affinity is not None:
            found["affinity"] = list(affinity) if isinstance(affinity, tuple) else [affinity]
        if self.name == "cuda":
            found["graph"] = bool(options.pop("graph", False))
            copies = options.pop("copy", False)
            if copies and found["graph"]:
                raise UsageError("cuda: graph=true replays work on the device, so that copy=true has nothing to count")
            found["bind"] = None if copies else "cuda"
        elif self.name == "openvino":
            options.setdefault("device", "CPU")
            if "cache" in options:  # the worker runs in a folder of its own
                options["cache"] = os.path.abspath(str(options["cache"]))  # noqa: PTH100 as below
            found["threads_option"] = "num_of_threads"
        elif self.name == _PLUGIN:
            found.update((k, options.pop(k)) for k in ("package", "library", "hardware") if k in options)
            if "library" in found:
                found["library"] = os.path.abspath(found["library"])  # noqa: PTH100 keeps links
            found["provider"] = options.pop("name", "")
            if not ("package" in found or "library" in found):
                raise UsageError("plugin: give package=MODULE or library=FILE")
        elif options:
            raise UsageError(f"{self.name}: unknown option {next(iter(options))!r}: there are affinity and spin")
        names = _NAMES.get(self.name, {})
        found["options"] = {names.get(k, k): _text(v) for k, v in options.items()}
        return found

    def install_line(self) -> str:
        """The command that brings the provider."""
        if self.name in ("cuda", "openvino"):
            return f"onnxslim doctor --setup {self.name}"
        package = str(self.options.get("package", "onnxruntime")).replace("_", "-")
        return f"{shlex.quote(self.python or sys.executable)} -m pip install {package}"

    def pythons(self) -> list[str]:
        """Interpreters that may have it: the one given, else this one and the one that ``doctor --setup`` prepared."""
        if self.python is not None:
            return [self.python]
        prepared = interpreter(self.name)
        return [sys.executable, *([str(prepared)] if prepared.exists() else [])]


def parse(text: str) -> list[Ep]:
    """Read ``--ep``.

    Raises:
        UsageError: a malformed text, an unknown provider, or one that is given twice in the same way.
    """
    found: list[Ep] = []
    for part in _split(text):
        match = re.fullmatch(r"\s*([A-Za-z]\w*)\s*(\(.*?\))?\s*(?:@\s*(.+?))?\s*", part, re.DOTALL)
        if match is None:
            raise UsageError(
                f"execution providers {text!r}: {part.strip()!r} is not NAME(option=value)@/path/to/python"
            )
        name, options, python = match.groups()
        if name not in PROVIDERS and name != _PLUGIN:
            known = ", ".join((*PROVIDERS, f"{_PLUGIN}(package=...)"))
            raise UsageError(f"unknown execution provider {name!r}: give one of {known}")
        if python is not None and not Path(python).exists():
            raise UsageError(f"execution provider {name!r}: there is no interpreter {python}")
        # Links stay: an interpreter of a virtual environment is one.
        item = Ep(name, _options(name, options or "()"), None if python is None else str(Path(python).absolute()))
        if item in found:
            raise UsageError(f"execution provider {part.strip()!r} is given twice")
        item.request()
        found.append(item)
    return found


def _split(text: str) -> list[str]:
    """Cut at commas outside brackets."""
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _options(name: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args and all(k.arg for k in call.keywords)
        return {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        message = (
            f"execution provider {name}{text}: options are name=value pairs; quote a value with special characters"
        )
        raise UsageError(message) from error


def _value(node: ast.expr) -> Any:
    """A literal; bare and dotted words are texts."""
    words = {"true": True, "false": False}
    if isinstance(node, ast.Name | ast.Attribute):
        return words.get(ast.unparse(node), ast.unparse(node))
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    return ast.literal_eval(node)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def cache() -> Path:
    """Folder of what onnxslim keeps between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxslim"


def interpreter(name: str) -> Path:
    """The interpreter of the environment that `prepare` makes for the provider ``name``."""
    folder = cache() / "environments" / name
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def prepare(name: str) -> Path:
    """Make an environment with the provider ``name`` in the user's cache folder, from the package registry.

    Raises:
        UsageError: there is no package for it, or it cannot be installed here.
    """
    if name not in PACKAGES:
        raise UsageError(f"no environment can be made for {name!r}: give one of {', '.join(PACKAGES)}")
    python = interpreter(name)
    commands = [
        [sys.executable, "-m", "venv", "--without-pip", "--clear", str(python.parent.parent)],
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "numpy", *PACKAGES[name]],
    ]
    for command in commands:
        python.parent.parent.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise UsageError(f"{shlex.join(command)}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return python
