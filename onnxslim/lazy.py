"""Libraries that the command line loads only when something of theirs is used."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

# onnx_ir does arithmetic on symbolic dimensions with sympy, which takes longer to import than everything else
# together; nothing of ours asks it for that. Its own module beside it reads sympy as soon as it is executed.
UNUSED = ("sympy", "onnx_ir._symbolic_shapes")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def defer(names: Sequence[str] = UNUSED) -> None:
    """Execute the modules ``names`` on first use of an attribute, not when they are imported.

    For programs only, whose modules are theirs alone; those that are there already stay as they are.
    """
    sys.meta_path.insert(0, _Finder(names))
