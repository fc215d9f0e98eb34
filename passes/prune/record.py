"""What is kept of every weight, as JSON: to replay on the same file, or to cut a model in its own framework."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim.coupling import Coupling, Family
from onnxslim.errors import UsageError
from onnxslim.graph import is_constant
from onnxslim.passes.prune.importance import RIDGE, Order

VERSION = 1
Kept = dict[str, dict[int, np.ndarray]]  # per weight and axis the indices that stay


def kept(coupled: Coupling, atoms: np.ndarray) -> Kept:
    """The indices of every weight that stay when ``atoms`` leave, for axes that get shorter."""
    gone = coupled.removed(atoms)
    result: Kept = {}
    for value, axes in coupled.labels.items():
        for axis, labels in enumerate(axes):
            if labels is not None and is_constant(value) and gone(labels).any():
                result.setdefault(value.name or "", {})[axis] = np.flatnonzero(~gone(labels))
    return result


def composed(first: Kept, second: Kept) -> Kept:
    """What stays of the original weights when ``second`` is taken of what ``first`` has left."""
    result = {name: dict(axes) for name, axes in first.items()}
    for name, axes in second.items():
        for axis, indices in axes.items():
            before = first.get(name, {}).get(axis)
            result.setdefault(name, {})[axis] = indices if before is None else before[indices]
    return result


def write(path: str, indices: Kept, families: Sequence[Family] = (), leaving: Sequence[Order] = ()) -> None:
    """Write a plan; the file appears whole or not at all.

    Args:
        indices: see `kept`, of the weights as the pass got them.
        families, leaving: what `read` goes by, with the units that leave each family and what its readers are refitted
            with.
    """
    content = {
        "version": VERSION,
        "weights": {name: {str(axis): left.tolist() for axis, left in axes.items()} for name, axes in indices.items()},
        "families": [
            {"name": f.name, "units": len(f.atoms), "removed": sorted(int(u) for u in o.units), "ridge": o.ridge}
            for f, o in zip(families, leaving, strict=True)
        ],
    }
    target = Path(path)
    try:
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
        Path(draft).replace(target)
    except OSError as error:
        raise UsageError(f"prune: record={path!r} cannot be written: {error.strerror}") from error


def read(path: str, families: Sequence[Family]) -> dict[str, Order]:
    """The units that leave each of the ``families`` that the plan in ``path`` names, and what to refit with.

    Raises:
        UsageError: the file is no plan, or one for another model.
    """
    try:
        content: Any = json.loads(Path(path).read_text())
        entries: Mapping[str, Any] = {entry["name"]: entry for entry in content["families"]}
        version = content["version"]
        sizes = {name: int(entry["units"]) for name, entry in entries.items()}
        removed = {name: np.array(entry["removed"], np.int64) for name, entry in entries.items()}
        ridges = {name: float(entry.get("ridge", RIDGE)) for name, entry in entries.items()}
        weights = bool(content.get("weights"))
    except OSError as error:
        raise UsageError(f"prune: plan={path!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"prune: plan={path!r} is not a plan: write one with prune(record=...)") from error
    if version != VERSION:
        raise UsageError(f"prune: plan={path!r} is of version {version}, not {VERSION}: write it again")
    if weights and not entries:
        raise UsageError(f"prune: plan={path!r} was written by prune(lossless=true): run that again, it needs no plan")
    here = {f.name: len(f.atoms) for f in families}
    for name, count in sizes.items():
        if not len(removed[name]):
            continue
        if here.get(name) != count or removed[name].min() < 0 or removed[name].max() >= count:
            found = f"has {here[name]} units" if name in here else "is not among the families"
            raise UsageError(f"prune: plan={path!r} is for another model: {name} {found} here, {count} there")
    return {name: Order(units, np.zeros(len(units)), ridges[name]) for name, units in removed.items() if name in here}
