"""The HTML report: whole and escaped as text; in a browser it draws, sorts, and neither logs nor requests anything."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import onnxslim
from onnxslim import html
from onnxslim.report import Report

sys.path.insert(0, str(Path(__file__).parent))

import reports
from browser import CHROMIUM, Browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


# Wider than a phone, as names of layers are.
LONG = "/encoder/stages.2/blocks.17/attention/self/query_key_value_projection/MatMul"


def report(*, layers: int = 12, **changes: Any) -> Report:
    """A report with something in every section, and two execution providers."""
    cost = {"operator": "Conv", "bytes": 400, "bits": 32, "channels": 64}
    histogram = {"low": -1.0, "high": 1.0, "counts": [1, 5, 9, 4, 2]}
    details = {
        "layers": [
            {
                "layer": f"/block.{k}/Conv",
                "operator": "Conv",
                "before": {**cost, "macs": 1000 * (k * 7 % layers + 1), "ms": 0.1 + k / 100},
                "after": None if k == 3 else {**cost, "bits": 8, "macs": 600 * (k * 7 % layers + 1), "ms": 0.05},
            }
            for k in range(layers)
        ],
        "errors": [
            {"layer": f"/block.{k}/Conv", "operator": "Conv", "error": 0.01 * k, "added": 0.005}
            | {"relative_l2": 0.02 * k, "compared_with": "v", "max_abs": 0.1}
            for k in range(layers)
        ],
        "histograms": [
            {"layer": LONG, "kind": "weights", "before": histogram, "after": histogram},
            {"layer": LONG, "kind": "outputs", "before": histogram, "after": None},
        ],
        "models": [{"name": n, "ms": m, "quality": q} for n, m, q in (("original", 4.0, 0.9), ("int8", 2.0, 0.89))],
        "quality": "top1",
    }  # fmt: skip
    found = reports.report(skipped=30, details=details)
    found.bench.append({**found.bench[0], "ep": "openvino"})
    return dataclasses.replace(found, **changes)


class _Outline(HTMLParser):
    """Checks that elements close in order, and keeps what matters of them."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_refers_to_nothing_outside() -> None:
    outline = _Outline(report().to_html("a → b"))
    for tag, attributes in outline.attributes:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for t, a in outline.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    labelled = [a for t, a in outline.attributes if t == "div" and a.get("role") == "region"]
    assert labelled and all(a["aria-label"] and a["tabindex"] == "0" for a in labelled)
    assert ("html", {"lang": "en"}) in outline.attributes


def test_every_section_is_there_when_there_is_something_in_it() -> None:
    full = re.findall(r"<h2>(.*?)</h2>", report().to_html())
    assert full == [
        "Summary", "Pipeline", "Latency", "Quality and latency", "Fidelity", "Where the error comes in", "Layers",
        "Weights and outputs", "Environment",
    ]  # fmt: skip
    bare = report(passes=[], bench=[], fidelity=None, metric=None, details=None).to_html()
    assert re.findall(r"<h2>(.*?)</h2>", bare) == ["Summary", "Environment"]


def test_options_are_shown_as_they_are_typed() -> None:
    found = report()
    found.passes[0]["options"] = {"measure": False, "keep": ["head"], "plan": None}
    assert "measure=false, keep=[&#x27;head&#x27;]<" in found.to_html()


def test_names_from_a_model_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><!--"
    found = report(warnings=[evil])
    found.passes[0]["skipped"] = [{"node": evil, "reason": evil}]
    assert found.details is not None
    found.details["layers"][0]["layer"] = evil
    found.environment["command"] = evil
    text = found.to_html(evil)
    _Outline(text)
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    ("interval", "said"),
    [([1.8, 2.2], "2.00x as fast"), ([0.9, 2.2], "Same within noise on cpu"), ([0.4, 0.9], "2.00x as fast")],
)
def test_faster_is_said_when_the_interval_says_so(interval: list[float], said: str) -> None:
    found = report()
    found.bench[0]["interval"] = interval
    assert said in html.headline(found.to_dict())


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    found = report(metric=None)
    assert found.fidelity is not None and found.details is not None
    found.fidelity["outputs"][0] |= {"relative_l2": None, "cosine": None}
    for model in found.details["models"]:
        model["quality"] = None
    text = found.to_html()
    assert "how far the outputs are from the original&#x27;s is unknown" in text and "<td>unknown</td>" in text
    assert "within 0.0" not in text and "Quality and latency" not in text, "no plot without a point"


def test_a_small_change_of_the_size_is_told_in_bytes() -> None:
    found = report()
    found.after["bytes"] = found.before["bytes"] = 1_000_000
    assert "same size" in html.headline(found.to_dict())
    found.after["bytes"] += 76
    assert "76 bytes larger" in html.headline(found.to_dict())


def test_a_notebook_shows_the_summary_without_scripts(tiny: Path) -> None:
    result = onnxslim.optimize(tiny, "simplify", bench=False)
    text = result._repr_html_()
    _Outline(text)
    assert "<script" not in text and "<style" not in text and "simplify" in text


def test_details_of_a_run_are_in_its_page(tiny: Path) -> None:
    result = onnxslim.optimize(tiny, "simplify,fold", bench_seconds=0.1, details=True)
    details = result.report.to_dict()["details"]
    assert [row["layer"] for row in details["layers"]] == ["conv", "gemm"]
    assert all(row["error"] < 1e-5 for row in details["errors"])
    assert {row["kind"] for row in details["histograms"]} == {"weights", "outputs"}
    assert [m["name"] for m in details["models"]] == ["original", "simplify", "fold"]
    assert details["layers"][0]["before"]["macs"] == 64 * 72
    assert "details" not in onnxslim.optimize(tiny, "simplify", bench=False).report.to_dict()


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


def _page(tmp_path: Path, found: Report) -> Path:
    path = tmp_path / "report.html"
    path.write_text(found.to_html("a → b"), encoding="utf-8")
    return path


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_plots_are_drawn_without_a_message_or_a_request(
    browser: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    browser.messages.clear()
    browser.requests.clear()
    browser.size(width)
    browser.media("screen", scheme)
    path = _page(tmp_path, report())
    browser.open(path)
    assert browser.messages == []
    assert browser.requests == [path.as_uri()]
    shapes = "path, rect, circle, line"
    plots = browser.run(
        f"[...document.querySelectorAll('figure .plot svg')].map(p => p.querySelectorAll('{shapes}').length)"
    )
    assert len(plots) == 6 and min(plots) >= 2
    labels = browser.run("[...document.querySelectorAll('figure svg')].map(s => s.getAttribute('aria-label'))")
    assert all(labels)
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    ground, text = browser.run(
        "['backgroundColor', 'color'].map(name => "
        "getComputedStyle(document.body)[name].match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert (ground > text) == (scheme == "light")


@needs_browser
def test_on_a_phone_names_are_told_apart_and_what_matters_needs_no_scrolling(browser: Browser, tmp_path: Path) -> None:
    found = report()
    assert found.details is not None
    names = [f"/stages.{k}/blocks.0/depthwise_convolution/Conv" for k in range(12)]
    for row, name in zip(found.details["layers"], names, strict=True):
        row["layer"] = name
    found.before["macs"] = found.after["macs"] = 385_187_552
    browser.size(390, mobile=True)
    browser.open(_page(tmp_path, found))
    shown = browser.run("[...document.querySelectorAll('figure[data-plot=layers] svg text')].map(t => t.textContent)")
    assert set(names) <= set(shown)
    for caption in ("Before and after", "Passes in the order they ran"):
        region = f"document.querySelector('.scroll[aria-label=\"{caption}\"]')"
        assert browser.run(f"{region}.scrollWidth <= {region}.clientWidth"), caption
    # Rows laid out as paragraphs are still rows of a table to who hears them.
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    said = {(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if "role" in n}
    assert {("rowheader", "prune"), ("columnheader", "left alone"), ("columnheader", "result: ms")} <= said
    browser.size(1200)


@needs_browser
def test_tables_sort_by_mouse_and_keyboard_and_say_so(browser: Browser, tmp_path: Path) -> None:
    browser.open(_page(tmp_path, report()))
    table = (
        "[...document.querySelectorAll('table.sortable')].find(t => t.caption.textContent.startsWith('Every layer'))"
    )
    column = f"[...({table}).tBodies[0].rows].map(r => r.cells[4].textContent)"
    head = f"({table}).tHead.rows[0].cells[4]"
    rising = sorted(browser.run(column), key=lambda t: int(t.replace(",", "") or -1))
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(column) == rising[::-1]
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    browser.run(f"{head}.querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert browser.run(column) == [t for t in rising if t] + [t for t in rising if not t]
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"


@needs_browser
def test_a_choice_redraws_the_plot(browser: Browser, tmp_path: Path) -> None:
    browser.open(_page(tmp_path, report()))
    figure = "document.querySelector('figure[data-plot=layers]')"
    before = browser.run(f"{figure}.querySelector('svg').outerHTML")
    browser.run(f"{figure}.querySelector('select').value = 'bits'")
    browser.run(f"{figure}.querySelector('select').dispatchEvent(new Event('change'))")
    after = browser.run(f"{figure}.querySelector('svg').outerHTML")
    assert after != before and "bits of a stored weight" in after
    label = browser.run(f"{figure}.querySelector('svg').getAttribute('aria-label')")
    assert label == "What each layer costs: bits of a stored weight"


@needs_browser
def test_a_thousand_layers_stay_small_and_printing_opens_what_is_folded(browser: Browser, tmp_path: Path) -> None:
    path = _page(tmp_path, report(layers=1000))
    assert path.stat().st_size < 3_000_000
    browser.open(path)
    assert browser.messages == []
    assert browser.run("document.querySelectorAll('figure[data-plot=layers] rect').length") == 80
    assert not browser.run("document.querySelector('details').open")
    assert browser.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.run("document.querySelector('details').open")
