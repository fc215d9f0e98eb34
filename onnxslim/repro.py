"""What reproduces a defect of onnxslim: a folder ``repro`` with the model, the pipeline and the traceback."""

from __future__ import annotations

import shlex
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim import doctor

if TYPE_CHECKING:
    import onnx_ir as ir


def leave(
    error: BaseException,
    *,
    model: ir.Model | None = None,
    pipeline: str | None = None,
    command: Sequence[str] | None = None,
) -> Path:
    """Write what is known about ``error`` to a new folder in the current one, and return its path.

    ``model.onnx`` is the model as it was before the failing pass, ``pipeline.txt`` that pass, ``command.txt`` the
    command line that failed, ``error.txt`` the traceback and the environment.
    """
    folder = _new_folder()
    facts = "\n".join(f"{name}: {value}" for name, value in doctor.environment().items())
    (folder / "error.txt").write_text(
        "".join(traceback.format_exception(error)) + "\n" + facts + "\n", encoding="utf-8"
    )
    if pipeline is not None:
        (folder / "pipeline.txt").write_text(pipeline + "\n", encoding="utf-8")
    if command is not None:
        (folder / "command.txt").write_text(shlex.join(["onnxslim", *command]) + "\n", encoding="utf-8")
    if model is not None:
        from onnxslim.model import save

        save(model, folder / "model.onnx")
    return folder


def _new_folder() -> Path:
    for k in range(1, 1000):
        folder = Path.cwd() / ("repro" if k == 1 else f"repro-{k}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError:  # the current folder is read-only
            break
        return folder
    return Path(tempfile.mkdtemp(prefix="onnxslim-repro-"))
