"""Reading and writing models: the only file that knows protobuf and the disk.

``load`` takes any form of model and returns a normalized `onnx_ir.Model`: functions inlined, Constant nodes lifted to
initializers, sparse initializers made dense, initializers no longer listed as inputs, shapes inferred. ``save`` writes
it so that the output appears whole or not at all, with external data that belongs to the output alone.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
    ShapeInferencePass,
    TopologicalSortPass,
)

from onnxslim.errors import ModelError, UsageError

# A protobuf message ends at 2 GiB; above this many bytes of weights they go to a file of their own.
INLINE_LIMIT = 1_800_000_000
WARNINGS = "onnxslim.warnings"  # keys in Model.meta
NODES = "onnxslim.nodes"
SHAPES = "onnxslim.shapes"


def load(source: Any) -> ir.Model:
    """Read a model in any form and normalize it; ``source`` itself is never changed.

    Args:
        source: a path, the bytes of a file, an `onnx.ModelProto`, an `onnx_ir.Model`, or a `torch.onnx.ONNXProgram`.

    Returns:
        A new model. ``model.meta["onnxslim.warnings"]`` lists what was changed on the way in, and
        ``model.meta["onnxslim.nodes"]`` counts the nodes before that (functions inlined);
        ``model.meta["onnxslim.shapes"]`` is True when it declared the shape of any intermediate value.

    Raises:
        ModelError: not an ONNX file, empty, truncated, invalid, of an unknown opset, or with external data that is
            missing, too short or outside the folder of the model.
    """
    warnings: list[str] = []
    if isinstance(source, str | os.PathLike):
        model = _read(Path(source), warnings)
    elif isinstance(source, bytes | bytearray | memoryview):
        model = _from_proto(_parse(bytes(source), "the given bytes"), "the given bytes", None, warnings)
    elif isinstance(source, onnx.ModelProto):
        model = _from_proto(source, "the given ModelProto", None, warnings)
    elif isinstance(source, ir.Model):
        model = _clone(source)
    elif isinstance(getattr(source, "model", None), ir.Model):  # torch.onnx.ONNXProgram
        model = _clone(source.model)
    elif isinstance(getattr(source, "model_proto", None), onnx.ModelProto):
        model = _from_proto(source.model_proto, "the given program", None, warnings)
    else:
        raise ModelError(
            f"cannot read a model from {type(source).__name__}: give a path, bytes, ModelProto, onnx_ir.Model or "
            "torch.onnx.ONNXProgram"
        )
    return normalize(model, warnings)


def _clone(model: ir.Model) -> ir.Model:
    try:
        return model.clone()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the given onnx_ir.Model is not valid: {error}") from error


def normalize(model: ir.Model, warnings: list[str] | None = None) -> ir.Model:
    """Bring ``model`` (in place) to the form that every pass expects; see the module's docstring."""
    warnings = [] if warnings is None else warnings
    InlinePass()(model)
    model.meta[NODES] = sum(1 for _ in model.graph.all_nodes())
    model.meta[SHAPES] = any(v.shape is not None for v in inner_values(model))
    _sort_if_needed(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    overridable = [v.name for v in model.graph.inputs if v.is_initializer()]
    if overridable:
        RemoveInitializersFromInputsPass()(model)
        if model.ir_version >= 4:
            warnings.append(
                f"{len(overridable)} initializers were listed as inputs and could be overridden at run time; "
                f"they are constants now (first: {overridable[0]!r})"
            )
    model.ir_version = max(model.ir_version or 0, 4)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.const_value is not None and value.shape is None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
    infer_shapes(model)
    model.meta[WARNINGS] = warnings
    return model


def infer_shapes(model: ir.Model) -> None:
    """Fill in the types and shapes that follow from the inputs; what cannot be inferred stays unknown."""
    import logging

    # A graph with operators of an unknown domain is legal: inference stops there, which is no news to the user.
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.setLevel(level)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def size(source: Any, model: ir.Model) -> int:
    """Bytes of ``source`` on disk with its external data, or serialized; ``model`` is what was loaded from it."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        tensors = (v.const_value for v in model.graph.initializers.values())
        data = {t.path for t in tensors if isinstance(t, ir.ExternalTensor)}
        return path.stat().st_size + sum(Path(file).stat().st_size for file in data)
    if isinstance(source, bytes | bytearray | memoryview):
        return len(source)
    if isinstance(source, onnx.ModelProto):
        return source.ByteSize()
    return len(to_bytes(model)) if weight_bytes(model) <= INLINE_LIMIT else weight_bytes(model)


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write concrete shapes into the inputs named in ``shapes`` and infer everything again.

    Raises:
        UsageError: an unknown input, a wrong rank, a size that contradicts the declared one, or sizes that disagree
            about one symbolic dimension.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(f"--fix-shape: the model has no input {name!r}; it has {list(inputs)}")
        declared = inputs[name].shape
        if declared is not None and (
            len(declared) != len(shape)
            or any(isinstance(d, int) and d != size for d, size in zip(declared, shape, strict=True))
        ):
            raise UsageError(f"--fix-shape: {name}={list(shape)} does not fit the declared shape {declared}")
        for dim, size in zip(declared or (), shape, strict=declared is not None):
            symbol = None if isinstance(dim, int) else dim.value
            if symbol is not None and sizes.setdefault(symbol, size) != size:
                raise UsageError(f"--fix-shape: dimension {symbol!r} would be both {sizes[symbol]} and {size}")
        inputs[name].shape = ir.Shape(list(shape))
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else sizes.get(str(d.value), d) for d in value.shape])
    forget_shapes(model)
    infer_shapes(model)


def forget_shapes(model: ir.Model) -> None:
    """Drop every shape that follows from the inputs, so that `infer_shapes` derives it anew."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.outputs, *(v for node in graph for v in node.outputs)):
            value.shape = None


def inner_values(model: ir.Model) -> list[ir.Value]:
    """Every value that is computed and is not an output of a graph: what ``value_info`` may describe."""
    return [v for node in model.graph.all_nodes() for v in node.outputs if not v.is_graph_output()]


def strip_shapes(model: ir.Model) -> None:
    """Drop the types and shapes of intermediate values, which every reader can infer and a file need not hold."""
    for value in inner_values(model):
        value.shape, value.type = None, None


def to_bytes(model: ir.Model) -> bytes:
    """Serialize ``model`` with its weights inside.

    Raises:
        ModelError: the weights are too large for one protobuf message; use `save`.
    """
    if weight_bytes(model) > INLINE_LIMIT:
        raise ModelError(f"{weight_bytes(model)} bytes of weights do not fit in one protobuf message: save to a path")
    return _inline_proto(model).SerializeToString(deterministic=True)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """``model`` as `onnx.ModelProto` with its weights inside, also where they are too large to be serialized."""
    return _inline_proto(model)


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> Path:
    """Write ``model`` to ``path``: the file appears whole or not at all, whatever interrupts the writing.

    Weights above 1.8 GB (or any, with ``external=True``) go to ``<name>.<hash>.data`` beside it, written before the
    model is renamed into place; the data file of the model that stood there before is removed after that.

    Raises:
        ModelError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give a file name")
    if not folder.is_dir():
        raise ModelError(f"{path}: the folder {folder} does not exist")
    if external is None:
        external = weight_bytes(model) > INLINE_LIMIT
    old_data = _owned_data(path)
    new_data: set[Path] = set()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder) as temporary:
            draft = Path(temporary) / path.name
            if external:
                new_data = _write_external(model, draft, folder)
            else:
                _write(draft, to_bytes(model))
            draft.replace(path)
            _sync(folder)
    except OSError as error:
        raise ModelError(f"{path}: cannot write: {error.strerror or error}") from error
    for file in old_data - new_data:
        file.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def on_disk(model: ir.Model) -> Iterator[Path]:
    """``model`` as a temporary file with external data, for runtimes that must not hold a second copy in memory."""
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as temporary:
        path = Path(temporary) / "model.onnx"
        ir.save(model.clone(), path, external_data="weights.data")
        yield path


def _read(path: Path, warnings: list[str]) -> ir.Model:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder, not an ONNX file")
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    return _from_proto(_parse(content, str(path)), str(path), path.parent, warnings)


def _parse(content: bytes, where: str) -> onnx.ModelProto:
    if not content:
        raise ModelError(f"{where}: is empty (0 bytes)")
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ModelError(f"{where}: not an ONNX file, or truncated ({len(content)} bytes): {error}") from error


def _from_proto(proto: onnx.ModelProto, where: str, folder: Path | None, warnings: list[str]) -> ir.Model:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{where}: not an ONNX model: it has no graph")
    versions = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    if not versions:
        raise ModelError(f"{where}: imports no opset, so its operators have no meaning; export it again")
    newest = onnx.defs.onnx_opset_version()
    opset = versions.get("ai.onnx", 1)
    if not 1 <= opset <= newest:
        raise ModelError(
            f"{where}: uses opset {opset}; this installation knows 1 to {newest}: export with a known opset"
            + (", or update onnx" if opset > newest else "")
        )
    if proto.training_info:
        warnings.append("training_info was dropped: the result is for inference only")
        stripped = onnx.ModelProto()
        stripped.CopyFrom(proto)
        del stripped.training_info[:]
        proto = stripped
    if not all(isinstance(text, str) for text in _texts(proto)):
        raise ModelError(f"{where}: not a valid ONNX model: a name in it is not UTF-8 text")
    _check_external(proto, where, folder)
    proto = _densify(proto, where)
    if not _has_external(proto):
        _check(proto, where)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # a malformed message raises many types
        raise ModelError(f"{where}: not a readable ONNX model: {error}") from error
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    return model


def _check(proto: onnx.ModelProto, where: str) -> None:
    # The checker wants a rank for every input and output; exporters leave it out and ONNX Runtime does not mind.
    values = (*proto.graph.input, *proto.graph.output)
    unshaped = [v.type.tensor_type for v in values if _lacks_shape(v)]
    for kind in unshaped:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{where}: not a valid ONNX model: {reason}") from error
    except ValueError:
        pass  # over 2 GiB: the checker takes only files of that size; ONNX Runtime will still judge it
    finally:
        for kind in unshaped:
            kind.ClearField("shape")


def _lacks_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def _texts(message: Any) -> Iterator[Any]:
    """Every text field but the contents of tensors; protobuf gives bytes for one that is not UTF-8."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value
        elif field.type == field.TYPE_MESSAGE:
            for item in value if isinstance(value, Sequence) or hasattr(value, "append") else [value]:
                if isinstance(item, onnx.TensorProto):
                    yield item.name
                else:
                    yield from _texts(item)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    stack.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    stack.extend(attribute.graphs)
                elif attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                elif attribute.type == onnx.AttributeProto.TENSORS:
                    yield from attribute.tensors


def _has_external(proto: onnx.ModelProto) -> bool:
    return any(t.data_location == onnx.TensorProto.EXTERNAL for t in _tensors(proto))


def _check_external(proto: onnx.ModelProto, where: str, folder: Path | None) -> None:
    sizes: dict[str, int] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = {entry.key: entry.value for entry in tensor.external_data}
        location = info.get("location", "")
        if folder is None:
            raise ModelError(f"{where}: weight {tensor.name!r} is in the external file {location!r}: give the path")
        if location not in sizes:
            file = (folder / location).resolve()
            if not location or not file.is_relative_to(folder.resolve()):
                raise ModelError(
                    f"{where}: the external data of {tensor.name!r} is {location!r}, outside the folder of the model"
                )
            if not file.is_file():
                raise ModelError(f"{where}: the external data file {location!r} of {tensor.name!r} does not exist")
            sizes[location] = file.stat().st_size
        try:
            needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
            offset, length = int(info.get("offset", 0)), int(info.get("length", needed))
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{where}: the external data of {tensor.name!r} has a malformed type, offset or length"
            ) from error
        if offset < 0 or length != needed or min(tensor.dims, default=0) < 0:
            raise ModelError(
                f"{where}: the external data of {tensor.name!r} has {length} bytes from byte {offset}, its shape "
                f"{list(tensor.dims)} needs {needed}"
            )
        if offset + length > sizes[location]:
            raise ModelError(
                f"{where}: the external data of {tensor.name!r} ends at byte {offset + length} of {location!r}, which "
                f"has {sizes[location]}: the file is truncated"
            )


def _densify(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    graphs = [proto.graph]
    for graph in graphs:
        graphs.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    if not any(graph.sparse_initializer for graph in graphs):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graphs = [copy.graph]
    for graph in graphs:
        graphs.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
        for sparse in graph.sparse_initializer:
            try:
                values = onnx.numpy_helper.to_array(sparse.values)
                indices = onnx.numpy_helper.to_array(sparse.indices)
                dense = np.zeros(tuple(sparse.dims), values.dtype)
                if indices.ndim == 1:
                    dense.reshape(-1)[indices] = values
                else:
                    dense[tuple(indices.T)] = values
            except (ValueError, IndexError) as error:
                raise ModelError(f"{where}: sparse initializer {sparse.values.name!r} is malformed: {error}") from error
            graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
        del graph.sparse_initializer[:]
    return copy


def _sort_if_needed(model: ir.Model) -> None:
    try:
        TopologicalSortPass()(model)
    except ValueError as error:
        raise ModelError(f"the graph has a cycle: {error}") from error


def _inline_proto(model: ir.Model) -> onnx.ModelProto:
    clone = model.clone()
    ir.external_data.load_to_model(clone)
    return _lean(ir.to_proto(clone))


def _lean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the ``value_info`` of initializers, in place: it repeats what the tensors themselves say."""
    graphs = [proto.graph]
    for graph in graphs:
        graphs.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
        weights = {tensor.name for tensor in graph.initializer}
        kept = [info for info in graph.value_info if info.name not in weights]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    return proto


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make a rename or a file's content survive a power failure."""
    with contextlib.suppress(OSError):  # Windows cannot open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_external(model: ir.Model, draft: Path, folder: Path) -> set[Path]:
    ir.save(model.clone(), draft, external_data="weights.data")
    weights = draft.parent / "weights.data"
    if not weights.exists():  # nothing above the size that is worth a reference
        return set()
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    name = f"{draft.name}.{digest.hexdigest()[:12]}.data"
    proto = _lean(onnx.load(draft, load_external_data=False))
    for tensor in _tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    _write(draft, proto.SerializeToString(deterministic=True))
    _sync(weights)
    shutil.move(weights, folder / name)
    return {folder / name}


def _owned_data(path: Path) -> set[Path]:
    """The data files that an earlier `save` to ``path`` left beside it."""
    if not path.exists():
        return set()
    return set(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.data"))
