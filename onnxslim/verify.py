"""The original against the result, on the same samples, in ONNX Runtime.

For every output (a sequence or map counts as several), over all samples together:

* relative L2 error ‖got - want‖ / ‖want‖ (the absolute norm where the reference is all zeros); of truth values and
  text, the share that differs,
* largest absolute error, and the same over the largest magnitude of the reference,
* cosine, and how often the arg max along the class axis agrees,
* how many elements are NaN or infinite in one of the two only, and how many are in the reference: about those nothing
  else can be said, and the errors above are of the others.

What a lossless pass may differ by depends on the type of the output (`TOLERANCE`). A graph that amplifies rounding, or
that draws random numbers, moves by more than that when ONNX Runtime merely orders its own arithmetic differently; the
allowance is therefore never below a few times what the original does to itself with the runtime's optimizations off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from onnxslim import runtime
from onnxslim.contract import NoProgress, Progress
from onnxslim.data import Data, Sample
from onnxslim.errors import DataError, ModelError
from onnxslim.metrics import Metric

# Relative error allowed to a lossless pass, by element type of the output. Integers and strings must be equal.
TOLERANCE: dict[str, float] = {
    "float64": 1e-6,
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 5e-2,
    "complex64": 1e-4,
    "complex128": 1e-6,
}
_OTHER_FLOAT = 0.25  # 8 bits and fewer
# One element may be off by this many times the allowed L2 error, relative to the largest magnitude of the output.
_PEAK = 10.0
_NOISE = 4.0
# Outputs of the original are kept up to this size, so that several candidates do not run it again.
_CACHE = 256_000_000


@dataclasses.dataclass(frozen=True)
class OutputFidelity:
    """How one output of the candidate differs from the original's; ``problem`` when the two cannot be compared.

    ``retyped`` says when it has another float type; its values are compared all the same. Of ``elements`` elements
    ``unjudged`` are NaN or infinite in the original. Where all are, errors are NaN.
    """

    output: str
    dtype: str
    relative_l2: float
    max_abs: float
    max_rel: float
    cosine: float
    top1_agreement: float | None
    nonfinite: int
    mismatches: int
    collapsed: bool = False
    problem: str | None = None
    elements: int = 0
    unjudged: int = 0
    retyped: str | None = None

    @property
    def blind(self) -> bool:
        """True when the original gives nothing that an error could be measured by."""
        return 0 < self.elements == self.unjudged

    @property
    def tolerance(self) -> float:
        """Relative L2 error that a lossless pass may cause."""
        if self.dtype in TOLERANCE:
            return TOLERANCE[self.dtype]
        return _OTHER_FLOAT if self.dtype.startswith("float") else 0.0


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """All outputs over ``samples`` samples from ``origin``."""

    outputs: tuple[OutputFidelity, ...]
    samples: int
    origin: str

    @property
    def relative_l2(self) -> float:
        """The worst output's relative L2 error, of those that can be judged; NaN where none can."""
        return max((o.relative_l2 for o in self.outputs if not o.blind), default=math.nan if self.outputs else 0.0)

    def broken(self, noise: Callable[[], Fidelity] | None = None) -> str | None:
        """Why a lossless pass must not do this, or None; ``noise`` gives what the original does to itself."""
        floor: Fidelity | None = None
        for output in self.outputs:
            if _within(output, 0.0, 0):
                continue
            if noise is not None and output.problem is None and output.retyped is None:
                floor = floor or noise()
                own = next((o for o in floor.outputs if o.output == output.output), None)
                if own is not None and _within(
                    output, _NOISE * max(own.relative_l2, own.max_rel / _PEAK), 2 * own.nonfinite, own.mismatches > 0
                ):
                    continue
            return describe(output)
        return None

    def warnings(self) -> list[str]:
        """What is wrong with a result whatever it was allowed to lose."""
        lines = []
        for output in self.outputs:
            if output.problem is not None:
                lines.append(f"output {output.output!r}: {output.problem}")
            elif output.nonfinite:
                lines.append(
                    f"output {output.output!r}: {output.nonfinite} values are NaN or infinite in one model only"
                )
            elif output.blind:
                lines.append(
                    f"output {output.output!r} is NaN or infinite everywhere in the original: on these samples nothing "
                    "can be said about errors"
                )
            elif output.collapsed:
                lines.append(f"output {output.output!r} collapsed: it no longer depends on the input")
        return lines

    def notes(self) -> list[str]:
        """What the errors do not cover."""
        lines = []
        for output in self.outputs:
            if output.retyped is not None:
                lines.append(f"output {output.output!r} {output.retyped}")
            if output.unjudged and not output.blind:
                lines.append(
                    f"output {output.output!r}: {output.unjudged} of {output.elements} values are NaN or infinite in "
                    "the original; errors are of the others"
                )
        return lines


def describe(output: OutputFidelity) -> str:
    """One line on what is wrong with an output of a lossless pass."""
    if output.problem is not None:
        return f"output {output.output!r}: {output.problem}"
    if output.retyped is not None:
        return f"output {output.output!r} {output.retyped}"
    if output.nonfinite:
        return f"output {output.output!r}: {output.nonfinite} values are NaN or infinite in one model only"
    if output.mismatches:
        return f"output {output.output!r}: {output.mismatches} {output.dtype} values differ"
    return (
        f"output {output.output!r}: relative error {output.relative_l2:.1e}, at most {output.max_rel:.1e} of the peak; "
        f"{output.dtype} allows {output.tolerance:.0e}"
    )


def _within(output: OutputFidelity, allowance: float, nonfinite: int, may_mismatch: bool = False) -> bool:
    tolerance = max(output.tolerance, allowance)
    return (
        output.problem is None
        and output.retyped is None
        and output.nonfinite <= nonfinite
        and (output.mismatches == 0 or may_mismatch)
        and (
            output.blind or tolerance == 0 or (output.relative_l2 <= tolerance and output.max_rel <= _PEAK * tolerance)
        )
    )


class Remembering(runtime.Runner):
    """A runner that answers a sample it has seen before from memory, while its answers are small."""

    def __init__(self, runner: runtime.Runner) -> None:
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self._runner = runner
        self._answers: dict[Hashable, dict[str, Any]] = {}
        self._left = _CACHE

    @property
    def session(self) -> Any:
        return self._runner.session

    def rest(self) -> None:
        self._runner.rest()

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        key = _key(feeds)
        if key is None:
            return self._runner(feeds)
        if key not in self._answers:
            answer = self._runner(feeds)
            self._left -= _nbytes(answer)
            if self._left < 0:
                self._answers.clear()
                self._left = 0
                return answer
            self._answers[key] = answer
        return self._answers[key]


def _key(feeds: Mapping[str, np.ndarray]) -> Hashable | None:
    """Something equal for equal feeds; None where they hold objects."""
    arrays = {name: np.asarray(array) for name, array in sorted(feeds.items())}
    if any(array.dtype.hasobject for array in arrays.values()):
        return None
    return tuple((n, str(a.dtype), a.shape, hashlib.sha256(a.tobytes()).digest()) for n, a in arrays.items())


def original_outputs(runner: runtime.Runner, data: Data, k: int, sample: Sample | None = None) -> dict[str, Any]:
    """What the original model, which is as the user wants it, gives for sample ``k`` of ``data``.

    Raises:
        DataError: it fails on this sample, which the message names.
    """
    try:
        return runtime.run(runner, data.feed(data[k] if sample is None else sample), "the original model")
    except ModelError as error:
        raise DataError(f"{data.where(k)}: {error}; correct the sample or leave it out") from error


def try_all(runner: runtime.Runner, data: Data) -> None:
    """Raise `DataError` when the original fails on a sample of ``data``."""
    for k, sample in enumerate(data):
        original_outputs(runner, data, k, sample)


class Reference:
    """The outputs of one model on each sample of ``data``, computed once and kept while they are small.

    ``where`` names the model in errors; without it, it is the original, and a sample that it fails on is bad data.
    ``runner`` may be taken away once the outputs are kept (`settle`).
    """

    def __init__(self, runner: runtime.Runner, data: Data, where: str | None = None) -> None:
        self.runner: runtime.Runner | None = runner
        self.data = data
        self._where = where
        self._kept: dict[int, dict[str, Any]] = {}
        self._size = 0

    def __iter__(self) -> Iterator[tuple[Sample, dict[str, Any]]]:
        for k, sample in enumerate(self.data):
            yield sample, self._outputs(k, sample)

    def settle(self) -> bool:
        """Compute the outputs now; False when they are too large to be kept, and the model will have to run again."""
        for k, sample in enumerate(self.data):
            self._outputs(k, sample)
            if k not in self._kept:
                return False
        return True

    def _outputs(self, k: int, sample: Sample) -> dict[str, Any]:
        if k in self._kept:
            return self._kept[k]
        assert self.runner is not None, "the outputs were not kept"
        if self._where is None:
            outputs = original_outputs(self.runner, self.data, k, sample)
        else:
            outputs = runtime.run(self.runner, self.data.feed(sample), f"{self._where}: {self.data.where(k)}")
        size = _nbytes(outputs)
        if self._size + size <= _CACHE:
            self._kept[k] = outputs
            self._size += size
        return outputs


def measure(
    reference: Reference,
    candidate: runtime.Runner,
    metric: Metric | None = None,
    *,
    where: str = "the result",
    progress: Progress | None = None,
    label: str = "verify",
) -> tuple[Fidelity, float | None]:
    """Run ``candidate`` once over the samples of ``reference``: its fidelity, and the mean of ``metric``.

    Raises:
        ModelError: one of the two fails on a sample.
    """
    pairs: dict[str, _Pair] = {}
    scores: list[float] = []
    items = (progress or NoProgress()).track(reference, total=len(reference.data), label=label)
    for sample, want in items:
        got = runtime.run(candidate, reference.data.feed(sample), where)
        if metric is not None:
            scores.append(metric(got, sample, want))
        right, left = dict(runtime.leaves(want)), dict(runtime.leaves(got))
        for name in dict.fromkeys((*right, *left)):
            pairs.setdefault(name, _Pair(name)).update(right.get(name), left.get(name))
    fidelity = Fidelity(tuple(p.result() for p in pairs.values()), len(reference.data), reference.data.origin)
    return fidelity, (float(np.mean(scores)) if scores else None)


def score(reference: Reference, metric: Metric) -> float:
    """The mean of ``metric`` for the original itself."""
    return float(np.mean([metric(outputs, sample, outputs) for sample, outputs in reference]))


def _nbytes(outputs: Mapping[str, Any]) -> int:
    return sum(array.nbytes for _, array in runtime.leaves(outputs))


class _Pair:
    """Running sums over the samples for one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = ""
        self.problem: str | None = None
        self.retyped: str | None = None
        self.error = self.want = self.got = self.dot = 0.0
        self.max_abs = self.peak = 0.0
        self.nonfinite = self.mismatches = self.elements = self.unjudged = 0
        self.agree = self.rows = self.others = 0
        self._first: tuple[np.ndarray, np.ndarray] | None = None
        self._spread = [0.0, 0.0]

    def update(self, want: np.ndarray | None, got: np.ndarray | None) -> None:
        if want is None or got is None:
            self.problem = self.problem or ("is missing" if got is None else "is not an output of the original")
            return
        self.dtype = str(want.dtype)
        floats = want.dtype.kind in "fV" and got.dtype.kind in "fV"
        if floats and want.dtype != got.dtype:
            self.retyped = f"is {got.dtype}, in the original {want.dtype}"
        elif want.dtype != got.dtype:
            self.problem = self.problem or f"is {got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
            return
        if want.shape != got.shape:
            self.problem = self.problem or (
                f"is {got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
            )
            return
        self._agreement(want, got)
        if want.dtype.kind not in "fcV":
            self.mismatches += int(np.sum(want != got))
            if want.dtype.kind not in "iu":
                self.others += want.size
                return
        self._floats(want, got)

    def _floats(self, want: np.ndarray, got: np.ndarray) -> None:
        wide = np.complex128 if want.dtype.kind == "c" else np.float64
        a, b = want.astype(wide).ravel(), got.astype(wide).ravel()
        self.elements += a.size
        finite = np.isfinite(a)
        self.unjudged += int(a.size - finite.sum())
        finite &= np.isfinite(b)
        if not finite.all():
            # Equal infinities and NaN in both are agreement, though nobody knows what about.
            self.nonfinite += int(np.sum(~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))))
            a, b = a[finite], b[finite]
        if not a.size:
            return
        difference = np.abs(b - a)
        self.error += float(difference @ difference)
        self.want += float(np.vdot(a, a).real)
        self.got += float(np.vdot(b, b).real)
        self.dot += float(np.vdot(a, b).real)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.peak = max(self.peak, float(np.abs(a).max()))
        if self._first is None:
            self._first = a, b
        elif self._first[0].shape == a.shape == b.shape:
            for k, (first, value) in enumerate(zip(self._first, (a, b), strict=True)):
                self._spread[k] += float(np.sum(np.abs(value - first) ** 2))

    def _agreement(self, want: np.ndarray, got: np.ndarray) -> None:
        """Classes are on axis 1 of (rows, classes) and (batch, classes, y, x), the last of (batch, steps, classes)."""
        if want.dtype.kind not in "fV" or want.ndim not in (2, 3, 4) or not want.size:
            return
        axis = 2 if want.ndim == 3 else 1
        if want.shape[axis] < 2:
            return
        wide = np.float32 if want.dtype.kind == "V" else want.dtype
        want, got = want.astype(wide), got.astype(wide)
        # NaN wins every arg max.
        hits = (np.argmax(want, axis) == np.argmax(got, axis))[~np.isnan(want).any(axis)]
        self.agree += int(hits.sum())
        self.rows += hits.size

    def result(self) -> OutputFidelity:
        scale = math.sqrt(self.want * self.got)
        blind = 0 < self.elements == self.unjudged
        relative = math.sqrt(self.error / self.want) if self.want else math.sqrt(self.error)
        cosine = self.dot / scale if scale else float(self.want == self.got)
        if self.others:
            relative = self.mismatches / self.others
            cosine = 1 - relative
        return OutputFidelity(
            output=self.name,
            dtype=self.dtype,
            relative_l2=math.nan if blind else relative,
            max_abs=self.max_abs,
            max_rel=self.max_abs / self.peak if self.peak else self.max_abs,
            cosine=math.nan if blind else cosine,
            top1_agreement=self.agree / self.rows if self.rows else None,
            nonfinite=self.nonfinite,
            mismatches=self.mismatches,
            # Samples that differ give outputs that differ: a result that answers the same to all of them is dead.
            collapsed=self._spread[0] > 1e-6 * self.want and self._spread[1] < 1e-6 * self._spread[0],
            problem=self.problem,
            elements=self.elements,
            unjudged=self.unjudged,
            retyped=self.retyped,
        )
