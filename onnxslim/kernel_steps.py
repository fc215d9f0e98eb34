"""In which steps of width the kernels of this machine get faster, found by timing a convolution at a few widths.

Vector kernels work on 8 or 16 channels at a time, and what is left over costs as much as a whole step. How many they
are depends on the processor and on the version of the runtime, so it is measured.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import rounds, runtime

STEPS = (4, 8, 16, 32)
FALLBACK = 8  # where the times say nothing
BASES = (64, 128)  # widths that the steps are taken off
WIDTHS = tuple(sorted({*BASES, *(base - step for base in BASES for step in STEPS)}))
# A step pays that saves at least this part of what its share of the work is worth, in three rounds of four.
PAYS, ROUNDS_OF_ALL = 0.5, 0.75
SECONDS = 1.0
EXTENT = 14  # height and width of the image

Timer = Callable[[Sequence[int]], np.ndarray]  # widths -> milliseconds, (rounds, widths): all widths in every round


def smallest(timer: Timer) -> int:
    """The smallest of `STEPS` that makes a layer faster when it is taken off its width, or `FALLBACK`.

    Widths are compared within a round, which other work on the machine slows down as a whole. Where not even the
    largest step pays, the times are noise.
    """
    times = np.asarray(timer(WIDTHS), np.float64)
    place = {width: k for k, width in enumerate(WIDTHS)}

    def pays(step: int) -> bool:
        shares = [
            (1 - times[:, place[base - step]] / times[:, place[base]]) / (1 - ((base - step) / base) ** 2)
            for base in BASES
        ]
        return float(np.quantile(np.concatenate(shares), 1 - ROUNDS_OF_ALL)) >= PAYS

    if not pays(STEPS[-1]):
        return FALLBACK
    return next(step for step in STEPS if pays(step))


@functools.cache
def here() -> int:
    """The step of the CPU kernels of this machine, timed when first asked for.

    On one thread: how many channels a vector holds does not depend on their number, and one thread is told how long
    it waited for others.
    """

    def timer(widths: Sequence[int]) -> np.ndarray:
        calls = [_call(width) for width in widths]
        for call in calls:
            rounds.warm_up(call, 0.05)
        return np.array(rounds.interleave(calls, SECONDS, random.Random(0), single=[True] * len(calls))[0])

    return smallest(timer)


def _call(width: int) -> rounds.Call:
    """One pass of two convolutions of ``width`` channels, the second of which reads what suits the kernels best."""
    image = [1, width, EXTENT, EXTENT]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(image))
    array = np.random.default_rng(0).standard_normal((width, width, 3, 3)).astype(np.float32) / width
    stored = ir.tensor(array, name="w")
    w = ir.Value(name="w", const_value=stored, type=ir.TensorType(stored.dtype), shape=ir.Shape(array.shape))
    first = ir.node("Conv", [x, w], {"pads": [1] * 4})
    second = ir.node("Conv", [first.outputs[0], w], {"pads": [1] * 4})
    first.outputs[0].name, second.outputs[0].name = "h", "y"
    second.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], second.outputs, nodes=[first, second], initializers=[w], opset_imports={"": 17}, name="steps")
    runner = runtime.load(ir.Model(graph, ir_version=8), threads=1)
    feed = {"x": np.random.default_rng(1).standard_normal(image).astype(np.float32)}
    return lambda _: runner(feed)
