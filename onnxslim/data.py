"""Calibration and evaluation data: one sample at a time, whatever the form it came in.

A sample is a dictionary ``{name: array}`` with one array per model input, leading axis included, plus whatever else the
file holds (``labels`` for a metric). Forms, as text or as Python objects:

* ``file.npz``: one array per input, samples on axis 0; sample k is ``a[k:k+1]``.
* a folder of ``.npz`` files: one sample each, fed as they are (for inputs of varying shape).
* a folder of ``test_data_set_*`` folders with ``input_0.pb``, ...: the layout of the ONNX model zoo.
* ``module:function``: called without arguments, returns an iterable of samples.
* any iterable of samples.

Arrays are never unpickled, and files are read lazily: memory holds one file at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim.errors import DataError, UsageError

Sample = dict[str, np.ndarray]
Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Name, NumPy type and shape (None where any size is allowed) of a model input."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None


class Data(Sequence[Sample]):
    """A sequence of samples that can be read several times.

    ``load(k)`` reads sample k, and ``where(k)`` names it in errors. ``origin`` says in the report where they came from.
    ``specs`` filter what is fed: only the arrays named like an input are returned by `feeds`.
    """

    def __init__(
        self,
        origin: str,
        length: int,
        load: Callable[[int], Sample],
        specs: Sequence[InputSpec],
        where: Callable[[int], str] | None = None,
    ) -> None:
        self.origin = origin
        self.specs = tuple(specs)
        self.where = where or (lambda k: f"{origin}: sample {k}")
        self._length = length
        self._load = load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.pick(range(self._length)[index])
        if not -self._length <= index < self._length:
            raise IndexError(index)
        k = index % self._length
        sample = self._load(k)
        check_sample(sample, self.specs, self.where(k))
        return sample

    def feeds(self) -> Iterator[Sample]:
        """The samples, reduced to the arrays that are model inputs."""
        for sample in self:
            yield self.feed(sample)

    def feed(self, sample: Sample) -> Sample:
        """One sample reduced to the arrays that are model inputs."""
        # Text comes as '<U3' from a file and is fed as objects.
        return {
            spec.name: sample[spec.name].astype(object) if spec.dtype.kind == "O" else sample[spec.name]
            for spec in self.specs
        }

    def split(self, held_out: float) -> tuple[Data, Data]:
        """Two parts, the second with about ``held_out`` of the samples: the end of each half of the sequence.

        Neighbours in a file are often relatives (frames of a video, views of an object, a class): whole stretches are
        held out, so that the second part is not merely a copy of the first. With a single sample both parts are that
        sample.
        """
        if self._length < 2:
            return self, self
        halves = np.array_split(np.arange(self._length), 2 if held_out * self._length >= 2 else 1)
        second = [int(k) for half in halves for k in half[-max(1, round(held_out * len(half))) :]]
        taken = set(second)
        first = [k for k in range(self._length) if k not in taken]
        return self.pick(first or second), self.pick(second)

    def spread(self, count: int) -> Data:
        """At most ``count`` samples, spread evenly over the sequence (files are often sorted by class)."""
        if count >= self._length:
            return self
        return self.pick([int(k) for k in np.linspace(0, self._length - 1, count).round()])

    def pick(self, indices: Sequence[int]) -> Data:
        """The samples at ``indices``, in that order."""
        return Data(
            self.origin,
            len(indices),
            lambda k: self._load(indices[k]),
            self.specs,
            lambda k: self.where(indices[k]),
        )


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The inputs of ``model`` that must be fed: every graph input of tensor type without a default."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        name = value.name or ""
        if not isinstance(value.type, ir.TensorType):
            raise DataError(f"input {name!r} is not a tensor ({value.type}): only tensor inputs can be fed")
        # Some exporters write -1 for a dimension that is not known.
        shape = None if value.shape is None else tuple(_size(d) for d in value.shape)
        specs.append(InputSpec(name, np.dtype(value.type.dtype.numpy()), shape))
    return specs


def _size(dim: int | ir.SymbolicDim) -> int | None:
    return dim if isinstance(dim, int) and dim >= 0 else None


def open_data(source: Source, specs: Sequence[InputSpec], *, what: str = "calibration") -> Data:
    """Open ``source`` in any of the forms above and check its first sample against ``specs``.

    Raises:
        DataError: missing file, missing or unknown array, wrong type or shape, nothing in it.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        path = Path(text)
        try:
            folder, there = path.is_dir(), path.exists()
        except OSError as error:
            raise DataError(f"{what} data: {text}: {error.strerror}") from error
        if folder:
            data = _open_folder(path, specs, what)
        elif there:
            data = _open_npz(path, specs, what)
        elif ":" in text and path.suffix != ".npz":
            data = _from_iterable(_called(resolve(text, what), text, what), text, specs, what)
        else:
            raise DataError(f"{what} data: {text}: no such file or folder")
    else:
        data = _from_iterable(source, "python iterable", specs, what)
    if not len(data):
        raise DataError(f"{what} data: {data.origin}: holds no sample")
    _ = data[0]
    return data


def resolve(text: str, what: str) -> Callable[..., Any]:
    """Import ``module:function`` with the current folder on the path, as other command-line tools do."""
    module_name, _, attribute = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"{what}: cannot import {text!r}: {type(error).__name__}: {error}; give module:function"
        ) from error
    if not callable(found):
        raise UsageError(f"{what}: {text!r} is not a function")
    return found


def _called(function: Callable[..., Any], text: str, what: str) -> Any:
    try:
        return function()
    except Exception as error:  # the user's own code may raise anything
        raise DataError(f"{what} data: {text} raised {type(error).__name__}: {error}") from error


def check_sample(sample: Sample, specs: Sequence[InputSpec], where: str) -> None:
    """Raise `DataError` unless ``sample`` has an array of the right type and shape for every input."""
    for spec in specs:
        if spec.name not in sample:
            raise DataError(
                f"{where}: no array named {spec.name!r}; the model needs {[s.name for s in specs]}, "
                f"the data has {sorted(sample)}"
            )
        array = sample[spec.name]
        if array.dtype != spec.dtype and not (spec.dtype.kind == "O" and array.dtype.kind in "OU"):
            raise DataError(f"{where}: array {spec.name!r} is {array.dtype}, the model needs {spec.dtype}")
        if spec.shape is None:
            continue
        fits = len(spec.shape) == array.ndim and all(
            want is None or want == have for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            want = ["any" if d is None else d for d in spec.shape]
            raise DataError(f"{where}: array {spec.name!r} has shape {list(array.shape)}, the model needs {want}")


def _read_npz(path: Path, what: str) -> Sample:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.ndarray):
            with archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise a dozen unrelated types for a broken file
        raise DataError(f"{what} data: {path}: not a readable .npz file ({error})") from error
    raise DataError(f"{what} data: {path}: is a .npy file; save named arrays with numpy.savez")


def _open_npz(path: Path, specs: Sequence[InputSpec], what: str) -> Data:
    return _from_arrays(_read_npz(path, what), str(path), specs, what)


def _from_arrays(arrays: Sample, origin: str, specs: Sequence[InputSpec], what: str) -> Data:
    """Samples on axis 0 of every array."""
    missing = [s.name for s in specs if s.name not in arrays]
    if missing:
        raise DataError(
            f"{what} data: {origin}: no array named {missing[0]!r}; the model needs {[s.name for s in specs]}, "
            f"the data has {sorted(arrays)}"
        )
    scalars = [name for name, a in arrays.items() if a.ndim == 0]
    if scalars:
        raise DataError(f"{what} data: {origin}: array {scalars[0]!r} is a scalar; samples are counted on axis 0")
    counts = {name: len(a) for name, a in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{what} data: {origin}: arrays disagree on the number of samples (axis 0): {counts}; samples that are fed "
            "as they are, each in a .npz file of its own, may lie in a folder"
        )
    # A model with a fixed batch of B takes B rows at a time.
    batch = next((s.shape[0] for s in specs if s.shape and s.shape[0] is not None), 1) or 1
    rows = next(iter(counts.values()), 0)
    if 0 < rows < batch:
        raise DataError(f"{what} data: {origin}: holds {rows} rows, the model takes {batch} at a time")
    return Data(
        origin,
        rows // batch,
        lambda k: {n: a[k * batch : (k + 1) * batch] for n, a in arrays.items()},
        specs,
        lambda k: f"{what} data: {origin}: sample {k}",
    )


def _open_folder(path: Path, specs: Sequence[InputSpec], what: str) -> Data:
    files = sorted(path.glob("*.npz"))
    if files:
        return Data(
            str(path), len(files), lambda k: _read_npz(files[k], what), specs, lambda k: f"{what} data: {files[k]}"
        )
    sets = sorted(path.glob("test_data_set_*"), key=lambda p: (len(p.name), p.name))
    if sets:
        return Data(
            str(path),
            len(sets),
            lambda k: _read_onnx_set(sets[k], specs, what),
            specs,
            lambda k: f"{what} data: {sets[k]}",
        )
    raise DataError(f"{what} data: {path}: holds neither .npz files nor test_data_set_* folders")


def _read_onnx_set(folder: Path, specs: Sequence[InputSpec], what: str) -> Sample:
    import onnx

    sample: Sample = {}
    for index, spec in enumerate(specs):
        file = folder / f"input_{index}.pb"
        try:
            tensor = onnx.TensorProto.FromString(file.read_bytes())
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{what} data: {file}: refers to another file, which a sample must not")
            sample[tensor.name if tensor.name in {s.name for s in specs} else spec.name] = onnx.numpy_helper.to_array(
                tensor
            )
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{what} data: {file}: {error.strerror}") from error
        except Exception as error:  # protobuf and onnx raise unrelated types for a broken file
            raise DataError(f"{what} data: {file}: not a serialized tensor ({error})") from error
    return sample


def _from_iterable(items: Any, origin: str, specs: Sequence[InputSpec], what: str) -> Data:
    if isinstance(items, Mapping):  # as in a .npz
        return _from_arrays({name: np.asarray(a) for name, a in items.items()}, origin, specs, what)
    if not isinstance(items, Iterable):
        raise DataError(f"{what} data: {origin}: is {type(items).__name__}, not an iterable of samples")
    # A sequence is read sample by sample; what can be read only once must be kept.
    kept = items if isinstance(items, Sequence) else _called(lambda: list(items), origin, what)

    def load(k: int) -> Sample:
        try:
            item = kept[k]
            if isinstance(item, Mapping):
                return {name: np.asarray(value) for name, value in item.items()}
        except Exception as error:  # the user's own code, and arrays of any library, may raise anything
            raise DataError(f"{where(k)} raised {type(error).__name__}: {error}") from error
        raise DataError(f"{where(k)} is {type(item).__name__}, not a {{name: array}} mapping")

    def where(k: int) -> str:
        return f"{what} data: {origin}: sample {k}"

    return Data(origin, len(kept), load, specs, where)


def synthetic(
    model: ir.Model,
    count: int,
    *,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    scale: int = 1,
) -> Data:
    """``count`` generated samples for ``model``: normal floats, small non-negative integers, booleans.

    A symbolic dimension is 1 where it is the batch (axis 0, or the first symbolic one behind a fixed size above 1, as
    in the states of recurrent networks), 64 in an array of rank 4 or more, 16 in a smaller one, and one name has one
    size everywhere; ``scale`` multiplies these sizes (of images at most to 512), ``shapes`` overrides by input name.

    Raises:
        UsageError: a shape is given for an unknown input or has the wrong rank.
    """
    specs = input_specs(model)
    given = {name: tuple(shape) for name, shape in (shapes or {}).items()}
    by_name = {spec.name: spec for spec in specs}
    concrete: dict[str, tuple[int, ...]] = {}
    for name, shape in given.items():
        if name not in by_name:
            raise UsageError(f"--shape: the model has no input {name!r}; it has {sorted(by_name)}")
        declared = by_name[name].shape
        if declared is not None and (
            len(declared) != len(shape) or any(d not in (None, s) for d, s in zip(declared, shape, strict=True))
        ):
            raise UsageError(f"--shape: {name}={list(shape)} does not fit the declared shape {list(declared)}")
    symbols: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.name in given and value.shape is not None:
            for dim, size in zip(value.shape, given[value.name], strict=True):
                if not isinstance(dim, int) and dim.value is not None:
                    symbols.setdefault(str(dim.value), size)

    def choose(dim: int | ir.SymbolicDim, batch: bool, rank: int) -> int:
        size = _size(dim)
        if size is not None:
            return size
        usual = 1 if batch else min(64 * scale, 512) if rank >= 4 else 16 * scale
        name = None if isinstance(dim, int) else dim.value
        return usual if name is None else symbols.setdefault(str(name), usual)

    for value in model.graph.inputs:
        if value.name not in by_name:
            continue
        if value.name in given:
            concrete[value.name] = given[value.name]
        elif value.shape is None:
            concrete[value.name] = ()
        else:
            rank, batch = len(value.shape), _batch_axis(value.shape)
            concrete[value.name] = tuple(choose(d, axis == batch, rank) for axis, d in enumerate(value.shape))

    def load(k: int) -> Sample:
        rng = np.random.default_rng([seed, k])
        return {spec.name: _draw(rng, spec.dtype, concrete[spec.name]) for spec in specs}

    return Data("synthetic inputs", count, load, specs)


def _batch_axis(shape: ir.Shape) -> int | None:
    sizes = [_size(d) for d in shape]
    if not sizes or sizes[0] in (0, 1):
        return None
    return next((axis for axis, size in enumerate(sizes) if size is None), None)


def _draw(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "f" or dtype.kind == "V":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        # Integers are mostly token ids, masks and lengths: 0 and 1 are valid for all of them.
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "OU":
        return np.array(np.full(shape, "a"), dtype=object)
    return rng.standard_normal(shape).astype(dtype)
