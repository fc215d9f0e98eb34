"""Model files without their weights in memory: the protobuf wire format, as far as large tensors need it.

An ONNX file is one protobuf message, and parsing it copies every weight at least twice. `outline` reads around the raw
data of large initializers and says where in the file they lie; `write` puts a message together from such an outline and
from tensors, one at a time. The result has the very bytes of a deterministic serialization.

Only what the format fixes is used (https://protobuf.dev/programming-guides/encoding): a message is a row of fields, a
field is a tag (number and wire type) and a payload, and a payload of wire type 2 has its length in front.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import onnx
import onnx_ir as ir

# Initializers with fewer bytes of raw data stay in the message.
LARGE = 1024
# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer: TypeAlias = "bytes | mmap.mmap"
Piece: TypeAlias = "bytes | ir.TensorProtocol"


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a file."""

    start: int
    end: int


class _MalformedError(Exception):
    """Not the wire format, or a legal form of it that no serializer writes."""


def outline(buffer: Buffer) -> tuple[bytes, dict[int, Span]]:
    """A serialized `onnx.ModelProto` without the raw data of its large initializers, and where that data lies.

    Returns:
        The message, and by index in ``graph.initializer`` the place of the data that was left out. What is not plainly
        a model comes back whole: its parser has the better error message.
    """
    try:
        return _outline(buffer)
    except (_MalformedError, IndexError):
        return bytes(buffer[:]), {}


def outline_file(path: Path) -> tuple[bytes, dict[int, Span]]:
    """`outline` of a file, of which no more is read than comes back."""
    with path.open("rb") as file:
        if path.stat().st_size < LARGE:  # an empty file cannot be mapped
            return file.read(), {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return outline(buffer)


def _outline(buffer: Buffer) -> tuple[bytes, dict[int, Span]]:
    graphs = [field for field in _fields(buffer, 0, len(buffer)) if field.number == _GRAPH]
    if len(graphs) != 1 or graphs[0].kind != _BYTES:
        raise _MalformedError
    graph = graphs[0]
    parts: list[bytes] = []
    spans: dict[int, Span] = {}
    index, copied = 0, graph.start
    for field in _fields(buffer, graph.start, graph.end):
        if field.number != _INITIALIZER or field.kind != _BYTES:
            continue
        if field.end - field.start >= LARGE:
            raw = [f for f in _fields(buffer, field.start, field.end) if f.number == _RAW_DATA]
            if len(raw) == 1 and raw[0].kind == _BYTES and raw[0].end - raw[0].start >= LARGE:
                spans[index] = Span(raw[0].start, raw[0].end)
                rest = buffer[field.start : raw[0].tag] + buffer[raw[0].end : field.end]
                parts += [buffer[copied : field.tag], _tag(_INITIALIZER, len(rest)), rest]
                copied = field.end
        index += 1
    inside = b"".join([*parts, buffer[copied : graph.end]])
    return b"".join([buffer[: graph.tag], _tag(_GRAPH, len(inside)), inside, buffer[graph.end :]]), spans


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field: its number, wire type, where its tag begins, and from where to where its payload goes."""

    number: int
    kind: int
    tag: int
    start: int
    end: int


def _fields(buffer: Buffer, start: int, end: int) -> Iterator[_Field]:
    while start < end:
        key, payload = _read_varint(buffer, start)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length, payload = _read_varint(buffer, payload)
            after = payload + length
        elif kind == _VARINT:
            _, after = _read_varint(buffer, payload)
        elif kind in (_FIXED64, _FIXED32):
            after = payload + (8 if kind == _FIXED64 else 4)
        else:
            raise _MalformedError
        if number == 0 or after > end:
            raise _MalformedError
        yield _Field(number, kind, start, payload, after)
        start = after


def _read_varint(buffer: Buffer, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _MalformedError


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, length: int) -> bytes:
    """What stands before a payload of ``length`` bytes."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def pieces(proto: onnx.ModelProto, weights: dict[str, ir.TensorProtocol]) -> list[Piece]:
    """What a file of ``proto`` is made of, in order, with ``weights`` as the raw data of the initializers so named.

    ``proto`` is changed: those initializers lose what they say about where their data is.
    """
    parts: list[Piece] = []
    for tensor in proto.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is None:
            content = _serialized(tensor)
            parts += [_tag(_INITIALIZER, len(content)), content]
            continue
        for field in ("data_location", "external_data", "raw_data"):
            tensor.ClearField(field)
        before, after = _around(tensor, _RAW_DATA)
        data = _tag(_RAW_DATA, weight.nbytes)
        parts.append(_tag(_INITIALIZER, len(before) + len(data) + weight.nbytes + len(after)) + before + data)
        parts += [weight, after]
    before, after = _around(proto.graph, _INITIALIZER)
    length = len(before) + sum(map(size, parts)) + len(after)
    first, last = _around(proto, _GRAPH)
    return [first + _tag(_GRAPH, length) + before, *parts, after + last]


def size(piece: Piece) -> int:
    """Bytes of a piece."""
    return len(piece) if isinstance(piece, bytes) else piece.nbytes


def write(parts: list[Piece], file: BinaryIO) -> None:
    """Write ``parts`` to ``file``; one weight at a time is in memory, and none that lies in a file already."""
    for part in parts:
        if isinstance(part, bytes):
            file.write(part)
        elif isinstance(part, ir.ExternalTensor):
            part.tofile(file)  # copied by the system
        else:
            file.write(part.tobytes())


def deflated(parts: list[Piece]) -> int:
    """Bytes of ``parts`` once they are compressed as zip and gzip do by default; one weight at a time is in memory."""
    packer = zlib.compressobj()
    length = 0
    for part in parts:
        length += len(packer.compress(part if isinstance(part, bytes) else part.tobytes()))
        if isinstance(part, ir.ExternalTensor):
            with contextlib.suppress(BufferError):  # somebody still holds the array
                part.release()
    return length + len(packer.flush())


def _around(message: Any, number: int) -> tuple[bytes, bytes]:
    """The fields of ``message`` below and above ``number``, serialized."""
    below, above = type(message)(), type(message)()
    below.CopyFrom(message)
    above.CopyFrom(message)
    for field in message.DESCRIPTOR.fields:
        if field.number >= number:
            below.ClearField(field.name)
        if field.number <= number:
            above.ClearField(field.name)
    return _serialized(below), _serialized(above)


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializePartialToString(deterministic=True))
