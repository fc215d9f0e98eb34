"""From the text ``prune(ratio=0.5),int8`` to passes that ran, each checked and rolled back when it fails.

Grammar: passes separated by commas; a pass is a name, optionally followed by ``name=value`` options in parentheses.
Values are literals: numbers, ``true``, ``false``, ``none``, quoted strings, bare words, lists in brackets, and mappings
in braces, ``{'name': value}``.
``parse(str(p))`` gives ``p`` back.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.metadata
import math
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import onnx_ir as ir

from onnxslim import guard
from onnxslim.contract import Context, Effect, Missed, Outcome, Pass, Skip, literal
from onnxslim.errors import CheckError, DataError, UsageError

GROUP = "onnxslim.passes"
_MISFIT = object()
# How often a pass is tried, each time more careful, before it is undone for what it costs.
ATTEMPTS = 4


@functools.cache
def registry() -> dict[str, importlib.metadata.EntryPoint]:
    """Installed passes by name, read from the entry-point group ``onnxslim.passes``; nothing is imported yet.

    Raises:
        UsageError: two installed packages offer a pass of the same name.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise UsageError(
                f"two installed packages offer a pass named {entry.name!r}: {found[entry.name].value} and {entry.value}"
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def find(name: str) -> type[Pass]:
    """The class of the pass called ``name``.

    Raises:
        UsageError: no such pass; the message names the nearest.
    """
    entries = registry()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown pass {name!r}: there are {', '.join(entries)}{hint}")
    try:
        loaded = entries[name].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"pass {name!r} ({entries[name].value}) cannot be imported: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UsageError(f"{entries[name].value} (pass {name!r}) is not a subclass of onnxslim.contract.Pass")
    return loaded


def parse(text: str) -> list[Pass]:
    """Read a textual pipeline.

    Raises:
        UsageError: a malformed text, an unknown pass or option, a value of the wrong type or range.
    """
    return [_build(name, options) for name, options in _split(text)]


def complete(passes: Sequence[Pass]) -> list[Pass]:
    """``passes`` with what they want inserted before and behind them, in the order that will run.

    Raises:
        UsageError: a pass that changes weights stands after one that must be last (quantization).
    """
    result: list[Pass] = []
    seen: set[str] = set()
    named = {item.name for item in passes}

    def add(item: Pass, above: tuple[str, ...] = ()) -> None:
        for wanted in _wants(item):
            if wanted.name not in seen and wanted.name not in above:  # of two that want each other the first leads
                add(wanted, (*above, item.name))
        closing = next((p for p in result if p.last), None)
        if closing is not None and not item.last and item.name not in {p.name for p in _wants(closing)}:
            raise UsageError(f"{item.name} must come before {closing.name}: write {item.name},{closing.name}")
        seen.add(item.name)
        result.append(item)

    for k, item in enumerate(passes):
        add(item)
        later = passes[k + 1 :]
        done = named | seen | {name for p in later for name in p.does}
        for follower in parse(item.then) if item.then and item.then not in {p.then for p in later} else ():
            if follower.name not in done:
                add(follower)
    return result


def _wants(item: Pass) -> list[Pass]:
    """The passes that ``item`` wants before it."""
    return [wanted for text in item.wants for wanted in parse(text)]


@dataclasses.dataclass
class Step:
    """One pass that ran: its outcome, its time, and the error when it was rolled back."""

    item: Pass
    seconds: float
    outcome: Outcome
    error: str | None = None


def run(
    model: ir.Model,
    passes: Sequence[Pass],
    ctx: Context,
    check: Callable[[ir.Model, ir.Model, Pass], str | None],
    on_error: Callable[[ir.Model, Pass, Exception], None],
) -> tuple[ir.Model, list[Step]]:
    """Apply ``passes`` in order; each works on a clone (weights are shared) that is dropped when it fails.

    Args:
        check: called with (before, after, pass); a string says which promise was broken, and the pass is undone. Where
            it is a `Missed` budget, the pass is first tried again with options that change less, if it has such.
        on_error: called with (before, pass, error) for an unexpected exception, to leave a reproduction behind.

    Returns:
        The new model (the input is untouched) and one `Step` per pass.
    """
    steps = []
    for item in ctx.progress.track(passes, total=len(passes), label="passes"):
        start = time.perf_counter()
        guard.doing(f"the pass {item}", guard.OURS)
        for attempt in range(ATTEMPTS):
            said = list(ctx.warnings)
            draft, outcome, error = _attempt(model, item, ctx, check, on_error)
            careful = item.careful(outcome) if isinstance(error, Missed) and attempt < ATTEMPTS - 1 else None
            if careful is None:
                break
            ctx.warnings[:] = [*said, f"{item} overran the budget and was made more careful: {error}"]
            item = careful
        if error is None:
            model = draft
            if item.effect is Effect.LOSSY and not outcome.skipped and not _did(outcome):
                why = f"the model has nothing that {item.name} changes (onnxslim passes {item.name} says what it does)"
                outcome.skipped.append(Skip("*", why))
        else:
            ctx.warnings.append(f"{item} was undone: {error}")
            outcome = Outcome(skipped=[*outcome.skipped, Skip("*", f"undone: {error}")])
        steps.append(Step(item, time.perf_counter() - start, outcome, error))
    return model, steps


def _attempt(
    model: ir.Model,
    item: Pass,
    ctx: Context,
    check: Callable[[ir.Model, ir.Model, Pass], str | None],
    on_error: Callable[[ir.Model, Pass, Exception], None],
) -> tuple[ir.Model, Outcome, str | None]:
    """What ``item`` makes of a clone of ``model``, and why that cannot be kept."""
    draft = model.clone()
    draft.meta.update(model.meta)
    outcome = Outcome()
    try:
        outcome = item.apply(draft, ctx)
        return draft, outcome, check(model, draft, item)
    except (UsageError, DataError):
        raise
    except CheckError as failure:  # the pass found out by itself
        return draft, outcome, str(failure)
    except Exception as failure:  # a defect in one pass must not cost the user the others
        on_error(model, item, failure)
        return draft, outcome, f"internal error: {type(failure).__name__}: {failure}"


def _did(outcome: Outcome) -> bool:
    """True when some figure says that something was done."""
    return any(bool(v) and not isinstance(v, bool) for v in outcome.stats.values())


def strictest(passes: Sequence[Pass]) -> Effect:
    """The weakest promise among ``passes``: what the whole pipeline can promise."""
    order = [Effect.EXACT, Effect.ROUNDING, Effect.LOSSY]
    return max((p.effect for p in passes), key=order.index, default=Effect.EXACT)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Cut at commas outside parentheses, brackets and quotes into (name, options)."""
    depth, quote, start, escaped = 0, "", 0, False
    parts: list[str] = []
    for k, char in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
            if depth < 0:
                raise UsageError(f"pipeline {text!r}: unexpected {char!r} at character {k + 1}")
        elif char == "," and depth == 0:
            parts.append(text[start:k])
            start = k + 1
    if depth or quote:
        raise UsageError(f"pipeline {text!r}: unclosed {'quote' if quote else 'parenthesis'}")
    parts.append(text[start:])
    for part in parts:
        match = re.fullmatch(r"\s*([A-Za-z_][\w-]*)\s*(?:\((.*)\))?\s*", part, re.DOTALL)
        if match is None:
            raise UsageError(
                f"pipeline {text!r}: {part.strip() or 'an empty item'!r} is not name or name(option=value)"
            )
        yield match.group(1), match.group(2) or ""


def _build(name: str, options: str) -> Pass:
    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    # Bare words are strings except the three literals; Python's own parser then does the rest, and evaluates nothing.
    try:
        call = ast.parse(f"f({options})", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{name}({options}): options are name=value pairs separated by commas") from error
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise UsageError(f"{name}({options}): options are name=value pairs separated by commas")
    if call.args or any(k.arg is None for k in call.keywords):
        raise UsageError(f"{name}({options}): options are name=value pairs; {name} has {', '.join(fields) or 'none'}")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        option = str(keyword.arg)
        if option not in fields:
            near = difflib.get_close_matches(option, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{name}: unknown option {option!r}: there are {', '.join(fields) or 'none'}{hint}")
        if option in values:
            raise UsageError(f"{name}: option {option!r} is given twice")
        values[option] = _typed(name, option, _literal(keyword.value, f"{name}({option}=...)"), hints[option])
    return cls(**values)


def _literal(node: ast.expr, where: str) -> Any:
    words = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}
    if isinstance(node, ast.Name):
        return words.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_literal(item, where) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_literal(key, where) for key in node.keys if key is not None]
        if not all(isinstance(key, str | int | float) for key in keys):
            raise UsageError(f"{where}: the keys of {ast.unparse(node)} must be words, strings or numbers")
        if len(set(keys)) < len(keys):
            raise UsageError(f"{where}: {ast.unparse(node)} has a key twice")
        return dict(zip(keys, (_literal(item, where) for item in node.values), strict=True))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):  # a word with hyphens
        parts = (_literal(node.left, where), _literal(node.right, where))
        if all(isinstance(part, str) for part in parts):
            return "-".join(parts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {ast.unparse(node)} is not a number, word, string, list or mapping") from error


def _typed(name: str, option: str, value: Any, hint: Any) -> Any:
    """``value`` if it fits the annotation of the field (an int passes for a float, a single value for a list)."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        fitted = _fit(value, kind)
        if fitted is not _MISFIT:
            return fitted
    raise UsageError(f"{name}: option {option}={literal(value)} must be {' or '.join(map(readable, kinds))}")


def _fit(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if kind is type(None):
        return None if value is None else _MISFIT
    if origin is Literal:
        return value if value in get_args(kind) else _MISFIT
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if number else _MISFIT
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _MISFIT
    if origin is tuple and get_args(kind)[1:] == (...,):
        items = [_fit(item, get_args(kind)[0]) for item in (value if isinstance(value, tuple) else (value,))]
        return _MISFIT if _MISFIT in items else tuple(items)
    if origin is Mapping:
        if not isinstance(value, dict):
            return _MISFIT
        pairs = [(_fit(k, get_args(kind)[0]), _fit(v, get_args(kind)[1])) for k, v in value.items()]
        return _MISFIT if any(_MISFIT in pair for pair in pairs) else dict(pairs)
    return value if isinstance(kind, type) and isinstance(value, kind) else _MISFIT


def readable(kind: Any) -> str:
    """The annotation of an option in the words of the user."""
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {readable(get_args(kind)[0])}"
    if get_origin(kind) is Mapping:
        return f"a mapping of {' to '.join(map(readable, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(readable, get_args(kind)))
    return str(getattr(kind, "__name__", kind))
