"""Writes docs/passes/NAME.md from the docstrings of the passes, so that the pages say what the code does.

python docs/generate.py            write the pages
python docs/generate.py --check    exit with 1 where a page is not what it would write
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import get_type_hints

from onnxslim import pipeline
from onnxslim.contract import Effect, literal

FOLDER = Path(__file__).parent / "passes"
PROMISES = {
    Effect.EXACT: "exact: the same outputs, bit for bit or within 1 ulp",
    Effect.ROUNDING: "rounding: the same function, rounded in another order",
    Effect.LOSSY: "lossy: another function, close to the old one; a budget or the reported fidelity says how close",
}


def page(name: str) -> str:
    """The page of one pass."""
    cls = pipeline.find(name)
    doc = inspect.getdoc(cls) or ""
    body, _, options = doc.partition("\nOptions:\n")
    meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", options, re.MULTILINE))
    lines = [f"# {name}", "", body.strip(), "", f"Promise: {PROMISES[cls.effect]}.", ""]
    if cls.wants:
        links = ", ".join(map(_link, cls.wants))
        lines += [f"Runs before it, unless it has already: {links}.", ""]
    if cls.then:
        lines += [f"Runs behind it, unless it is named elsewhere: {_link(cls.then)}.", ""]
    if cls.needs_data:
        lines += ["It needs calibration data (`--calib`).", ""]
    fields = dataclasses.fields(cls)
    if fields:
        hints = get_type_hints(cls)
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            default = field.default_factory() if callable(field.default_factory) else field.default
            shown = "required" if default is dataclasses.MISSING else f"`{literal(default)}`"
            meaning = " ".join(meanings.get(field.name, "").split()).replace("|", "\\|")
            kind = pipeline.readable(hints[field.name]).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {shown} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _link(text: str) -> str:
    """A pass, as the user writes it, that leads to its page."""
    (item,) = pipeline.parse(text)
    return f"[{text}]({item.name}.md)"


def pages() -> dict[Path, str]:
    """Every page by its file: those of the passes that come with onnxslim, and a list of them."""
    found = {}
    entries = []
    for name, entry in pipeline.registry().items():
        if entry.dist is not None and entry.dist.name != "onnxslim":
            continue
        cls = pipeline.find(name)
        found[FOLDER / f"{name}.md"] = page(name)
        entries.append(f"| [{name}]({name}.md) | {cls.effect.value} | {(inspect.getdoc(cls) or '').splitlines()[0]} |")
    table = ["# Passes", "", "| pass | promise | what it does |", "|---|---|---|", *entries, ""]
    found[FOLDER / "README.md"] = "\n".join(table)
    return found


def main(arguments: list[str]) -> int:
    """Carry out the command line."""
    wanted = pages()
    stale = [path for path in FOLDER.glob("*.md") if path not in wanted]
    differing = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for path in (*stale, *differing):
            print(f"{path} is not what docs/generate.py writes", file=sys.stderr)
        return int(bool(stale or differing))
    FOLDER.mkdir(exist_ok=True)
    for path in stale:
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
