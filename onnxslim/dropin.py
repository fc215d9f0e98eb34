"""`slim`: the function of the PyPI package OnnxSlim, with its arguments, for exporters that already call it.

What it does is `onnxslim.optimize` with the lossless passes, verified and not timed. An argument that would change the
result and is not supported raises `UsageError`; none is ignored.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim import data as data_io
from onnxslim import inference
from onnxslim import model as model_io
from onnxslim.api import Result, optimize
from onnxslim.errors import CheckError, DataError, UsageError
from onnxslim.graph import fresh_name, remove_dead

_OPTIMIZATIONS = {
    "constant_folding",
    "graph_fusion",
    "dead_node_elimination",
    "subexpression_elimination",
    "weight_tying",
}
_FOLDS = {
    "FusionConvAdd",
    "FusionConvTransposeAdd",
    "FusionConvBN",
    "FusionConvTransposeBN",
    "FusionConvMul",
    "FusionConvTransposeMul",
    "FusionGemm",
    "FusionGemmMul",
    "FusionGemmAdd",
    "FusionPadConv",
}
_DTYPES = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT, "int32": ir.DataType.INT32, "bool": ir.DataType.BOOL}
_LOG = logging.getLogger("onnxslim")


def slim(
    model: str | os.PathLike[str] | onnx.ModelProto | Sequence[str | onnx.ModelProto],
    output_model: str | os.PathLike[str] | None = None,
    *,
    model_check: bool = False,
    input_shapes: Mapping[str, Sequence[int]] | Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    no_shape_infer: bool = False,
    skip_optimizations: Sequence[str] | None = None,
    dtype: str | None = None,
    skip_fusion_patterns: Sequence[str] | None = None,
    size_threshold: int | None = None,
    inspect: bool = False,
    dump_to_disk: bool = False,
    save_as_external_data: bool = False,
    model_check_inputs: Sequence[str] | None = None,
    verbose: bool = False,
    **unknown: Any,
) -> onnx.ModelProto | None:
    """Simplify ``model`` without changing what it computes; every result is verified in ONNX Runtime.

    Args:
        model: a path or an `onnx.ModelProto`; a list of them is only inspected.
        output_model: where to write; the input's own path is allowed here. Without it the new model is returned.
        model_check: raise where the model cannot be run and therefore not be verified.
        input_shapes: shapes to write into the model, ``{"x": [1, 3, 224, 224]}`` or ``["x:1,3,224,224"]``.
        inputs, outputs: cut the model at these tensors, ``"name"`` or ``"name:fp32"``.
        no_shape_infer: leave the inferred types and shapes out of the result.
        skip_optimizations: ``graph_fusion``, or all five names to optimize nothing.
        dtype: ``fp32`` for a model that is in float32 already.
        skip_fusion_patterns: names of fusions with Conv, ConvTranspose and Gemm; one of them skips the ``fold`` pass.
        inspect, dump_to_disk: print what is in the model, write it to ``<name>_model_info.csv``; nothing is optimized.
        save_as_external_data: put the weights into a file of their own.
        model_check_inputs: shapes or arrays to verify with, ``"x:1,3,224,224"`` or ``"x:data.npy"``.
        verbose: print the report.

    Returns:
        The new model, or None when it was written or inspected.

    Raises:
        UsageError, ModelError, DataError: what was given cannot be used.
        CheckError: ``model_check`` is set and the model could not be verified.
    """
    _reject(unknown, size_threshold)
    if inspect or isinstance(model, list | tuple):
        _inspect(model if isinstance(model, list | tuple) else [model], dump_to_disk)
        return None
    if dump_to_disk:
        raise UsageError("slim: dump_to_disk is for inspect=True or a list of models")
    source: Any = model
    if inputs or outputs or input_shapes:
        source = model_io.load(model)
        _cut(source, inputs or (), outputs or ())
        _reshape(source, _parse_shapes("input_shapes", input_shapes or ()))
    _check_dtype(source, dtype)
    shapes, evaluation = _check_inputs(source, model_check_inputs or ())
    result = optimize(
        source, _passes(skip_optimizations, skip_fusion_patterns), evaluation=evaluation, shapes=shapes, bench=False
    )
    _judge(result, model_check)
    if no_shape_infer:
        model_io.strip_shapes(result.model)
    else:
        inference.run(result.model)
    if verbose:
        from rich.console import Console

        Console(stderr=True).print(result.report.table())
    if output_model is None:
        return result.proto()
    result.save(output_model, external=True if save_as_external_data else None)
    return None


def _reject(unknown: Mapping[str, Any], size_threshold: int | None) -> None:
    for name, value in unknown.items():
        if value:  # callers written for older versions pass switches that are off
            raise UsageError(f"slim: unknown argument {name}={value!r}")
    if size_threshold:
        raise UsageError("slim: size_threshold is not supported: constants are folded unless the model would grow")


def _passes(skip_optimizations: Sequence[str] | None, skip_patterns: Sequence[str] | None) -> Any:
    skipped, patterns = set(skip_optimizations or ()), set(skip_patterns or ())
    if skipped - _OPTIMIZATIONS:
        there_are = ", ".join(sorted(_OPTIMIZATIONS))
        raise UsageError(f"slim: unknown optimization {min(skipped - _OPTIMIZATIONS)!r}: there are {there_are}")
    if skipped == _OPTIMIZATIONS:
        return []
    single = skipped - {"graph_fusion"}
    if single:
        raise UsageError(f"slim: {min(single)!r} cannot be skipped alone: skip all optimizations, or graph_fusion")
    if patterns - _FOLDS:
        raise UsageError(
            f"slim: {min(patterns - _FOLDS)!r} cannot be skipped alone; those that can: {', '.join(sorted(_FOLDS))}"
        )
    return "simplify" if skipped or patterns else "simplify,fold"


def _judge(result: Result, must: bool) -> None:
    unverified = [line for line in result.report.warnings if line.startswith("NOT VERIFIED")]
    if unverified and must:
        raise CheckError(f"slim: model_check: {unverified[0]}")
    if result.exit_code or unverified:
        for line in result.report.warnings:
            _LOG.warning(line)


def _parse_shapes(what: str, given: Mapping[str, Sequence[int]] | Sequence[str]) -> dict[str, list[int]]:
    if isinstance(given, Mapping):
        return {name: [int(d) for d in shape] for name, shape in given.items()}
    found = {}
    for text in [given] if isinstance(given, str) else given:
        name, _, sizes = text.rpartition(":")
        try:
            found[name] = [int(size) for size in sizes.split(",")]
        except ValueError as error:
            raise UsageError(f"slim: {what}: {text!r}: give name:1,3,224,224") from error
    return found


def _reshape(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write ``shapes`` into the inputs, also over sizes that the model declares."""
    for value in model.graph.inputs:
        given = shapes.get(value.name or "")
        if given is not None and value.shape is not None and len(value.shape) == len(given):
            value.shape = ir.Shape([d if not isinstance(d, int) else None for d in value.shape])
    if shapes:
        model_io.fix_shapes(model, shapes)


def _split(text: str) -> tuple[str, ir.DataType | None]:
    name, colon, dtype = text.rpartition(":")
    if not colon:
        return text, None
    if dtype not in _DTYPES:
        raise UsageError(f"slim: {text!r}: unknown type {dtype!r}: give one of {', '.join(_DTYPES)}")
    return name, _DTYPES[dtype]


def _cut(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Make the named tensors the outputs, then the named tensors the inputs, and drop what nobody needs then."""
    graph = model.graph
    values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}

    def find(text: str) -> ir.Value:
        name, dtype = _split(text)
        if name not in values:
            raise UsageError(f"slim: the model has no tensor {name!r}")
        value = values[name]
        if value.dtype is None:
            value.dtype = dtype or ir.DataType.FLOAT
        elif dtype is not None and dtype != value.dtype:
            raise UsageError(
                f"slim: {text!r}: the tensor is {value.dtype.name.lower()}; its type cannot be declared away"
            )
        return value

    if outputs:
        chosen = [find(text) for text in outputs]
        graph.outputs.clear()
        graph.outputs.extend(chosen)
    if inputs:
        _cut_inputs(graph, [find(text) for text in inputs])
    if inputs or outputs:
        remove_dead(graph)
        for value in [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]:
            graph.inputs.remove(value)
        inference.run(model)


def _cut_inputs(graph: ir.Graph, chosen: Sequence[ir.Value]) -> None:
    fresh = []
    for value in chosen:
        if value.is_graph_input():
            fresh.append(value)
            continue
        name = value.name
        value.name = fresh_name(graph, f"{name}_cut")
        new = ir.Value(name=name, type=value.type, shape=value.shape)
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        fresh.append(new)
    old = [v for v in graph.inputs if v not in fresh]
    graph.inputs.clear()
    graph.inputs.extend([*fresh, *old])
    remove_dead(graph)
    needed = [v.name for v in old if v.uses()]
    if needed:
        raise UsageError(f"slim: inputs: the outputs still depend on {needed[0]!r}: name it too")
    for value in old:
        graph.inputs.remove(value)


def _check_dtype(source: Any, dtype: str | None) -> None:
    if dtype is None:
        return
    if dtype not in ("fp32", "float32"):
        raise UsageError(f"slim: dtype={dtype!r} is not supported: the result keeps the types of the model")
    model = model_io.load(source)
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    if any(v.dtype in halves for v in (*model.graph.inputs, *model.graph.initializers.values())):
        raise UsageError("slim: dtype='fp32' is not supported for a model in half precision")


def _check_inputs(source: Any, texts: Sequence[str]) -> tuple[dict[str, list[int]], list[dict[str, np.ndarray]] | None]:
    """Shapes for generated inputs, and one sample where arrays were given."""
    arrays: dict[str, np.ndarray] = {}
    for text in texts:
        name, _, file = text.rpartition(":")
        if file.endswith(".npy"):
            try:
                arrays[name] = np.load(file, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"slim: model_check_inputs: {file}: not a readable .npy file ({error})") from error
    shapes = _parse_shapes("model_check_inputs", [t for t in texts if not t.endswith(".npy")])
    if not arrays:
        return shapes, None
    sample = data_io.synthetic(model_io.load(source), 1, seed=0, shapes=shapes)[0]
    return shapes, [{**sample, **arrays}]


def _inspect(models: Sequence[Any], to_disk: bool) -> None:
    from onnxslim import console, inspection

    for k, model in enumerate(models):
        facts = inspection.inspect(model, {})
        console.out().print(inspection.table(facts, nodes=False))
        if to_disk:
            name = Path(model).name if isinstance(model, str | os.PathLike) else f"OnnxModel_{k}"
            with Path(f"{name}_model_info.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["name", "op_type", "output", "parameters", "macs", "bytes"])
                writer.writeheader()
                writer.writerows(facts["table"])
