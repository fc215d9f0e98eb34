"""``onnxslim.toml``: one recipe that a team shares, for ``onnxslim run``.

    passes = "prune,int8"        # any long option of the command, without its dashes
    max-drop = "1%"

    [[model]]
    in = "net.onnx"
    out = "net.slim.onnx"
    calib = "calib.npz"          # what a model needs of its own goes before what all have

Lists stand for options that may be repeated, ``true`` for a flag. Paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnxslim.errors import UsageError

NAME = "onnxslim.toml"


@dataclasses.dataclass(frozen=True)
class Job:
    """One model of a recipe: the arguments of the command that makes it."""

    source: str
    target: str
    arguments: tuple[str, ...]


def read(path: Path, options: Collection[str], flags: Collection[str], several: Collection[str]) -> list[Job]:
    """The jobs of a recipe.

    Args:
        options: long options that the command has, without dashes; ``flags`` those of them that take no value, and
            ``several`` those that may be repeated.

    Raises:
        UsageError: the file cannot be read, is no TOML, or holds what the command does not know.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    models = content.pop("model", [])
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) for m in models):
        raise UsageError(f"{path}: has no [[model]] with 'in' and 'out'")
    jobs = []
    for number, own in enumerate(models, 1):
        where = f"{path}: model {number}"
        found = {}
        for name in ("in", "out"):
            value = own.pop(name, None)
            if not isinstance(value, str) or not value:
                raise UsageError(f"{where}: {name!r} must be the name of a file")
            found[name] = value
        arguments: list[str] = []
        for name, value in {**content, **own}.items():
            if name not in options:
                near = difflib.get_close_matches(name, options, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"{where}: unknown option {name!r}: there are {', '.join(sorted(options))}{hint}")
            if isinstance(value, list) and name not in several:
                raise UsageError(f"{where}: {name} takes one value, not a list")
            arguments += _arguments(name, value, name in flags, where)
        jobs.append(Job(found["in"], found["out"], tuple(arguments)))
    targets = [job.target for job in jobs]
    twice = next((t for t in targets if targets.count(t) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: two models would be written to {twice}")
    return jobs


def _arguments(name: str, value: Any, flag: bool, where: str) -> list[str]:
    if flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: {name} must be true or false")
        return [f"--{name}"] if value else []
    found = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool | Mapping | list):
            raise UsageError(f"{where}: {name} must be a text, a number or a list of them")
        found += [f"--{name}", str(item)]
    return found
