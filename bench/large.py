"""Seconds and resident memory of whole commands on large models with random weights.

    python bench/large.py [CASE ...] [--peers]

One row for each case: bytes of the model, seconds of the command (imports included), its peak of resident memory, the
most that both may be, and its exit code; `--peers` adds the simplifiers of bench/peers.py for the lossless case. The
files lie in a temporary folder while a case runs: up to 5 GB.

* `resnet50-prune`: 25.6 million parameters, 256 samples of 224 x 224.
* `resnet50-int8`: the same model, 1,000 samples.
* `bert`: four layers of BERT-base as torch exports them, the default passes (needs the extra `zoo`).
* `decoder-int4`: a decoder of 2.3 GB, weights to 4 bits.

Exit codes: 0 done; 1 a command failed or went beyond its limit; 2 bad usage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter as Raw
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers
from bench.corpus import command, isolated

HIDDEN, FEED_FORWARD, VOCABULARY, BLOCKS = 2048, 8192, 32000, 8
MEGABYTE = 1e6


class Builder:
    """Nodes and weights of a graph, written to a file with external data where asked."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{op}_{name}", **attributes))
        return name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(self.rng.standard_normal(shape, np.float32) * np.float32(scale))

    def constant(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto], output: str, *, external: bool = False) -> None:
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "large", inputs, [result], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, path, save_as_external_data=external, location="weights.bin")


def resnet50(path: Path) -> None:
    """He et al. 2015: bottlenecks of 3, 4, 6 and 3; weights that keep the variance."""
    b = Builder()

    def conv(x: str, wide: int, out: int, kernel: int, stride: int = 1, *, relu: bool = True) -> str:
        weight = b.weight(out, wide, kernel, kernel, scale=(2 / (wide * kernel**2)) ** 0.5)
        pads = [kernel // 2] * 4
        x = b.add("Conv", x, weight, strides=[stride] * 2, pads=pads, kernel_shape=[kernel] * 2)
        spread = [b.constant(b.rng.uniform(0.5, 1, out).astype(np.float32)) for _ in range(2)]
        x = b.add("BatchNormalization", x, spread[0], b.weight(out, scale=0.1), b.weight(out, scale=0.1), spread[1])
        return b.add("Relu", x) if relu else x

    x = b.add("MaxPool", conv("image", 3, 64, 7, 2), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    wide = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(count):
            stride = 2 if k == 0 and width > 64 else 1
            y = conv(conv(x, wide, width, 1), width, width, 3, stride)
            y = conv(y, width, 4 * width, 1, relu=False)
            short = conv(x, wide, 4 * width, 1, stride, relu=False) if k == 0 else x
            x, wide = b.add("Relu", b.add("Add", y, short)), 4 * width
    x = b.add("Flatten", b.add("GlobalAveragePool", x))
    x = b.add("Gemm", x, b.weight(1000, wide, scale=0.02), b.weight(1000, scale=0.02), transB=1)
    b.save(path, [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 224, 224])], x)


def images(path: Path, count: int) -> Path:
    """Smooth random images, one file each."""
    folder = path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for k in range(count):
        coarse = rng.standard_normal((1, 3, 14, 14)).astype(np.float32)
        np.savez(folder / f"{k:04}.npz", image=coarse.repeat(16, axis=2).repeat(16, axis=3))
    return folder


def bert(path: Path) -> None:
    """Four layers as the exporter writes them."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=4)
    config._attn_implementation = "eager"

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config).train(False)

        def forward(self, tokens: Any, mask: Any, types: Any) -> Any:
            found = self.bert(input_ids=tokens, attention_mask=mask, token_type_ids=types, use_cache=False)
            return found.last_hidden_state

    model = Hidden()
    tokens = torch.ones((1, 16), dtype=torch.long)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "hidden")}
    torch.onnx.export(
        model, (tokens, tokens, 0 * tokens), str(path), input_names=names, output_names=["hidden"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def decoder(path: Path) -> None:
    """Blocks of attention without positions and a gated feed-forward layer."""
    b = Builder()
    sides = [b.constant(np.ones(HIDDEN, np.float32)), b.constant(np.zeros(HIDDEN, np.float32))]

    def product(x: str, wide: int, out: int) -> str:
        return b.add("MatMul", x, b.weight(wide, out, scale=wide**-0.5))

    x = b.add("Gather", b.weight(VOCABULARY, HIDDEN), "tokens")
    for _ in range(BLOCKS):
        y = b.add("LayerNormalization", x, *sides)
        query, key, value = (product(y, HIDDEN, HIDDEN) for _ in range(3))
        scores = b.add("MatMul", query, b.add("Transpose", key, perm=[0, 2, 1]))
        scale = b.constant(np.array(HIDDEN**-0.5, np.float32))
        y = b.add("MatMul", b.add("Softmax", b.add("Mul", scores, scale), axis=-1), value)
        x = b.add("Add", x, product(y, HIDDEN, HIDDEN))
        y = b.add("LayerNormalization", x, *sides)
        gate = b.add("Sigmoid", product(y, HIDDEN, FEED_FORWARD))
        x = b.add("Add", x, product(b.add("Mul", gate, product(y, HIDDEN, FEED_FORWARD)), FEED_FORWARD, HIDDEN))
    x = product(x, HIDDEN, VOCABULARY)
    b.save(path, [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, 16])], x, external=True)


@dataclass(frozen=True)
class Case:
    """A command, and the most seconds and megabytes it may take; ``megabytes`` of the bytes of the model."""

    build: Callable[[Path], None]
    options: tuple[str, ...]
    samples: int = 0
    seconds: float | None = None
    megabytes: Callable[[float], float] = lambda size: np.inf
    lossless: bool = False


CASES = {
    "resnet50-prune": Case(resnet50, ("--passes", "prune(macs=0.7)", "--no-bench"), 256, 300, lambda size: 4000),
    "resnet50-int8": Case(
        resnet50, ("--passes", "int8(measure=false,samples=1000)", "--no-bench"), 1000, None, lambda size: size + 2000
    ),
    "bert": Case(bert, (), megabytes=lambda size: 1.5 * size + 300, lossless=True),
    # The largest layer is the projection to the vocabulary.
    "decoder-int4": Case(
        decoder, ("--passes", "int4", "--no-bench"), megabytes=lambda size: 2000 + 4 * HIDDEN * VOCABULARY / MEGABYTE
    ),
}


def measure(name: str, with_peers: bool) -> bool:
    """Print the rows of one case; False when it failed or went beyond a limit."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="onnxslim-large-") as scratch:
        folder = Path(scratch)
        source, target = folder / "model" / "model.onnx", folder / "result.onnx"
        source.parent.mkdir()
        # In a process of its own: a command starts with the peak of the process that starts it.
        _, problem = isolated(lambda: case.build(source), 600)
        if problem:
            raise RuntimeError(f"{name}: {problem}")
        size = sum(file.stat().st_size for file in source.parent.iterdir()) / MEGABYTE
        options = list(case.options)
        if case.samples:
            options += ["--calib", str(images(folder, case.samples))]
        ours = [sys.executable, "-m", "onnxslim", str(source), str(target), *options, "--threads", "2"]
        commands = {"onnxslim": ours}
        for peer in ("onnxslim", "onnxsim") if with_peers and case.lossless else ():
            commands[peers.PREFIX + peer] = peers.PEERS[peer].command(source, folder / f"{peer}.onnx", folder)
        fine = True
        for who, arguments in commands.items():
            result = command(arguments, folder, 3600)
            megabytes, most = (result.megabytes or 0) * 1.048576, case.megabytes(size)
            limits = f"at most {case.seconds or np.inf:.0f} s, {most:.0f} MB" if who == "onnxslim" else ""
            found = f"{result.seconds or 0:7.1f} s {megabytes:7.0f} MB"
            print(f"{name:16} {size:6.0f} MB  {who:14} {found}  {limits}  {result.problem}", flush=True)
            if who == "onnxslim":
                beyond = (result.seconds or 0) > (case.seconds or np.inf) or megabytes > most
                fine = not result.problem and not beyond
        return fine


def main(arguments: Sequence[str]) -> int:
    """Measure the cases named, all without a name."""
    parser = argparse.ArgumentParser(prog="bench/large.py", description=__doc__, formatter_class=Raw)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--peers", action="store_true", help="measure the simplifiers of bench/peers.py as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    fine = [measure(name, options.peers) for name in options.cases or CASES]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
