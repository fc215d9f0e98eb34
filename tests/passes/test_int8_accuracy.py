"""`int8` judges a simulation: it must compute what the file would, for any choice of layers."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.passes.int8 import accuracy
from onnxslim.passes.int8.prepare import Prepared, observe_ranks, survey
from onnxslim.passes.int8.speed import insert
from onnxslim.probe import Switched
from onnxslim.profiles import CPU, PROFILES, Profile
from onnxslim.units import Kind, find_units, name_all_nodes

sys.path.insert(0, str(Path(__file__).parent))
from test_int8 import RNG, build, filters, samples
from test_int8_branches import branched, feed


def chain() -> ir.Model:
    """Every kind of product, one behind the other: biases, none, rows, activations, a result that is not stored."""
    weights = {name: filters(8, 8) for name in ("c1", "c2", "c3")}
    weights |= {name: RNG.standard_normal((8, 8)).astype(np.float32) / 3 for name in ("m1", "m2", "m3")}
    weights |= {name: RNG.standard_normal(8).astype(np.float32) for name in ("bias", "row")}
    weights |= {"shape": np.array([-1, 8]), "high": np.float32(2)}
    nodes = [
        helper.make_node("Conv", ["x", "c1", "bias"], ["a1"], name="first"),
        helper.make_node("Relu", ["a1"], ["a2"]),
        helper.make_node("Conv", ["a2", "c2"], ["a3"], name="second"),
        helper.make_node("Clip", ["a3", "", "high"], ["a4"]),
        helper.make_node("Conv", ["a4", "c3"], ["a5"], name="third"),
        helper.make_node("Transpose", ["a5"], ["a6"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["a6", "shape"], ["a7"]),
        helper.make_node("MatMul", ["a7", "m1"], ["a8"], name="fourth"),
        helper.make_node("Add", ["row", "a8"], ["a9"]),
        helper.make_node("Relu", ["a9"], ["a10"]),
        helper.make_node("Gemm", ["a10", "m2"], ["a11"], name="fifth", transB=1),
        helper.make_node("MatMul", ["a11", "m3"], ["y"], name="last"),
    ]
    return build(nodes, weights, ["n", 8, 12, 12])


def summed() -> ir.Model:
    """A product and the sum with what is behind it read one value."""
    weights = {name: filters(8, 8) for name in ("w1", "w2", "w3", "w4")}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a1"], name="first"),
        helper.make_node("Relu", ["a1"], ["a2"]),
        helper.make_node("Conv", ["a2", "w2"], ["a3"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a3"], ["a4"]),
        helper.make_node("Conv", ["a4", "w3"], ["a5"], name="third", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a5", "a2"], ["a6"], name="residual"),
        helper.make_node("Relu", ["a6"], ["a7"]),
        helper.make_node("Conv", ["a7", "w4"], ["y"], name="fourth"),
    ]
    return build(nodes, weights, ["n", 8, 12, 12])


def gated() -> ir.Model:
    """Sums and factors between products, of values that others read as well."""
    weights = {name: filters(8, 8) for name in ("w1", "w2", "w3")} | {"half": np.float32(0.5)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a1"], name="first"),
        helper.make_node("HardSigmoid", ["a1"], ["a2"], name="gate"),
        helper.make_node("Mul", ["a1", "a2"], ["a3"], name="product"),
        helper.make_node("Add", ["a3", "half"], ["a4"], name="shift"),
        helper.make_node("Conv", ["a4", "w2"], ["a5"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a5", "a3"], ["a6"], name="residual"),
        helper.make_node("Conv", ["a6", "w3"], ["y"], name="third"),
    ]
    return build(nodes, weights, ["n", 8, 12, 12])


def scaled() -> ir.Model:
    """Constants that one range for all channels says little of, and the gate of HardSwish, between products."""
    weights = {name: filters(8, 8) for name in ("w1", "w2", "w3")}
    weights |= {"factor": np.full((8, 1, 1), 0.1, np.float32), "offset": np.full((1, 8, 1, 1), 0.07, np.float32)}
    weights["factor"][0] = weights["offset"][0, 0] = 20
    weights["w2"][:, 0] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a1"], name="first"),
        helper.make_node("Relu", ["a1"], ["a2"]),
        helper.make_node("Mul", ["a2", "factor"], ["a3"], name="factor"),
        helper.make_node("Add", ["offset", "a3"], ["a4"], name="offset"),
        helper.make_node("Relu", ["a4"], ["a5"]),
        helper.make_node("Conv", ["a5", "w2"], ["a6"], name="second"),
        helper.make_node("HardSwish", ["a6"], ["a7"], name="swish"),
        helper.make_node("Clip", ["a7", "", "high"], ["a8"]),
        helper.make_node("Conv", ["a8", "w3"], ["y"], name="third"),
    ]
    return build(nodes, weights | {"high": np.float32(2)}, ["n", 8, 12, 12])


def post_norm() -> ir.Model:
    """A block of a transformer: products and the residual read what a LayerNormalization writes."""
    weights = {name: RNG.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("m1", "m2", "m3")}
    weights |= {"scale": np.linspace(0.5, 2, 16, dtype=np.float32)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["a1"]),
        helper.make_node("MatMul", ["a1", "m1"], ["a2"], name="first"),
        helper.make_node("Gelu", ["a2"], ["a3"]),
        helper.make_node("MatMul", ["a3", "m2"], ["a4"], name="second"),
        helper.make_node("Add", ["a4", "a1"], ["a5"], name="residual"),
        helper.make_node("LayerNormalization", ["a5", "scale"], ["a6"]),
        helper.make_node("MatMul", ["a6", "m3"], ["a7"], name="third"),
        helper.make_node("Tanh", ["a7"], ["a8"]),
        helper.make_node("MatMul", ["a8", "m1"], ["y"], name="fourth"),
    ]
    return build(nodes, weights, ["n", 6, 16], 20)


def prepared(model: ir.Model, feeds: list[dict[str, np.ndarray]], profile: Profile = CPU) -> Prepared:
    """All products of ``model`` ready to be stored, in float as they are."""
    name_all_nodes(model)
    seen = data.open_data(feeds, data.input_specs(model))
    ctx = Context(seen, threads=1)
    observe_ranks(model, seen, ctx)
    products = [n for n, unit in find_units(model)[0].items() if unit.kind is Kind.PRODUCT]
    return survey(model, products, seen, ctx, per_channel=True, profile=profile)


def distances(these: list[list[np.ndarray]], those: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate(
        [np.abs(a - b).ravel() for x, y in zip(these, those, strict=True) for a, b in zip(x, y, strict=True)]
    )


MODELS = [
    (chain, samples((1, 8, 12, 12))),
    (summed, samples((1, 8, 12, 12))),
    (gated, samples((1, 8, 12, 12))),
    (scaled, samples((1, 8, 12, 12))),
    (post_norm, samples((2, 6, 16))),
    (lambda: model_io.load(branched()), [feed(k, bool(k % 2)) for k in range(12)]),
]
Feeds = list[dict[str, np.ndarray]]


def compare(model: ir.Model, ready: Prepared, feeds: Feeds, choices: Iterable[tuple[str, ...]]) -> None:
    """With each choice of products, the simulation of ``model`` computes what its file says."""
    before = model_io.to_bytes(model)
    everything = dataclasses.replace(ready, barred=frozenset())
    simulated = Switched(model, ready.plan(everything.choose(ready.products)), threads=1)
    plain = runtime.load(model, threads=1)
    floats = [runtime.arrays(runtime.run(plain, x)) for x in feeds]
    for chosen in choices:
        file = runtime.load(insert(model, ready, chosen), threads=1, optimize=False)
        want = [runtime.arrays(runtime.run(file, x)) for x in feeds]
        got = [simulated(x, ready.choose(chosen)) for x in feeds]
        far, apart = distances(floats, want), distances(want, got)
        noise = np.sqrt(np.mean(np.square(far)))
        assert (noise > 1e-4) == bool(chosen)
        # Where a sum is rounded otherwise, some values are stored one step further, and some of those behind them.
        assert np.median(apart) <= 0.05 * noise + 1e-6, chosen
    assert model_io.to_bytes(model) == before


@pytest.mark.parametrize("target", PROFILES)
@pytest.mark.parametrize("make, feeds", MODELS)
def test_a_simulation_computes_what_the_file_says(make: Callable[[], ir.Model], feeds: Feeds, target: str) -> None:
    model = make()
    ready = prepared(model, feeds, PROFILES[target])
    assert len(ready.products) > 2
    sizes = range(len(ready.products) + 1)
    compare(model, ready, feeds[-2:], itertools.chain(*(itertools.combinations(ready.products, n) for n in sizes)))


@pytest.mark.parametrize("make, feeds", MODELS)
def test_so_it_does_where_what_lies_between_products_stays_in_float(make: Callable[[], ir.Model], feeds: Feeds) -> None:
    model = make()
    ready = prepared(model, feeds)
    between = [n for n in ready.choose(ready.products) if n not in ready.products]
    choices = [ready.products, ready.products[::2], ready.products[1::2]]
    for size in range(1, len(between) + 1):
        for barred in itertools.combinations(between, size):
            compare(model, dataclasses.replace(ready, barred=frozenset(barred)), feeds[-2:], map(tuple, choices))


def test_what_has_no_range_that_suits_it_goes_back_and_the_layers_around_it_stay() -> None:
    """A sum that is large on its way from one layer to the next."""
    weights = {name: filters(8, 8) for name in ("w1", "w2", "w3")} | {"far": np.float32(300), "back": np.float32(-300)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a1", "far"], ["a2"], name="out"),
        helper.make_node("Add", ["a2", "back"], ["a3"], name="home"),
        helper.make_node("Conv", ["a3", "w2"], ["a4"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a4"], ["a5"]),
        helper.make_node("Conv", ["a5", "w3"], ["y"], name="third"),
    ]
    model = build(nodes, weights, [1, 8, 12, 12])
    feeds = samples((1, 8, 12, 12), 24)
    ready = prepared(model, feeds)
    assert {"out", "home"} <= ready.choose(ready.products)
    ctx = Context(data.open_data(feeds, data.input_specs(model)), threads=1)
    kept, reasons, noise = accuracy.restore(model, ready, ctx.calibration, ctx, 0.99)
    assert kept.choose(kept.products) == {"first", "second", "third"} == set(ready.products)
    assert not reasons and noise < 0.01
