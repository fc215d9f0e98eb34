"""Measures what the README shows, and writes its tables and its picture from the result.

    python bench/readme.py --run [NAME ...]     measure (bench/zoo.py with --json), then write; 1 to 30 minutes a model
    python bench/readme.py                      write them again from docs/measured.json
    python bench/readme.py --from FILE          take the rows of a result of bench/zoo.py, then write
    python bench/readme.py --check              exit with 1 where they are not what would be written

Every file is made and judged in the same run as its peers, each peer in an environment of its own, on the same data
(bench/peers.py). `docs/measured.json` keeps one row for each model and recipe with the environment of its run; a new
run replaces the rows that it has.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import zoo
from bench.table import Row

ROOT = Path(__file__).resolve().parent.parent
DATA, PICTURE, README = ROOT / "docs" / "measured.json", ROOT / "docs" / "measured.svg", ROOT / "README.md"
JOB, LOSSLESS = "prune,int8", "simplify,fold,fuse(opset=0)"
RECIPES = (JOB, "int8", "peer:ort-int8", "peer:nncf", LOSSLESS, "peer:onnxslim", "peer:onnxsim")
# Model: what the README calls it, its metric, and the factor that its metric is shown with.
MODELS: dict[str, tuple[str, str, float]] = {
    "fmnist_cnn": ("Fashion-MNIST CNN", "top-1", 100.0),
    "efficientnet_lite0": ("EfficientNet-Lite0", "top-1", 100.0),
    "ppocrv4_rec": ("PP-OCRv4 recognition", "exact lines", 100.0),
    "minilm_l6": ("all-MiniLM-L6-v2", "Lee's correlation", 1.0),
}
NAMES = {
    JOB: "onnxslim, prune and int8",
    "int8": "onnxslim, int8",
    "peer:ort-int8": "ONNX Runtime's quantizer",
    "peer:nncf": "NNCF",
    LOSSLESS: "onnxslim, lossless",
    "peer:onnxslim": "OnnxSlim",
    "peer:onnxsim": "onnxsim",
}

Facts = Mapping[str, Any]


def fact(row: Row, environment: Facts) -> dict[str, Any]:
    """What is kept of a row of bench/zoo.py.

    ``metric`` has (before, after) of the model's first metric; ``parameters`` and ``bytes`` are what is left of the
    original's, as a share.
    """
    return {
        "model": row.model,
        "recipe": row.recipe,
        "metric": list(next(iter(row.metric.values()))),
        "parameters": row.after["parameters"] / row.before["parameters"],
        "bytes": row.after["bytes"] / row.before["bytes"],
        "nodes": [row.before["nodes"], row.after["nodes"]],
        "speedup": row.latency["speedup"],
        "interval": list(row.latency["interval"]),
        "environment": dict(environment),
    }


def merged(old: Iterable[Facts], new: Iterable[Facts]) -> list[Facts]:
    """``new`` in the place of the ``old`` rows of the same model and recipe, in the order of `MODELS` and `RECIPES`."""
    rows = {(row["model"], row["recipe"]): row for row in (*old, *new)}
    return [rows[name, recipe] for name in MODELS for recipe in RECIPES if (name, recipe) in rows]


def _metric(row: Facts) -> list[str]:
    scale = MODELS[row["model"]][2]
    return [f"{scale * value:.1f} %" if scale == 100 else f"{value:.3f}" for value in row["metric"]]


def _change(share: float) -> str:
    percent = 100 * (share - 1)
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"


def _speed(row: Facts) -> str:
    return f"{row['speedup']:.2f}x ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"


def tables(rows: list[Facts]) -> str:
    """The README's tables as Markdown: the main job, then both jobs beside the peers where these were measured."""
    lines = ["| model | metric | float | result | parameters | bytes | speed (99 % interval) |", "|---" * 7 + "|"]
    for row in rows:
        if row["recipe"] == JOB:
            title, metric, _ = MODELS[row["model"]]
            before, after = _metric(row)
            sizes = (_change(row["parameters"]), _change(row["bytes"]))
            lines.append(f"| {' | '.join((title, metric, before, after, *sizes, _speed(row)))} |")
    others = [row for row in rows if row["recipe"] != JOB]
    if others:
        lines += ["", "| model | made by | metric | bytes | nodes | speed (99 % interval) |", "|---" * 6 + "|"]
    for row in others:
        title, before, after = MODELS[row["model"]][0], *_metric(row)
        nodes = "{} → {}".format(*row["nodes"])
        cells = (title, NAMES[row["recipe"]], f"{before} → {after}", _change(row["bytes"]), nodes, _speed(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# The picture

_WIDTH, _TOP, _STEP = 860, 78, 52
_NAME, _SPEED, _SIZE, _METRIC = 8, 190, 510, 700  # where the columns begin
_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.head { font-weight: 600 } .quiet { fill: #59636e; font-size: 12px }
.bar { fill: #0b7285 } .speed { fill: #0b7285; opacity: 0.35 } .rest { fill: #d0d7de }
.line { stroke: #0b7285; stroke-width: 3 }
.axis { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .quiet { fill: #9198a1 } .bar, .speed { fill: #3bc9db }
  .rest { fill: #3d444d }
  .line { stroke: #3bc9db } .axis { stroke: #656c76 }
}"""


def picture(rows: list[Facts]) -> str:
    """The main job as SVG: speed with its interval, what is left of the file, and the metric, a line for each model."""
    shown = [row for row in rows if row["recipe"] == JOB]
    top = max((row["interval"][1] for row in shown), default=1.0)
    scale = (_SIZE - _SPEED - 80) / top
    height = _TOP + _STEP * len(shown)
    said = "; ".join(f"{MODELS[r['model']][0]}: {_speed(r)}, bytes {_change(r['bytes'])}" for r in shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t d">',
        '<title id="t">Speed, size and accuracy after onnxslim --passes prune,int8</title>',
        f'<desc id="d">{html.escape(said)}</desc>',
        f"<style>{_STYLE}\n</style>",
        *(
            f'<text class="head" x="{x}" y="24">{title}</text><text class="quiet" x="{x}" y="42">{about}</text>'
            for x, title, about in (
                (_SPEED, "times as fast", "line: 99 % interval"),
                (_SIZE, "size of the file", "of the original's"),
                (_METRIC, "accuracy", "float → result"),
            )
        ),
        f'<line class="axis" x1="{_SPEED + scale:.1f}" x2="{_SPEED + scale:.1f}" y1="{_TOP - 6}" y2="{height - 8}"/>',
        f'<text class="quiet" text-anchor="middle" x="{_SPEED + scale:.1f}" y="{_TOP - 10}">1x</text>',
    ]
    for k, row in enumerate(shown):
        y = _TOP + _STEP * k + 12
        title, metric, _ = MODELS[row["model"]]
        low, high = (_SPEED + scale * bound for bound in row["interval"])
        wide = _METRIC - _SIZE - 80
        left = wide * min(row["bytes"], 1.0)
        parts += [
            f'<text x="{_NAME}" y="{y + 5}">{html.escape(title)}</text>',
            f'<rect class="speed" x="{_SPEED}" y="{y - 9}" width="{scale * row["speedup"]:.1f}" height="18"/>',
            f'<line class="line" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="bar" cx="{_SPEED + scale * row["speedup"]:.1f}" cy="{y}" r="5"/>',
            f'<text x="{high + 10:.1f}" y="{y + 5}">{row["speedup"]:.2f}x</text>',
            f'<rect class="rest" x="{_SIZE}" y="{y - 9}" width="{wide}" height="18"/>',
            f'<rect class="bar" x="{_SIZE}" y="{y - 9}" width="{left:.1f}" height="18"/>',
            f'<text x="{_SIZE + wide + 8}" y="{y + 5}">{row["bytes"]:.0%}</text>',
            f'<text x="{_METRIC}" y="{y}">{" → ".join(_metric(row))}</text>',
            f'<text class="quiet" x="{_METRIC}" y="{y + 16}">{html.escape(metric)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def written(rows: list[Facts], readme: str) -> dict[Path, str]:
    """What `PICTURE` and `README` should hold.

    Raises:
        ValueError: the README lacks the marks that the tables stand between.
    """
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md: the tables stand between {begin.strip()} and {end}, each once")
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    text = begin + tables(rows) + end
    return {PICTURE: picture(rows), README: between.sub(lambda _: text, readme)}


def load() -> list[Facts]:
    """The rows of `DATA`."""
    return list(json.loads(DATA.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Carry out the command line; 1 when a file could not be made or, with --check, is not what it should be."""
    parser = argparse.ArgumentParser(
        prog="bench/readme.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", nargs="*", metavar="NAME", help=f"measure first: {', '.join(MODELS)}; default: all")
    what.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a result of bench/zoo.py --json")
    what.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--passes", default="; ".join(RECIPES), metavar="LIST", help="of --run, as for bench/zoo.py")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.run or () if name not in MODELS]
    if unknown:
        parser.error(f"--run: the README has no model {unknown[0]!r}: there are {', '.join(MODELS)}")
    try:
        return update(options)
    except zoo.BenchError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2


def update(options: argparse.Namespace) -> int:
    """Measure or read what is asked for, write what follows from it, and return the exit code.

    Raises:
        bench.zoo.BenchError: the result to read is not one, or a recipe has no place.
    """
    rows, code = load(), 0
    if options.run is not None:
        strange = [recipe for recipe in zoo.recipes(options.passes) if recipe not in RECIPES]
        if strange:
            raise zoo.BenchError(f"the README shows no {strange[0]!r}: there are {'; '.join(RECIPES)}")
        with tempfile.TemporaryDirectory(prefix="onnxslim-readme-") as folder:
            options.source = Path(folder) / "result.json"
            names = options.run or list(MODELS)
            code = zoo.main([*names, "--passes", options.passes, "--json", str(options.source)])
            if not options.source.is_file():
                return code
            environment, found = zoo.load(options.source)
    elif options.source is not None:
        environment, found = zoo.load(options.source)
    if options.source is not None:
        rows = merged(rows, [fact(row, environment) for row in found if row.latency and row.model in MODELS])
        DATA.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    wanted = written(rows, README.read_text(encoding="utf-8"))
    differing = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if options.check:
        for path in differing:
            print(f"{path} is not what bench/readme.py writes", file=sys.stderr)
        return int(bool(differing))
    for path in differing:
        path.write_text(wanted[path], encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
