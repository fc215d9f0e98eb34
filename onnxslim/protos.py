"""What can be wrong with a ModelProto, and what must be rewritten in it, before onnx_ir sees it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim.errors import ModelError


def check(proto: onnx.ModelProto, where: str, apart: Container[str] = ()) -> None:
    """Hold ``proto`` to the specification; the data of the initializers ``apart`` is not in it.

    Raises:
        ModelError: with the first line of what the checker of onnx says.
    """
    if apart or any(map(is_external, tensors(proto))):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        proto = copy
        external = [t for t in tensors(proto) if is_external(t)]
        for tensor in (*external, *(t for t in proto.graph.initializer if t.name in apart)):
            # What is not there cannot be checked: without elements, a tensor needs no data.
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.dims[:] = [0]
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


def is_external(tensor: onnx.TensorProto) -> bool:
    """True for a tensor whose data is in a file of its own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _lacks_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def texts(message: Any) -> Iterator[Any]:
    """Every text field but the contents of tensors; protobuf gives bytes for one that is not UTF-8."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value
        elif field.type == field.TYPE_MESSAGE:
            for item in value if isinstance(value, Sequence) or hasattr(value, "append") else [value]:
                if isinstance(item, onnx.TensorProto):
                    yield item.name
                else:
                    yield from texts(item)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model: initializers and attributes, those of subgraphs and functions too."""
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


def locations(proto: onnx.ModelProto) -> Iterator[str]:
    """The name of the file that each tensor with external data lies in, as the model gives it."""
    for tensor in filter(is_external, tensors(proto)):
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def check_external(proto: onnx.ModelProto, where: str, folder: Path | None) -> None:
    """Refuse external data that is not whole, or not in ``folder``.

    Raises:
        ModelError: a file is missing, too short, or outside the folder; or there is no folder to look in.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors(proto):
        if not is_external(tensor):
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


def densify(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """``proto``, or where it has sparse initializers a copy with dense ones in their place."""
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
