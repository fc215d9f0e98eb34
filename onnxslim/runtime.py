"""ONNX Runtime in this process: sessions, forward passes and latency. Only this file and `worker` import it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnxslim import custom_ops, maps, rounds, stages, timing, worker
from onnxslim import model as model_io
from onnxslim.eps import PACKAGES, Ep
from onnxslim.eps import PROVIDERS as PROVIDERS
from onnxslim.errors import ModelError, UsageError

worker.mute(ort)

# Above this many bytes of weights a session reads them from disk: it would keep a serialized copy for as long as it
# lives, and parse another one while it is made.
IN_MEMORY = 32_000_000
# Bytes of weights of each part of a model that runs a part at a time.
PART = 256_000_000
# Above this many bytes of weights a model that is only compared runs a part at a time.
STAGED = 1_000_000_000
_FEWEST_BLOCKS, _MOST_BLOCKS = 4, 12
_FEWEST_ROUNDS = 3
# Seconds that a session warms up for at most: what is cold in a pass that takes longer, its first one has warmed.
_WARM = 0.03
_NOT_IN_NUMPY = (
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class _Declared(NamedTuple):
    """An input as a session declares it."""

    name: str
    type: str


class Runner:
    """A session together with the names it takes and gives: ``runner(feeds) -> {output: array}``.

    Floats are converted where the session declares another float type than the sample has. A pass that fails is a
    `ModelError`.
    ``again`` makes the session anew; with it, `rest` gives the memory of the session back until the next call.
    """

    def __init__(self, session: ort.InferenceSession, again: Callable[[], ort.InferenceSession] | None = None) -> None:
        self._session: ort.InferenceSession | None = session
        self._again = again
        # The runtime's own descriptions would keep the session alive that they come from.
        self._declared = [_Declared(i.name, i.type) for i in session.get_inputs()]
        self.inputs = [i.name for i in self._declared]
        self.outputs = [o.name for o in session.get_outputs()]

    @property
    def session(self) -> ort.InferenceSession:
        if self._session is None:
            assert self._again is not None
            self._session = self._again()
        return self._session

    def rest(self) -> None:
        """Drop the session where it can be made anew."""
        if self._again is not None:
            self._session = None

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        try:
            results = self.session.run(None, worker.fitted(self._declared, feeds))
        except Exception as error:  # the binding raises a dozen unrelated types
            shapes = {name: list(a.shape) for name, a in feeds.items()}
            raise ModelError(f"fails on inputs {shapes}: {_first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))


def options(*, threads: int = 0, optimize: bool = True, optimized_path: str | None = None) -> ort.SessionOptions:
    """Session options: quiet, ``threads`` intra-operator threads (0: the runtime's choice) that rest between passes.

    By default they go on spinning after a pass, and take the cores from the next session and from the arithmetic
    between two passes. Within a pass they spin as they do for every user.
    """
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 4
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    level = ort.GraphOptimizationLevel
    chosen.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if optimized_path is not None:
        chosen.optimized_model_filepath = optimized_path
    for library in custom_ops.libraries():
        try:
            chosen.register_custom_ops_library(library)
        except Exception as error:  # the binding raises many types
            raise UsageError(f"{library}: ONNX Runtime cannot register it: {_first_line(error)}") from error
    return chosen


def available(ep: str) -> bool:
    """True when the installed onnxruntime was built with this execution provider."""
    return PROVIDERS[ep] in ort.get_available_providers()


def load(
    source: ir.Model | bytes | str | os.PathLike[str],
    *,
    ep: str = "cpu",
    threads: int = 0,
    optimize: bool = True,
    optimized_path: str | None = None,
    chosen: ort.SessionOptions | None = None,
) -> Runner:
    """A `Runner` for a model, a serialized one, or a file on one execution provider.

    Raises:
        UsageError: the execution provider is unknown or not in the installed onnxruntime.
        ModelError: ONNX Runtime refuses the model.
    """
    if ep not in PROVIDERS:
        raise UsageError(f"unknown execution provider {ep!r}: give one of {', '.join(PROVIDERS)}")
    if not available(ep):
        raise UsageError(
            f"the installed onnxruntime has no {PROVIDERS[ep]}: {' '.join(PACKAGES[ep])} brings it, in an environment "
            f"of its own: {Ep(ep).install_line()}"
        )
    if chosen is None:
        chosen = options(threads=threads, optimize=optimize, optimized_path=optimized_path)
    with contextlib.ExitStack() as stack:
        return _open(_content(source, stack, whole=optimized_path is not None), ep, chosen)


class _Staged(Runner):
    """A model whose parts are loaded, run and dropped in turn at every pass; see `onnxslim.stages`."""

    def __init__(self, model: ir.Model, parts: Sequence[stages.Stage], threads: int, optimize: bool) -> None:
        self.inputs = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
        self.outputs = [v.name or "" for v in model.graph.outputs]
        self._parts = parts
        self._threads, self._optimize = threads, optimize

    def rest(self) -> None:
        """Nothing is held between passes."""

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        values: dict[str, Any] = {name: feeds[name] for name in self.inputs}
        for k, part in enumerate(self._parts):
            chosen = options(threads=self._threads, optimize=self._optimize)
            # Weights are multiplied with once: a copy in the order of a kernel's liking is not worth its memory.
            chosen.add_session_config_entry("session.disable_prepacking", "1")
            values.update(load(part.model, chosen=chosen)(values))
            model_io.forget_weights(part.model)
            needed = {*self.outputs, *(name for later in self._parts[k + 1 :] for name in later.takes)}
            values = {name: value for name, value in values.items() if name in needed}
        return {name: values[name] for name in self.outputs}


def load_lean(
    model: ir.Model, source: ir.Model | bytes | str | os.PathLike[str], *, threads: int = 0, optimize: bool = True
) -> Runner:
    """`load` of ``source``, which ``model`` was read from, to be run a few times: a large model a part at a time."""
    if model_io.weight_bytes(model) > STAGED:
        parts = stages.cut(model, PART)
        if len(parts) > 1:
            return _Staged(model, parts, threads, optimize)
    return load(source, threads=threads, optimize=optimize)


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a session is made of: a file or a message, and the folder that the weights in it refer to.

    ``lasting`` when it can be used again later and takes no memory of its own.
    """

    source: bytes | str
    name: str
    lasting: bool = True
    folder: Path | None = None


def _content(
    source: ir.Model | bytes | str | os.PathLike[str],
    stack: contextlib.ExitStack,
    *,
    whole: bool = False,
    by_reference: bool = False,
) -> _Content:
    """``source`` ready to be loaded; weights of a model that lie in files are left there, unless it must be ``whole``.

    A file is read by ONNX Runtime itself, weights and all, unless those are wanted ``by_reference`` too.
    """
    if isinstance(source, bytes):
        return _Content(source, "the given bytes")
    if not isinstance(source, ir.Model):
        path = os.fspath(source)
        if not Path(path).is_file():
            raise ModelError(f"{path}: no such file")
        referring = model_io.file_by_reference(path) if by_reference else None
        return _Content(path, path) if referring is None else _Content(referring[0], path, folder=referring[1])
    name = source.graph.name or "the model"
    referring = None if whole else model_io.by_reference(source, IN_MEMORY)
    if referring is not None:
        return _Content(referring[0], name, folder=referring[1])
    if model_io.weight_bytes(source) < IN_MEMORY:
        return _Content(model_io.to_bytes(source), name, lasting=False)
    return _Content(str(stack.enter_context(model_io.on_disk(source))), name, lasting=False)


def _open(content: _Content, ep: str, chosen: ort.SessionOptions) -> Runner:
    if content.folder is not None:
        chosen.add_session_config_entry(_WEIGHTS_FOLDER, str(content.folder))

    def again() -> ort.InferenceSession:
        return ort.InferenceSession(content.source, chosen, providers=[PROVIDERS[ep]])

    try:
        return Runner(again(), again if content.lasting else None)
    except Exception as error:  # the binding raises a dozen unrelated types
        raise ModelError(f"{content.name}: ONNX Runtime cannot load it: {_first_line(error)}") from error


def run(runner: Runner, feeds: Mapping[str, np.ndarray], where: str = "the model") -> dict[str, Any]:
    """One forward pass.

    Raises:
        ModelError: the model fails on this input.
    """
    try:
        return runner(feeds)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def leaves(outputs: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every array in a set of outputs; elements of sequences and maps get the name ``output[key]``."""
    for name, value in outputs.items():
        if isinstance(value, list):
            yield from leaves({f"{name}[{k}]": item for k, item in enumerate(value)})
        elif isinstance(value, dict):
            yield from leaves({f"{name}[{key}]": item for key, item in value.items()})
        elif value is not None:  # an absent optional
            yield name, np.asarray(value)


def arrays(outputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Every array in a set of outputs, in their order."""
    return [array for _, array in leaves(outputs)]


def tap(
    model: ir.Model,
    names: Iterable[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
    optimize: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Run ``model`` on each sample and yield the values called ``names`` (inputs and intermediate tensors).

    Only the part of the graph that these values need is computed, and one sample's tensors are in memory at a time.
    A value in the branch of an If is empty where the branch is not taken; values in other bodies cannot be tapped.
    Types that the binding cannot give out come as float32.
    """
    from onnxslim import branch_values
    from onnxslim.graph import add_node, remove_dead

    wanted = list(dict.fromkeys(names))
    clone = model.clone()
    values = {v.name: v for v in clone.graph.inputs}
    for node in clone.graph:
        values.update((v.name, v) for v in node.outputs)
    values.update(branch_values.lift(clone, [name for name in wanted if name not in values]))
    clone.graph.outputs.clear()
    inputs = {v.name for v in clone.graph.inputs}
    for name in wanted:
        if name in inputs:
            continue
        value = values[name]
        # ONNX Runtime infers the type of an intermediate value itself; a declared shape may be stale or too narrow.
        value.shape = None
        if value.dtype in _NOT_IN_NUMPY:
            like = ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT))
            to = {"to": int(ir.DataType.FLOAT)}
            cast = add_node(clone.graph, "Cast", [value], after=value.producer(), attributes=to, like=like)
            values[name] = value = cast.outputs[0]
        clone.graph.outputs.append(value)
    if not clone.graph.outputs:
        for feed in feeds:
            yield {name: np.asarray(feed[name]) for name in wanted}
        return
    remove_dead(clone.graph)
    outputs = {name: values[name].name or "" for name in wanted}
    runner = load_lean(clone, clone, threads=threads, optimize=optimize)
    for feed in feeds:
        results = run(runner, feed)
        found = {name: results[own] if own in results else np.asarray(feed[own]) for name, own in outputs.items()}
        del results
        yield found
        del found  # whoever took it may be done with parts of it before the next sample runs


def compare_models(
    sources: Sequence[ir.Model | bytes | str | os.PathLike[str]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    ep: str = "cpu",
    threads: int = 0,
    seconds: float = 3.0,
    seed: int = 0,
) -> timing.Comparison:
    """Measure models in turn on the same samples, in blocks of new sessions (see `onnxslim.timing`).

    ``seconds`` count the making of the sessions too; but there are at least four blocks, of three rounds each.
    """
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:

        def maker(content: _Content) -> Callable[[], Callable[[int], Any]]:
            return lambda: _call(_open(content, ep, options(threads=threads)), feeds)

        makers = [maker(_content(source, stack, by_reference=True)) for source in sources]
        single = [threads == 1 and ep == "cpu"] * len(makers)

        def measured(least_seconds: float) -> list[list[float]]:
            return rounds.block(makers, least_seconds, rng, single=single, least=_FEWEST_ROUNDS, warm=_WARM)["rounds"]

        start = time.perf_counter()
        blocks = [measured(0.0)]
        cost = time.perf_counter() - start
        count = min(max(int(seconds / cost), _FEWEST_BLOCKS), _MOST_BLOCKS)
        rest = max(seconds / count - cost, 0.0)
        blocks += [measured(rest) for _ in range(count - 1)]
    return timing.compare([np.array(b) for b in blocks])


def _call(runner: Runner, feeds: Sequence[Mapping[str, np.ndarray]]) -> Callable[[int], Any]:
    return lambda k: runner(feeds[k % len(feeds)])


def profile(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], *, ep: str = "cpu", threads: int = 0, rounds: int = 8,
    seconds: float = 4.0,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds that each node of the graph really executed takes, by the name ONNX Runtime gave it.

    The median over ``rounds`` passes for each sample of ``feeds``, averaged over the samples; over fewer, two at least,
    where they take more than ``seconds``. Names that the runtime derives from ours are reduced to ours (see
    `original_name`), and times under the same name are added.
    """
    import json
    import tempfile

    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        chosen = options(threads=threads)
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(Path(folder) / "profile")
        runner = load(model, ep=ep, chosen=chosen)
        stop = time.perf_counter() + seconds
        done = 0
        while done < rounds and (done < 2 or time.perf_counter() < stop):
            for sample in feeds:
                runner(sample)
            done += 1
        events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    totals: dict[str, float] = {}
    for name, found in times.items():
        # A node in a loop body runs several times per pass: what counts is its share of one pass.
        per_pass = float(np.median(found)) * len(found) / (done * len(feeds))
        totals[original_name(name)] = totals.get(original_name(name), 0.0) + per_pass
    return totals


def original_name(name: str) -> str:
    """The node or value name of the file that ONNX Runtime's name for a fused or rewritten node comes from."""
    name = re.sub(r"_token_\d+$", "", name.removeprefix("fused "))
    return re.sub(r"_(nchwc|nhwc)$", "", name)


def optimized(model: ir.Model | Path, *, ep: str = "cpu", threads: int = 0) -> ir.Model:
    """The graph that ONNX Runtime really executes on ``ep``: shows which kernels were fused.

    Of initializers only the names, types and shapes may be read: the data of large ones is gone.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        path = Path(folder) / "optimized.onnx"
        load(model, ep=ep, threads=threads, optimized_path=str(path))
        return maps.read(onnx.load(path, load_external_data=False), "the graph that ONNX Runtime executes")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
