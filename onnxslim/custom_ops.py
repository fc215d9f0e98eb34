"""Libraries of custom operators: registered with every session, of this process and of those that measure."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnxslim.errors import UsageError

_LIBRARIES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("libraries", default=())


@contextlib.contextmanager
def using(paths: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Register the libraries ``paths`` too with every session that is made inside.

    Raises:
        UsageError: one is not a file.
    """
    found = []
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"{os.fspath(path)}: no such library of custom operators")
        found.append(os.path.abspath(path))  # noqa: PTH100 keeps links
    token = _LIBRARIES.set(tuple(dict.fromkeys((*_LIBRARIES.get(), *found))))
    try:
        yield
    finally:
        _LIBRARIES.reset(token)


def libraries() -> tuple[str, ...]:
    """Absolute paths of the libraries in use."""
    return _LIBRARIES.get()
