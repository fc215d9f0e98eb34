"""The node cases of the onnx package: one small model per operator and setting, with inputs and expected outputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim import model as model_io
from onnxslim.errors import ModelError

Case = tuple[str, onnx.ModelProto, list[Any], list[Any]]


@functools.cache
def cases() -> tuple[Case, ...]:
    """Every case that holds one data set of tensors: (name, model, inputs, outputs)."""
    import onnx.backend.test.case.node as node_cases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = node_cases.collect_testcases(None)
    return tuple((case.name, case.model, *map(list, case.data_sets[0])) for case in found if case.data_sets)


def is_tensor(value: Any) -> bool:
    """True for what ONNX Runtime takes and gives as an array."""
    return isinstance(value, np.ndarray | np.generic)


def loaded(proto: onnx.ModelProto) -> ir.Model | None:
    """The model as passes see it, or None when it cannot be loaded at all (then nothing can go wrong either)."""
    try:
        return model_io.load(proto)
    except ModelError:
        return None


def with_constants(
    proto: onnx.ModelProto, inputs: list[Any], which: int | None = None
) -> Iterator[tuple[onnx.ModelProto, list[Any]]]:
    """Variants of a case: as it is; small integer inputs made weights; all inputs but the first; all inputs.

    ``which`` takes the first and one of the others (a number that varies from case to case spreads them).
    """
    arrays = [np.asarray(a) if is_tensor(a) else None for a in inputs]
    plain = [
        k
        for k, (value, array) in enumerate(zip(proto.graph.input, arrays, strict=False))
        if array is not None and value.type.HasField("tensor_type") and array.dtype.kind in "biuf"
    ]
    small = [k for k in plain if arrays[k].dtype in (np.int64, np.int32, np.bool_) and arrays[k].size <= 256]
    variants = list(dict.fromkeys(((), tuple(small), tuple(k for k in plain if k), tuple(plain))))
    if which is not None and len(variants) > 2:
        variants = [variants[0], variants[1 + which % (len(variants) - 1)]]
    for chosen in variants:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        for k in reversed(chosen):
            copy.graph.initializer.append(onnx.numpy_helper.from_array(arrays[k], copy.graph.input[k].name))
            del copy.graph.input[k]
        yield copy, [a for k, a in enumerate(inputs) if k not in chosen]
