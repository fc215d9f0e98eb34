"""How often Python looks for cyclic garbage while a model is worked on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# Python's own number (700) is for programs that make few objects; a graph is made of hundreds of thousands that stay.
_OBJECTS = 10_000


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Collect after `_OBJECTS` new objects, where the process would do so sooner; as before in the end."""
    before = gc.get_threshold()
    if 0 < before[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
