"""Processes that measure: one for each execution provider, in the interpreter that has it (see `onnxslim.worker`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim import custom_ops
from onnxslim.eps import Ep
from onnxslim.errors import ModelError, UsageError

# What the other interpreter gets, as a package.
_PACKAGE, SOURCES = "onnxslim_worker", ("worker.py", "rounds.py")


class MissingError(UsageError):
    """No interpreter at hand has the execution provider."""


class RefusedError(ModelError):
    """A worker has the execution provider, and says what is wrong with what it was asked."""


class Process:
    """A running worker for one execution provider.

    Attributes:
        facts: the answer to ``hello``: ``version`` of onnxruntime, ``python``, ``provider``, ``available``.
    """

    def __init__(self, ep: Ep, python: str, folder: Path) -> None:
        self.ep = ep
        self.python = python
        self.request = {**ep.request(), "custom_ops": list(custom_ops.libraries())}
        # From a folder of its own: beside this file the names of our modules would hide those of the library.
        if not (folder / _PACKAGE).exists():
            (folder / _PACKAGE).mkdir()
            for name in SOURCES:
                shutil.copyfile(Path(__file__).with_name(name), folder / _PACKAGE / name)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        try:
            self._process = subprocess.Popen(
                [python, "-m", f"{_PACKAGE}.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=folder,
                env=_environment(python),
            )
        except OSError as error:
            raise UsageError(f"{ep.name}: cannot start {python}: {error.strerror}") from error
        try:
            self.facts: dict[str, Any] = self.ask("hello", ep=self.request)
        except BaseException:
            self.close()
            raise
        self.request["provider"] = self.facts["provider"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """The result of one request.

        Raises:
            ModelError: the worker refuses the request, or died over it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # it died; Windows has other errors for that than a broken pipe
            line = ""
        if not line:
            raise ModelError(f"{self.ep.label}: {self._died()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = RefusedError if answer["kind"] == "ValueError" else ModelError
            raise kind(f"{self.ep.label}: {answer['error']}")
        return answer["ok"]

    def _died(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._errors.seek(0)
        last = next((line.strip() for line in reversed(self._errors.readlines()) if line.strip()), "")
        return f"its process ({self.python}) {how}{f': {last}' if last else ''}"

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(python: str) -> dict[str, str]:
    """Variables of a worker: it is found in its folder, and another interpreter has its own libraries."""
    left_out = {"PYTHONSAFEPATH"} if python == sys.executable else {"PYTHONSAFEPATH", "PYTHONPATH", "PYTHONHOME"}
    return {name: value for name, value in os.environ.items() if name not in left_out}


def start(ep: Ep, folder: Path) -> Process:
    """A worker in the first interpreter that has ``ep``.

    Raises:
        MissingError: none has it; the message says what brings it, where that would help.
    """
    reasons, lacking = [], False
    for python in ep.pythons():
        try:
            process = Process(ep, python, folder)
        except (ModelError, UsageError) as error:
            reasons.append(str(error))
            lacking |= not isinstance(error, RefusedError)
            continue
        lacking = True
        if process.facts["available"]:
            return process
        version = process.facts["version"]
        process.close()
        name = process.request["provider"] or ep.name
        reasons.append(f"onnxruntime {version} of {python} has no {name}")
    hint = f"; install it with: {ep.install_line()}" if lacking else ""
    raise MissingError(f"{ep.name} cannot be measured: {'; '.join(reasons)}{hint}")


def write_feeds(feeds: Sequence[Mapping[str, np.ndarray]], folder: Path, name: str) -> list[str]:
    """One ``.npz`` file per sample, as `onnxslim.worker.read_feeds` reads them."""
    paths = []
    for k, feed in enumerate(feeds):
        path = folder / f"{name}-{k}.npz"
        # Numbered, since an input may be called like an argument of the function that writes.
        arrays = {f"a{i}": a.astype(str) if a.dtype.kind == "O" else a for i, a in enumerate(feed.values())}
        np.savez(path, names=np.array(list(feed)), **arrays)  # type: ignore[arg-type]
        paths.append(str(path))
    return paths


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder for the script and the samples of workers."""
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as path:
        yield Path(path)
