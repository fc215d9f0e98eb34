"""The report as one HTML page that needs nothing but itself: styles, data, plot library and script are inside.

A content security policy forbids every request. Tables hold all figures and are there without scripts; plots show the
same, drawn by Observable Plot on D3 (``web/``, ISC licence).
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxslim import timing
from onnxslim.contract import literal

_WEB = Path(__file__).with_name("web")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
FIGURES = ("nodes", "parameters", "macs", "bytes")
_MEASURES = {
    "ms": "time",
    "macs": "multiply-accumulates",
    "bytes": "bytes of weights",
    "bits": "bits of a stored weight",
    "channels": "channels kept",
}
# Columns above which a table is set smaller.
_WIDE = 8
# Characters above which the name of a row is broken on a narrow screen.
_NAME = 16


class Cell:
    """A cell of a table: its text, and the number to sort by; ``mark`` is ``good`` or ``bad``."""

    def __init__(self, text: str, value: float | None = None, *, mark: str = "", raw: str = "") -> None:
        self.text = text
        self.value = value
        self.mark = mark
        self.raw = raw

    def html(self, tag: str = "td", attributes: str = "") -> str:
        """As an element, which has ``attributes`` too."""
        name = "name" if tag == "th" and len(self.text) > _NAME else ""
        classes = " ".join(filter(None, ("number" if self.value is not None else "", name, self.mark)))
        attributes += f' class="{classes}"' if classes else ""
        if self.value is not None:
            attributes += f' data-value="{self.value!r}"'
        attributes += ' scope="row"' if tag == "th" else ""
        return f"<{tag}{attributes}>{self.raw or _text(self.text)}</{tag}>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str = ",") -> Cell:
    return Cell("") if value is None else Cell(format(value, form), float(value))


def _head(text: str) -> str:
    """A heading whose arrow is also there for who hears it."""
    arrow = '<span aria-hidden="true">→ </span><span class="hidden">result: </span>'
    return _text(text.removeprefix("→ ")) if not text.startswith("→ ") else arrow + _text(text.removeprefix("→ "))


def _table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = True, stack: bool = False
) -> str:
    """A table; with ``stack`` each row is a paragraph of its own where the screen is narrow."""

    def role(name: str) -> str:  # laid out in another way, elements lose the roles they have by themselves
        return f' role="{name}"' if stack else ""

    lines = [list(row) for row in rows]
    right = [any(row[k].value is not None for row in lines) for k in range(len(heads))]
    titles = "".join(
        f'<th scope="col"{role("columnheader")}{" class=number" if number else ""}>{_head(head)}</th>'
        for head, number in zip(heads, right, strict=True)
    )
    labels = [f' data-label="{_text(head)}"' if stack else "" for head in heads]
    body = "".join(
        f"<tr{role('row')}>{row[0].html('th', role('rowheader'))}"
        f"{''.join(cell.html('td', role('cell') + label) for cell, label in zip(row[1:], labels[1:], strict=True))}"
        "</tr>\n"
        for row in lines
    )
    kinds = {"sortable": sortable and len(lines) > 1, "stack": stack, "wide": len(heads) > _WIDE}
    kind = " ".join(name for name, wanted in kinds.items() if wanted)
    group = role("rowgroup")
    head = f"<thead{group}><tr{role('row')}>{titles}</tr></thead>\n" if any(heads) else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">'
        f'<table{role("table")} class="{kind}">'
        f"<caption>{_text(caption)}</caption>\n{head}<tbody{group}>\n{body}</tbody></table></div>\n"
    )


def _figure(plot: str, caption: str, controls: str = "", keys: bool = False) -> str:
    key = '<p><span class="key before">original</span><span class="key after">result</span></p>' if keys else ""
    return (
        f'<figure data-plot="{plot}"><figcaption>{_text(caption)}</figcaption>{controls}{key}'
        '<div class="plot"></div></figure>\n'
    )


def _select(name: str, label: str, choices: Mapping[str, str]) -> str:
    options = "".join(f'<option value="{_text(v)}">{_text(t)}</option>' for v, t in choices.items())
    return f'<label>{_text(label)} <select name="{name}">{options}</select></label>'


def headline(report: Mapping[str, Any]) -> str:
    """What came out, in one sentence; "faster" is there only where the interval says so."""
    parts = []
    for entry in report["bench"]:
        low, high = entry["interval"]
        word = timing.verdict(entry["speedup"], entry["interval"])
        said = f"{word} on {entry['ep']}"
        if word != "same within noise":
            said = f"{entry['speedup']:.2f}x as fast on {entry['ep']} ({low:.2f} to {high:.2f})"
        parts.append(said)
    before, after = report["before"]["bytes"], report["after"]["bytes"]
    change = (after - before) / before if before else 0.0
    # A change that would round to nothing is told in bytes.
    size = f"{abs(change):.1%}" if abs(change) >= 0.0005 else f"{abs(after - before):,} bytes"
    parts.append("same size" if not change else f"{size} {'smaller' if change < 0 else 'larger'}")
    metric = report.get("metric")
    if metric is not None:
        after = "unknown" if metric["after"] is None else f"{metric['after']:.4f}"
        parts.append(f"{metric['name']} {metric['before']:.4f} → {after}")
    elif report.get("fidelity"):
        errors = [o["relative_l2"] for o in report["fidelity"]["outputs"]]
        if None in errors:
            parts.append("how far the outputs are from the original's is unknown")
        else:
            parts.append(f"outputs within {max(errors, default=0.0):.1e} (relative L2) of the original's")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _warnings(report: Mapping[str, Any]) -> str:
    lines = report["warnings"]
    if not lines:
        return ""
    return f'<ul class="warnings" aria-label="Warnings">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>\n'


def _sizes(report: Mapping[str, Any]) -> str:
    rows = []
    for name in FIGURES:
        old, new = report["before"][name], report["after"][name]
        change = (new - old) / old if old else 0.0
        mark = "good" if change < 0 else "bad" if change > 0 and name == "bytes" else ""
        rows.append([Cell(name), _number(old), _number(new), Cell(f"{change:+.1%}", change, mark=mark)])
    metric = report.get("metric")
    if metric is not None:
        figures = [_number(metric[k], ".4f") for k in ("before", "after")]
        change = None if metric["after"] is None else metric["after"] - metric["before"]
        rows.append([Cell(metric["name"]), *figures, _number(change, "+.4f")])
    return _table("Before and after", ("", "original", "result", "change"), rows, sortable=False)


def _latency(report: Mapping[str, Any]) -> str:
    rows = []
    for entry in report["bench"]:
        old, new, (low, high) = entry["original_latency_ms"], entry["latency_ms"], entry["interval"]
        word = timing.verdict(entry["speedup"], entry["interval"])
        mark = {"faster": "good", "slower": "bad"}.get(word, "")
        rows.append(
            [
                Cell(entry["ep"]),
                *(_number(old[k], ".3f") for k in ("median", "p10", "p90")),
                *(_number(new[k], ".3f") for k in ("median", "p10", "p90")),
                _number(entry["speedup"], ".2f"),
                Cell(f"{low:.2f} to {high:.2f}"),
                Cell(word, mark=mark),
            ]
        )
    heads = ("on", "original ms", "p10", "p90", "result ms", "p10", "p90", "speed", "interval", "verdict")
    about = f"Interval of the speed: {timing.CONFIDENCE:.0%}; both models measured in turn"
    return (
        _figure("latency", "Milliseconds for one pass: median (dot), and from the 10th to the 90th percentile (line)")
        + _figure("speed", f"Speed over the original, with its {timing.CONFIDENCE:.0%} interval")
        + _table(about, heads, rows)
    )


def _pipeline(report: Mapping[str, Any]) -> str:
    rows = []
    for entry in report["passes"]:
        stats = {k: v for k, v in entry["stats"].items() if isinstance(v, int | float | str) and v}
        did = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
                        for k, v in stats.items())  # fmt: skip
        options = ", ".join(f"{k}={literal(v)}" for k, v in entry["options"].items() if v is not None)
        rows.append(
            [
                Cell(entry["name"]),
                Cell(options, mark="long"),
                _number(entry["seconds"], ".1f"),
                Cell(did or "nothing", mark="long"),
                _skipped(entry),
            ]
        )
    return _table(
        "Passes in the order they ran",
        ("pass", "options", "seconds", "did", "left alone"),
        rows,
        sortable=False,
        stack=True,
    )


def _skipped(entry: Mapping[str, Any]) -> Cell:
    groups: dict[str, list[str]] = {}
    for skip in entry["skipped"]:
        groups.setdefault(skip["reason"], []).append(skip["node"])
    if not groups:
        return Cell("")
    lines = []
    for reason, nodes in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(nodes[:20]) + (f" and {len(nodes) - 20} others" if len(nodes) > 20 else "")
        lines.append(f"<li>{_text(reason)}: <span class=quiet>{_text(shown)}</span></li>")
    count = len(entry["skipped"])
    summary = f"<summary>{count} {'place' if count == 1 else 'places'}</summary>"
    return Cell("", mark="long", raw=f"<details>{summary}<ul>{''.join(lines)}</ul></details>")


def _fidelity(report: Mapping[str, Any]) -> str:
    found = report["fidelity"]
    held = ", not seen by calibration" if found.get("held_out") else ""
    rows = [
        [
            Cell(entry["output"]),
            *(
                Cell("unknown") if entry[key] is None else _number(entry[key], form)
                for key, form in (("relative_l2", ".1e"), ("max_abs", ".1e"), ("cosine", ".6f"))
            ),
            _number(entry["top1_agreement"], ".1%"),
        ]
        for entry in found["outputs"]
    ]
    caption = f"Against the original on {found['samples']} samples ({found['data']}{held})"
    return _table(caption, ("output", "relative L2", "max abs", "cosine", "same top-1"), rows)


def _layers(details: Mapping[str, Any]) -> str:
    forms = {"ms": ".4f", "macs": ",", "bytes": ",", "bits": "d", "channels": "d"}
    rows = []
    present: set[str] = set()
    for row in details["layers"]:
        cells = [Cell(row["layer"]), Cell(row["operator"])]
        for key, form in forms.items():
            pair = [(row[side] or {}).get(key) for side in ("before", "after")]
            present.update({key} if any(value is not None for value in pair) else ())
            cells += [_number(value, form) for value in pair]
        rows.append(cells)
    names = {"macs": "MACs"}
    heads = [f"{arrow}{names.get(key, key)}" for key in forms for arrow in ("", "→ ")]
    choices = {key: text for key, text in _MEASURES.items() if key in present}
    caption = "What each layer costs" + (" (the 40 dearest)" if len(rows) > 40 else "")
    return _figure("layers", caption, _select("measure", "Show", choices), keys=True) + _table(
        "Every layer, before → after", ["layer", "operator", *heads], rows
    )


def _errors(details: Mapping[str, Any]) -> str:
    rows = [
        [
            Cell(row["layer"]),
            Cell(row["operator"]),
            _number(row["error"], ".1e"),
            _number(row["added"], ".1e"),
            _number(row["relative_l2"], ".1e"),
            Cell(row["compared_with"]),
        ]
        for row in details["errors"]
    ]
    heads = ("layer", "operator", "error", "added here", "relative L2", "compared with")
    keys = '<p><span class="key before">error so far</span><span class="key after">of it added here</span></p>'
    caption = "Share of a layer's spread that no scale and shift of its channels explains"
    return _figure("errors", caption, keys) + _table("Layers with a counterpart of the same shape", heads, rows)


def _histograms(details: Mapping[str, Any]) -> str:
    choices = {str(k): f"{row['kind']} of {row['layer']}" for k, row in enumerate(details["histograms"])}
    return _figure("histogram", "Distribution of values", _select("layer", "Show", choices), keys=True)


def _pareto(details: Mapping[str, Any]) -> str:
    rows = [[Cell(m["name"]), _number(m["ms"], ".3f"), _number(m["quality"], ".4f")] for m in details["models"]]
    caption = f"{details['quality']} against latency: the line joins the models that no other one beats in both"
    return _figure("pareto", caption) + _table("The model after each pass", ("after", "ms", details["quality"]), rows)


def _environment(report: Mapping[str, Any]) -> str:
    facts = dict(report["environment"])
    command = facts.pop("command", "")
    shown = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        shown.append([Cell(name.replace("_", " ")), Cell(str(value))])
    again = f"<h3>The command</h3><pre><code>{_text(command)}</code></pre>\n" if command else ""
    return again + _table("Where this was measured", ("", ""), shown, sortable=False)


def page(report: Mapping[str, Any], title: str = "onnxslim report") -> str:
    """The whole page for `onnxslim.report.Report.to_dict`."""
    details = report.get("details") or {}
    sections = [("Summary", _sizes(report))]
    if report["passes"]:
        sections.append(("Pipeline", _pipeline(report)))
    if report["bench"]:
        sections.append(("Latency", _latency(report)))
    if len([m for m in details.get("models", ()) if m["quality"] is not None]) > 1:
        sections.append(("Quality and latency", _pareto(details)))
    if report.get("fidelity"):
        sections.append(("Fidelity", _fidelity(report)))
    if details.get("errors"):
        sections.append(("Where the error comes in", _errors(details)))
    if details.get("layers"):
        sections.append(("Layers", _layers(details)))
    if details.get("histograms"):
        sections.append(("Weights and outputs", _histograms(details)))
    sections.append(("Environment", _environment(report)))
    body = "".join(f"<section><h2>{_text(name)}</h2>\n{content}</section>\n" for name, content in sections)
    # "<" in the data could end the script element early.
    data = json.dumps({k: report.get(k) for k in ("bench", "details")}, allow_nan=False).replace("<", "\\u003c")
    licences = "".join(f"\n{_file(f'LICENSE.{name}')}" for name in ("d3", "plot"))
    scripts = "".join(f"<script>{_file(name)}</script>\n" for name in ("d3.min.js", "plot.min.js", "report.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_file('report.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the report</a>\n<main id="main">\n<h1>{_text(title)}</h1>\n'
        f'<p class="lead">{_text(headline(report))}</p>\n{_warnings(report)}{body}</main>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<!-- D3, Plot:{licences}-->\n{scripts}</body>\n</html>\n"
    )


def fragment(report: Mapping[str, Any]) -> str:
    """The summary for a notebook cell: no script, and no style that reaches beyond it."""
    parts = [f"<p><strong>{_text(headline(report))}</strong></p>", _warnings(report), _sizes(report)]
    if report["passes"]:
        parts.append(_pipeline(report))
    return f"<div>{''.join(parts)}</div>"


def _file(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")
