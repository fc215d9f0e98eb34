"""The command line. Modules that take long to import are imported by the command that needs them.

Exit codes: 0 done; 1 a check failed or a budget was missed, and the best model found was written; 2 bad usage or input,
nothing was written; 123 a defect of onnxslim, and a folder ``repro`` holds what reproduces it, or a crash of native
code that a pass led to; 128 + n ended by signal n.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from onnxslim import guard, lazy
from onnxslim.console import message, out
from onnxslim.errors import OnnxslimError
from onnxslim.outputs import Outputs, write

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

    Without options the result computes exactly what the input does (simplify, fold, fuse). Every run is verified in
    ONNX Runtime and measured; the input file is never touched.
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


class _Finite(click.FloatRange):
    """A number within bounds; nan is within none, though no comparison says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
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


def _use_libraries(ctx: click.Context, _: click.Parameter, paths: tuple[str, ...]) -> None:
    from onnxslim import custom_ops

    ctx.with_resource(custom_ops.using(paths))


_CUSTOM_OPS = click.option(
    "--custom-ops", multiple=True, metavar="FILE", callback=_use_libraries, expose_value=False,
    help="Library of custom operators (.so, .dll, .dylib) for every session. Repeatable.",
)  # fmt: skip
_FILE = click.Path(path_type=Path)
_MMAP_THRESHOLD = -3  # of mallopt(3)


@cli.command(DEFAULT, hidden=True)
@click.argument("source", metavar="IN", type=_FILE)
@click.argument("target_path", metavar="OUT", type=_FILE)
@click.option(
    "--passes",
    default="simplify,fold,fuse(opset=0)",
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
@click.option("--bench-ep", metavar="LIST", help="Measure latency on these execution providers too, as bench --ep.")
@click.option("--report", "page_to", type=_FILE, metavar="FILE", help="Write an HTML report with plots.")
@_CUSTOM_OPS
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
    bench_ep: str | None,
    page_to: Path | None,
    external_data: bool,
    json_to: str | None,
) -> int:
    """Optimize IN and write OUT."""
    outputs = Outputs(json_to, page=page_to, model=target_path)
    outputs.check([source], calib, evaluation)
    from onnxslim import eps
    from onnxslim.api import optimize
    from onnxslim.console import Bars

    providers = eps.parse(bench_ep) if bench_ep is not None else []

    result = optimize(
        source, passes, calib, evaluation, metric, max_drop, target, seed, Bars(),
        shapes=shapes, fix_shapes=fixed, threads=threads, bench=not no_bench,
        details=page_to is not None, require_int8=require_int8,
        own=False,
    )  # fmt: skip
    result.save(target_path, external=True if external_data else None)
    result.report.environment["command"] = shlex.join(["onnxslim", *sys.argv[1:]])
    missing: list[str] = []
    if providers:
        from onnxslim import bench

        missing = bench.report(
            result.report, source, target_path, providers, calib or evaluation, {**fixed, **shapes},
            threads=threads, seed=seed,
        )  # fmt: skip
    if page_to is not None:
        write(page_to, result.report.to_html(f"{source.name} → {target_path.name}"))
    outputs.show(result.report.to_json(), result.report.table())
    if result.exit_code:
        message(f"onnxslim: {result.report.warnings[0]}")
    for reason in missing:
        message(f"onnxslim: {reason}")
    return result.exit_code or int(bool(missing))


def _views(command: Any) -> Any:
    """The options ``--json``, ``--csv`` and ``--markdown``."""
    for name, what in (("markdown", "Markdown"), ("csv", "CSV")):
        command = click.option(
            f"--{name}",
            f"{name}_to",
            is_flag=False,
            flag_value="-",
            metavar="[FILE]",
            help=f"{what} to stdout, or to FILE.",
        )(command)
    return _JSON(command)


@cli.command()
@click.argument("model", type=_FILE)
@click.option("--nodes", is_flag=True, help="One row per node instead of per operator, the dearest first.")
@click.option("--prunable", is_flag=True, help="Groups of channels that can be removed, and what stays and why.")
@click.option("--ep", metavar="EP", help="Also say what runs there on integers, and why the rest does not: cpu.")
@_CUSTOM_OPS
@_SHAPE
@_views
def inspect(
    model: Path,
    nodes: bool,
    prunable: bool,
    ep: str | None,
    shapes: dict[str, list[int]],
    json_to: str | None,
    csv_to: str | None,
    markdown_to: str | None,
) -> None:
    """Inputs, outputs, parameters, MACs, bytes and activations of a model."""
    outputs = Outputs(json_to, csv_to, markdown_to)
    outputs.check([model])
    from onnxslim import inspection, pages

    if prunable:
        from onnxslim import prunable as groups

        found = groups.facts(model, shapes)
        outputs.show(pages.to_json(found), groups.table(found), groups.sheets(found))
        return
    facts = inspection.inspect(model, shapes, ep)
    outputs.show(pages.to_json(facts), inspection.table(facts, nodes), inspection.sheets(facts, nodes))


@cli.command()
@click.argument("original", type=_FILE)
@click.argument("other", type=_FILE)
@click.option("--data", metavar="DATA", help="Samples, as for --calib; without them inputs are generated.")
@click.option("--metric", metavar="NAME", help="Measure a metric of both as well.")
@click.option("--max-error", type=_Finite(min=0), help="Exit with 1 if the relative L2 error is larger.")
@click.option("--layers", "by_layer", is_flag=True, help="Compare layer by layer too: where does the error come in?")
@_CUSTOM_OPS
@_SHAPE
@_THREADS
@_SEED
@_views
def compare(
    original: Path,
    other: Path,
    data: str | None,
    metric: str | None,
    max_error: float | None,
    by_layer: bool,
    shapes: dict[str, list[int]],
    threads: int,
    seed: int,
    json_to: str | None,
    csv_to: str | None,
    markdown_to: str | None,
) -> int:
    """How far the outputs of OTHER are from those of ORIGINAL."""
    outputs = Outputs(json_to, csv_to, markdown_to)
    outputs.check([original, other], data)
    from onnxslim import comparison, pages
    from onnxslim.console import Bars

    facts = comparison.compare(
        original, other, data, metric, shapes, threads=threads, seed=seed, progress=Bars(), by_layer=by_layer
    )
    outputs.show(pages.to_json(facts), comparison.table(facts), comparison.sheets(facts))
    for line in facts["warnings"]:
        message(f"onnxslim: {line}")
    too_far = max_error is not None and facts["fidelity"]["relative_l2"] > max_error
    return int(too_far or bool(facts["warnings"]))


def _numbers(least: int) -> Any:
    def read(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int]:
        try:
            found = [int(word) for word in text.split(",")] if text is not None else []
        except ValueError:
            found = [least - 1]
        if any(number < least for number in found) or len(set(found)) < len(found):
            raise click.BadParameter(f"{text!r}: give different numbers of at least {least}, as 1,2,4", ctx, parameter)
        return found

    return read


@cli.command()
@click.argument("models", nargs=-1, required=True, type=_FILE)
@click.option(
    "--ep", default="cpu", metavar="LIST", show_default=True,
    help="Execution providers, as 'cpu,openvino@/path/to/python,cuda(graph=true)'.",
)  # fmt: skip
@click.option("--data", metavar="DATA", help="Samples, as for --calib; without them inputs are generated.")
@click.option(
    "--seconds", type=_Finite(min=0.1), default=5.0, show_default=True,
    help="How long to measure on each provider, loading and warming up apart.",
)  # fmt: skip
@click.option("--threads", default="0", callback=_numbers(0), metavar="N,...", help="Threads; 0: the runtime's choice.")
@click.option(
    "--batch", "batches", callback=_numbers(1), metavar="N,...", help="Batch sizes, where axis 0 is symbolic."
)
@click.option("--profile", is_flag=True, help="Also which kernels run, how long, and on which element types.")
@_CUSTOM_OPS
@_SHAPE
@_SEED
@_views
def bench(
    models: tuple[Path, ...],
    ep: str,
    data: str | None,
    seconds: float,
    threads: list[int],
    batches: list[int],
    profile: bool,
    shapes: dict[str, list[int]],
    seed: int,
    json_to: str | None,
    csv_to: str | None,
    markdown_to: str | None,
) -> int:
    """Latency of models, measured in turn, and their speed over the first.

    'bench compare OLD.json NEW.json' compares two results kept with --json. Exit code 1: something asked for could not
    be measured.
    """
    outputs = Outputs(json_to, csv_to, markdown_to)
    from onnxslim import bench as measuring
    from onnxslim import pages
    from onnxslim.console import Bars

    if str(models[0]) == "compare" and not models[0].exists():
        from onnxslim import bench_runs

        outputs.check([], *map(str, models[1:]))
        facts = bench_runs.compare(models[1:])
        outputs.show(pages.to_json(facts), bench_runs.table(facts), bench_runs.sheets(facts))
        return int(facts["slower"] > 0)
    outputs.check(models, data)
    facts = measuring.run(
        models, ep, data, shapes, seconds=seconds, threads=threads, batches=batches, seed=seed, profile=profile,
        progress=Bars(),
    )  # fmt: skip
    outputs.show(pages.to_json(facts), measuring.table(facts), measuring.sheets(facts))
    for entry in facts["missing"]:
        message(f"onnxslim: {entry['reason']}")
    return int(bool(facts["missing"]))


@cli.command("run")
@click.argument("recipe", default="onnxslim.toml", type=_FILE)
def run_recipe(recipe: Path) -> int:
    """Make every model that a recipe lists (onnxslim.toml); the exit code is the worst of them."""
    from onnxslim import config

    command = cli.commands[DEFAULT]
    known = {opt[2:]: p for p in command.params for opt in p.opts if opt.startswith("--")}
    flags = [name for name, p in known.items() if isinstance(p, click.Option) and p.is_flag]
    several = [name for name, p in known.items() if isinstance(p, click.Option) and p.multiple]
    jobs = config.read(recipe, known, flags, several)
    worst = 0
    folder = Path.cwd()
    os.chdir(recipe.absolute().parent)
    try:
        for job in jobs:
            message(f"onnxslim: {job.source} -> {job.target}")
            arguments = [job.source, job.target, *job.arguments]
            make = functools.partial(command.main, arguments, prog_name="onnxslim", standalone_mode=False)
            worst = max(worst, code := guard.also(make))
            if guard.was_told(code):
                break
    finally:
        os.chdir(folder)
    return worst


@cli.command()
@click.argument("name", required=False)
def passes(name: str | None) -> None:
    """The passes there are; with NAME what one does and its options."""
    from onnxslim import pages

    out().print(pages.pass_page(name) if name else pages.pass_list())


@cli.command()
@click.option("--setup", metavar="EP", help="First make an environment with this execution provider, for bench --ep.")
@_JSON
def doctor(setup: str | None, json_to: str | None) -> None:
    """What is installed, which execution providers run a model, and what the CPU can do."""
    outputs = Outputs(json_to)
    outputs.check([])
    from onnxslim import eps, pages

    if setup is not None:
        message(f"onnxslim: {setup} is in {eps.prepare(setup)}")
    facts = pages.doctor()
    outputs.show(pages.to_json(facts), pages.doctor_table(facts))


def entry() -> None:
    """`main` as a program: where native code crashes it ends with a message too."""
    sys.exit(guard.apart(main))


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    _return_memory()
    lazy.defer()
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


def _return_memory() -> None:
    """Have weights that are freed go back to the system.

    By default the C library of Linux stops doing that for blocks as large as those it has seen freed once, and the
    memory of a session that is gone stays with the process.
    """
    import ctypes

    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_MMAP_THRESHOLD, 1 << 20)


def _internal(error: Exception, args: list[str]) -> int:
    from onnxslim.repro import leave

    folder = leave(error, command=args)
    message(f"onnxslim: internal error: {type(error).__name__}: {error}; please report it with the folder {folder}")
    return 123
