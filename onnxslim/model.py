"""Reading and writing models: the only file that knows protobuf and the disk.

``load`` takes any form of model and returns a normalized `onnx_ir.Model`: functions inlined, Constant nodes lifted to
initializers, sparse initializers made dense, initializers no longer listed as inputs, shapes inferred. ``save`` writes
it so that the output appears whole or not at all, with external data that belongs to the output alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import RemoveInitializersFromInputsPass, TopologicalSortPass

from onnxslim import external_data, inference, lifting, maps, protos, wire
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
    lifting.inline_functions(model)
    model.meta[NODES] = sum(1 for _ in model.graph.all_nodes())
    model.meta[SHAPES] = any(v.shape is not None for v in inner_values(model))
    _sort_if_needed(model)
    lifting.lift_constants(model)
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
    inference.run(model)
    model.meta[WARNINGS] = warnings
    return model


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def size(source: Any, model: ir.Model) -> int:
    """Bytes of ``source`` on disk with its external data, or serialized; ``model`` is what was loaded from it."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        tensors = (v.const_value for v in model.graph.initializers.values())
        files = {path.resolve(), *(Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor))}
        return sum(file.stat().st_size for file in files)
    if isinstance(source, bytes | bytearray | memoryview):
        return len(source)
    if isinstance(source, onnx.ModelProto):
        return source.ByteSize()
    return sum(map(wire.size, _pieces(model))) if weight_bytes(model) <= INLINE_LIMIT else weight_bytes(model)


def deflated(model: ir.Model) -> int:
    """Bytes of the file of ``model``, weights inside, once it is compressed as zip and gzip do by default."""
    return wire.deflated(_pieces(model))


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
    inference.run(model)


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
    content = io.BytesIO()
    wire.write(_pieces(model), content)
    return content.getvalue()


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """``model`` as `onnx.ModelProto` with its weights inside, also where they are too large to be serialized."""
    return _inline_proto(model)


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> Path:
    """Write ``model`` to ``path``: the file appears whole or not at all, whatever interrupts the writing.

    Weights above 1.8 GB (or any, with ``external=True``) go to ``<name>.<hash>.data`` beside it, written before the
    model is renamed into place; the data file of the model that stood there before is removed after that, unless
    ``model`` or another model in the folder refers to it.

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
    old_data = external_data.owned(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder) as temporary:
            draft = Path(temporary) / path.name
            if external:
                _write_external(model, draft, folder)
            else:
                _write(draft, _pieces(model))
            draft.replace(path)
            _sync(folder)
    except OSError as error:
        raise ModelError(f"{path}: cannot write: {error.strerror or error}") from error
    if old_data:
        tensors = (value.const_value for value in model.graph.initializers.values())
        used = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
        for file in old_data - used.union(*map(external_data.referred, [path, *folder.glob("*.onnx")])):
            file.unlink(missing_ok=True)
    return path


def by_reference(model: ir.Model, limit: int = INLINE_LIMIT) -> tuple[bytes, Path] | None:
    """``model`` serialized with references to the weights that lie in files, and the folder that they are relative to.

    None where no weight lies in a file, where the files are not in one folder, or where the others have more bytes than
    ``limit``.
    """
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    files = {t.path: Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
    inline = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))
    folders = {file.parent for file in files.values()}
    if len(folders) != 1 or inline > limit:
        return None
    clone = model.clone()
    for value in clone.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                files[tensor.path].name, tensor.offset, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(value.name),
            )  # fmt: skip
    return _lean(ir.to_proto(clone), model).SerializeToString(deterministic=True), folders.pop()


def file_by_reference(path: str | os.PathLike[str]) -> tuple[bytes, Path] | None:
    """The message in the file ``path``, its large weights as references to where they lie in it, and its folder.

    None where there are none, or where the message refers to other files already.
    """
    file = Path(path).resolve()
    content, spans = wire.outline_file(file)
    if not spans:
        return None
    proto = _parse(content, str(path))
    if any(map(protos.is_external, protos.tensors(proto))):
        return None
    for k, span in spans.items():
        tensor = proto.graph.initializer[k]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", span.start), ("length", span.end - span.start)):
            tensor.external_data.add(key=key, value=str(value))
    return proto.SerializeToString(), file.parent


def forget_weights(model: ir.Model) -> None:
    """Give back the memory of weights that lie in files; they are read again when they are needed."""
    for value in model.graph.initializers.values():
        forget(value.const_value)


def forget(tensor: ir.TensorProtocol | None) -> None:
    """Give back the memory of one tensor, where it lies in a file."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody still holds the array
            tensor.release()


def own_weights(model: ir.Model, file: str | os.PathLike[str]) -> None:
    """Read the weights that lie in ``file`` into memory, so that it may change or go."""
    path = Path(file).resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve() == path:
            (value.const_value,) = ir.external_data.convert_tensors_from_external([tensor])
            forget(tensor)


@contextlib.contextmanager
def on_disk(model: ir.Model) -> Iterator[Path]:
    """``model`` as a temporary file with external data, for runtimes that must not hold a second copy in memory."""
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as temporary:
        path = Path(temporary) / "model.onnx"
        external_data.write(model, path)
        yield path


def _read(path: Path, warnings: list[str]) -> ir.Model:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder, not an ONNX file")
        content, spans = wire.outline_file(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    proto = _parse(content, str(path))
    inside = {proto.graph.initializer[k].name: span for k, span in spans.items()}
    return _from_proto(proto, str(path), path, warnings, inside)


def _parse(content: bytes, where: str) -> onnx.ModelProto:
    if not content:
        raise ModelError(f"{where}: is empty (0 bytes)")
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ModelError(f"{where}: not an ONNX file, or truncated ({len(content)} bytes): {error}") from error


def _from_proto(
    proto: onnx.ModelProto,
    where: str,
    path: Path | None,
    warnings: list[str],
    inside: Mapping[str, wire.Span] = types.MappingProxyType({}),
) -> ir.Model:
    """The model that ``proto`` describes; the initializers ``inside`` have their data there in the file ``path``."""
    folder = None if path is None else path.parent
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
    if not all(isinstance(text, str) for text in protos.texts(proto)):
        raise ModelError(f"{where}: not a valid ONNX model: a name in it is not UTF-8 text")
    protos.check_external(proto, where, folder)
    proto = protos.densify(proto, where)
    protos.check(proto, where, inside)
    try:
        model = maps.read(proto, where)
    except ModelError:
        raise
    except Exception as error:  # a malformed message raises many types
        raise ModelError(f"{where}: not a readable ONNX model: {error}") from error
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    for name, span in inside.items():
        assert path is not None
        model.graph.initializers[name].const_value = _in_file(model.graph.initializers[name], path, span, where)
    return model


def _in_file(value: ir.Value, path: Path, span: wire.Span, where: str) -> ir.ExternalTensor:
    """The tensor of an initializer whose raw data is ``span`` of the model file itself; nothing is read yet."""
    declared = value.const_value
    assert declared is not None
    # No base_dir: the file was named by the user, whatever links lead to it.
    tensor = ir.ExternalTensor(
        str(path.resolve()),
        offset=span.start,
        length=span.end - span.start,
        dtype=declared.dtype,
        shape=ir.Shape(declared.shape.numpy()),
        name=str(value.name),
        doc_string=declared.doc_string,
        base_dir="",
    )
    if tensor.nbytes != span.end - span.start:
        raise ModelError(
            f"{where}: initializer {value.name!r} has {span.end - span.start} bytes, its shape "
            f"{list(tensor.shape.numpy())} needs {tensor.nbytes}"
        )
    return tensor


def _sort_if_needed(model: ir.Model) -> None:
    try:
        TopologicalSortPass()(model)
    except ValueError as error:
        raise ModelError(f"the graph has a cycle: {error}") from error


def _pieces(model: ir.Model) -> list[wire.Piece]:
    """What a file of ``model`` with its weights inside is made of."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.STRING:
            continue
        if tensor.nbytes >= wire.LARGE or isinstance(tensor, ir.ExternalTensor):
            weights[name] = tensor
    values = model.graph.initializers
    try:  # a copy of the model would take longer than all the rest
        for name, tensor in weights.items():
            values[name].const_value = ir.ExternalTensor(
                "",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                doc_string=tensor.doc_string,
            )
        proto = ir.to_proto(model)
    finally:
        for name, tensor in weights.items():
            values[name].const_value = tensor
    return wire.pieces(_lean(proto, model), weights)


def _inline_proto(model: ir.Model) -> onnx.ModelProto:
    clone = model.clone()
    ir.external_data.load_to_model(clone)
    return _lean(ir.to_proto(clone), model)


def _lean(proto: onnx.ModelProto, model: ir.Model) -> onnx.ModelProto:
    """``proto``, written from ``model``, in place without the ``value_info`` of initializers, which repeats them."""
    maps.restore(proto, model)
    for graph in maps.graphs(proto):
        weights = {tensor.name for tensor in graph.initializer}
        kept = [info for info in graph.value_info if info.name not in weights]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    return proto


def _write(path: Path, content: list[wire.Piece]) -> None:
    with path.open("wb") as file:
        wire.write(content, file)
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


def _write_external(model: ir.Model, draft: Path, folder: Path) -> None:
    weights = external_data.write(model, draft)
    if not weights.exists():  # nothing above the size that is worth a reference
        return
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    name = f"{draft.name}.{digest.hexdigest()[:12]}.data"
    proto = _lean(onnx.load(draft, load_external_data=False), model)
    for tensor in protos.tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    _write(draft, [proto.SerializeToString(deterministic=True)])
    _sync(weights)
    shutil.move(weights, folder / name)
