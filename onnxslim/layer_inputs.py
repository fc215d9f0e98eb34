"""What layers multiply: the second moments of their inputs, for as many layers at a time as memory holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim.calibration import Statistic, collect
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.rounding import ROWS, WIDEST, Gram
from onnxslim.units import Unit, find_units

# Bytes of moments that one pass over the data collects.
BYTES = 512_000_000


def weight_shape(unit: Unit) -> tuple[int, ...]:
    """Shape of the weight of a product."""
    assert unit.weight is not None
    weight = unit.node.inputs[unit.weight[0]]
    assert weight is not None and weight.const_value is not None
    return tuple(int(n) for n in weight.const_value.shape.numpy())


def width(unit: Unit) -> int:
    """Inputs that each output of a product adds up."""
    assert unit.weight is not None
    shape = weight_shape(unit)
    return int(np.prod(shape[1:])) if unit.op == "Conv" else shape[1 - unit.weight[1]]


def moments(
    model: ir.Model, nodes: Sequence[ir.Node], ctx: Context, samples: int
) -> Iterator[tuple[list[ir.Node], dict[str, Gram]]]:
    """``nodes`` in groups, in their order, with the moments of what the products among them read, by node name.

    Each group is one pass over at most ``samples`` calibration samples, with ``model`` as it is by then. A node that is
    no unit, that is wider than `WIDEST`, or that saw no finite value has none, and none has where there is no data.
    """
    if ctx.synthetic or not len(ctx.calibration):
        yield list(nodes), {}
        return
    data = ctx.calibration.spread(samples)
    found, _ = find_units(model)
    units = {n: u for n, u in found.items() if u.weight is not None and width(u) <= WIDEST}
    group: list[ir.Node] = []
    held: dict[Hashable, int] = {}
    for node in nodes:
        unit = units.get(node.name or "")
        key = _key(unit) if unit is not None else None
        size = 8 * width(unit) ** 2 if unit is not None else 0
        if group and sum(held.values()) + (0 if key in held else size) > BYTES:
            yield group, _collect(model, group, units, data, ctx)
            group, held = [], {}
        group.append(node)
        held[key] = size
    yield group, _collect(model, group, units, data, ctx)


def _key(unit: Unit) -> Hashable:
    """The same for products that multiply the same numbers."""
    if unit.op != "Conv":
        return unit.inputs[0]
    geometry = sorted((name, str(attr.value)) for name, attr in unit.node.attributes.items())
    return unit.inputs[0], weight_shape(unit)[1:], tuple(geometry)


def _collect(
    model: ir.Model, nodes: Sequence[ir.Node], units: Mapping[str, Unit], data: Data, ctx: Context
) -> dict[str, Gram]:
    grams: dict[Hashable, Gram] = {}
    attached: dict[str, list[Statistic]] = {}
    keys: dict[str, Hashable] = {}
    for node in nodes:
        unit = units.get(node.name or "")
        if unit is None:
            continue
        key = keys[unit.name] = _key(unit)
        if key not in grams:
            grams[key] = Gram(unit, weight_shape(unit), max(ROWS // len(data), 16))
            attached.setdefault(unit.inputs[0], []).append(grams[key])
    collect(model, attached, ctx, data=data)
    sound = {key for key, gram in grams.items() if np.isfinite(gram.matrix).all() and gram.count}
    return {name: grams[key] for name, key in keys.items() if key in sound}
