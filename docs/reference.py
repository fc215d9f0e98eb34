"""Writes the reference of the Python API as HTML, by pdoc (`pip install "onnxslim[docs]"`).

python docs/reference.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import onnxslim

# What users call, and what a pass of another package is written with.
MODULES = (
    "onnxslim",
    "onnxslim.contract",
    "onnxslim.data",
    "onnxslim.eps",
    "onnxslim.errors",
    "onnxslim.graph",
    "onnxslim.model",
    "onnxslim.report",
)


def write(folder: Path) -> None:
    """One page per module, an index and a search."""
    for name in onnxslim.__all__:  # names that are imported on first use are no attributes before
        getattr(onnxslim, name)
    pdoc.render.configure(docformat="google", footer_text=f"onnxslim {onnxslim.__version__}", show_source=False)
    pdoc.pdoc(*MODULES, output_directory=folder)


def main(arguments: list[str]) -> int:
    """Carry out the command line."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    write(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
