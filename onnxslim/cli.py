"""The command line. Modules that take long to import are imported by the command that needs them.

Exit codes: 0 done; 1 a check failed or a budget was missed, and the best model found was written; 2 bad usage or input,
nothing was written; 123 a defect of onnxslim, and a folder ``repro`` holds what reproduces it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from onnxslim.console import message, out
from onnxslim.errors import OnnxslimError, UsageError

DEFAULT = "optimize"


class _Group(click.Group):
    """A group whose default command needs no name: ``onnxslim in.onnx out.onnx``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "IN OUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        inner = click.Context(self.commands[DEFAULT], info_name=DEFAULT, parent=ctx)
        rows = [r for p in self.commands[DEFAULT].get_params(inner) if (r := p.get_help_record(inner)) is not None]
        with formatter.section("Options"):
            formatter.write_dl([*rows, ("--version", "Show the version and exit.")])
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(90)) for n, c in self.commands.items() if n != DEFAULT])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        import importlib.metadata

        click.echo(f"onnxslim {importlib.metadata.version('onnxslim')}")
        ctx.exit()


@click.group(cls=_Group, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def cli() -> None:
    """Make an ONNX file smaller and faster, with the proof that it is still right.

    Without options the result computes exactly what the input does (simplify, fold). Every run is verified in ONNX
    Runtime and measured; the input file is never touched.
    """


def _shapes(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, list[int]]:
    """``x=1,3,224,224`` as {name: shape}."""
    found = {}
    for text in values:
        name, equals, sizes = text.rpartition("=")
        try:
            found[name] = [int(size) for size in sizes.split(",")] if sizes else []
        except ValueError:
            equals = ""
        if not equals or not name or any(size < 0 for size in found[name]):
            raise click.BadParameter(f"{text!r}: give NAME=1,3,224,224", ctx, parameter)
    return found


_THREADS = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Threads of every session; 0: the runtime's choice.",
)
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of generated inputs.", metavar="N")
_SHAPE = click.option(
    "--shape", "shapes", multiple=True, callback=_shapes, metavar="X=1,3,224,224",
    help="Shape of an input with symbolic dimensions, for measuring only. Repeatable.",
)  # fmt: skip
_JSON = click.option(
    "--json", "json_to", is_flag=False, flag_value="-", metavar="[FILE]", help="JSON to stdout, or to FILE."
)
_FILE = click.Path(path_type=Path)


@cli.command(DEFAULT, hidden=True)
@click.argument("source", metavar="IN", type=_FILE)
@click.argument("target_path", metavar="OUT", type=_FILE)
@click.option(
    "--passes",
    default="simplify,fold",
    metavar="LIST",
    help="Pipeline, as 'prune(ratio=0.3),int8'; see 'onnxslim passes'.",
    show_default=True,
)
@click.option("--calib", metavar="DATA", help="Sample inputs: an .npz, a folder of them, or module:function.")
@click.option("--eval", "evaluation", metavar="DATA", help="Samples that judge the result; array 'labels' for top1.")
@click.option("--metric", metavar="NAME", help="top1, top5, cosine, psnr or module:function(outputs, sample).")
@click.option("--max-drop", metavar="DROP", help="Largest accepted drop of the metric: 1% (points) or 0.01.")
@click.option(
    "--require-int8", metavar="SHARE", help="Share of the MACs that must run on integers, as 95%: else exit 1."
)
@click.option("--target", default="cpu", metavar="EP", help="Execution provider it is meant for.", show_default=True)
@_SHAPE
@click.option(
    "--fix-shape",
    "fixed",
    multiple=True,
    callback=_shapes,
    metavar="X=1,3,224,224",
    help="Write a shape into the model. Repeatable.",
)
@_THREADS
@_SEED
@click.option("--no-bench", is_flag=True, help="Do not measure latency.")
@click.option("--external-data", is_flag=True, help="Put the weights in a file of their own (always above 1.8 GB).")
@_JSON
def optimize_command(
    source: Path,
    target_path: Path,
    passes: str,
    calib: str | None,
    evaluation: str | None,
    metric: str | None,
    max_drop: str | None,
    require_int8: str | None,
    target: str,
    shapes: dict[str, list[int]],
    fixed: dict[str, list[int]],
    threads: int,
    seed: int,
    no_bench: bool,
    external_data: bool,
    json_to: str | None,
) -> int:
    """Optimize IN and write OUT."""
    _check_target(source, target_path, json_to)
    from onnxslim.api import optimize
    from onnxslim.console import Bars

    result = optimize(
        source, passes, calib, evaluation, metric, max_drop, target, seed, Bars(),
        shapes=shapes, fix_shapes=fixed, threads=threads, bench=not no_bench, require_int8=require_int8,
    )  # fmt: skip
    result.save(target_path, external=True if external_data else None)
    _show(result.report.to_json(), result.report.table(), json_to)
    if result.exit_code:
        message(f"onnxslim: {result.report.warnings[0]}")
    return result.exit_code


def _check_target(source: Path, target: Path, json_to: str | None) -> None:
    """Find out before the work that the result could not be written."""
    if not source.is_file():
        raise UsageError(f"{source}: {'is a folder, not an ONNX file' if source.is_dir() else 'no such file'}")
    report = [Path(json_to)] if json_to is not None and json_to != "-" else []
    if report and report[0].absolute() == target.absolute():
        raise UsageError(f"{target}: cannot hold both the model and the report")
    for path in (target, *report):
        if path.exists() and path.samefile(source):
            raise UsageError(f"{path}: is the input, which is never touched; give another name")
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; give a file name")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")


def _show(json_text: str, table: Any, json_to: str | None) -> None:
    if json_to == "-":
        click.echo(json_text)
        return
    if json_to is not None:
        Path(json_to).write_text(json_text + "\n")
    out().print(table)


@cli.command()
@click.argument("model", type=_FILE)
@click.option("--nodes", is_flag=True, help="One row per node instead of per operator.")
@click.option("--ep", metavar="EP", help="Also say what runs there on integers, and why the rest does not: cpu.")
@_SHAPE
@_JSON
def inspect(model: Path, nodes: bool, ep: str | None, shapes: dict[str, list[int]], json_to: str | None) -> None:
    """Inputs, outputs, parameters, MACs and bytes of a model."""
    from onnxslim import pages

    facts = pages.inspect(model, shapes, ep)
    _show(pages.to_json(facts), pages.inspect_table(facts, nodes), json_to)


@cli.command()
@click.argument("original", type=_FILE)
@click.argument("other", type=_FILE)
@click.option("--data", metavar="DATA", help="Samples, as for --calib; without them inputs are generated.")
@click.option("--metric", metavar="NAME", help="Measure a metric of both as well.")
@click.option("--max-error", type=click.FloatRange(min=0), help="Exit with 1 if the relative L2 error is larger.")
@_SHAPE
@_THREADS
@_SEED
@_JSON
def compare(
    original: Path,
    other: Path,
    data: str | None,
    metric: str | None,
    max_error: float | None,
    shapes: dict[str, list[int]],
    threads: int,
    seed: int,
    json_to: str | None,
) -> int:
    """How far the outputs of OTHER are from those of ORIGINAL."""
    from onnxslim import pages
    from onnxslim.console import Bars

    facts = pages.compare(original, other, data, metric, shapes, threads=threads, seed=seed, progress=Bars())
    _show(pages.to_json(facts), pages.compare_table(facts), json_to)
    for line in facts["warnings"]:
        message(f"onnxslim: {line}")
    too_far = max_error is not None and facts["fidelity"]["relative_l2"] > max_error
    return int(too_far or bool(facts["warnings"]))


@cli.command()
@click.argument("models", nargs=-1, required=True, type=_FILE)
@click.option(
    "--ep", default="cpu", metavar="LIST", help="Execution providers: cpu, cuda, openvino.", show_default=True
)
@click.option("--data", metavar="DATA", help="Samples, as for --calib; without them inputs are generated.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, help="How long to measure.", show_default=True)
@_SHAPE
@_THREADS
@_SEED
@_JSON
def bench(
    models: tuple[Path, ...],
    ep: str,
    data: str | None,
    seconds: float,
    shapes: dict[str, list[int]],
    threads: int,
    seed: int,
    json_to: str | None,
) -> None:
    """Latency of models, measured in turn, and their speed over the first."""
    from onnxslim import pages

    eps = [name.strip() for name in ep.split(",")]
    facts = pages.bench(models, eps, data, shapes, seconds=seconds, threads=threads, seed=seed)
    _show(pages.to_json(facts), pages.bench_table(facts), json_to)


@cli.command()
@click.argument("name", required=False)
def passes(name: str | None) -> None:
    """The passes there are; with NAME what one does and its options."""
    from onnxslim import pages

    out().print(pages.pass_page(name) if name else pages.pass_list())


@cli.command()
@_JSON
def doctor(json_to: str | None) -> None:
    """What is installed, which execution providers run a model here, and what the CPU can do."""
    from onnxslim import pages

    facts = pages.doctor()
    _show(pages.to_json(facts), pages.doctor_table(facts), json_to)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    try:
        code = cli.main(args, prog_name="onnxslim", standalone_mode=False)
    except click.ClickException as error:
        message(f"onnxslim: {error.format_message()}")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        message("onnxslim: interrupted")
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OnnxslimError as error:
        message(f"onnxslim: {' '.join(str(error).split())}")
        sys.exit(error.exit_code)
    except Exception as error:  # whatever else escapes is a defect
        sys.exit(_internal(error, sys.argv[1:] if args is None else args))
    sys.exit(code if isinstance(code, int) else 0)


def _internal(error: Exception, args: list[str]) -> int:
    from onnxslim.repro import leave

    folder = leave(error, command=args)
    message(f"onnxslim: internal error: {type(error).__name__}: {error}; please report it with the folder {folder}")
    return 123
