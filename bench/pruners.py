"""Prunes with other tools, once and without training, to the multiplications that a result of ours has left.

`onnxsim` is that package's calibrated structured pruning of the file (Wanda scores), in the environment of its own that
bench/peers.py makes. `torch-pruning` is that package's magnitude pruner (L2 norm of each group, the same share of every
layer) on the network in torch, for which this environment's torch is used; it is there for models whose network
models/ trains.

Both take a share of the channels, not a budget: the share is found by bisection.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench import peers
from models.packages import cache_root
from onnxslim.data import Data

ROUNDS = 6  # halvings of the interval of shares
MOST = 0.95  # the largest share tried
CLOSE = 0.01  # of the goal
TORCH_PRUNING = "torch-pruning==1.6.1"
_WANDA = """
import sys, numpy, onnx, onnxsim
source, target, samples, share = sys.argv[1:]
data = []
with numpy.load(samples) as found:
    for key in found.files:
        k, name = key.split(":", 1)
        data += [{}] * (int(k) + 1 - len(data))
        data[int(k)] = {**data[int(k)], name: found[key]}
onnx.save(onnxsim.apply_structured_wanda_pruning(source, data, sparsity=float(share)), target)
"""


def bisect(make: Callable[[float], float], goal: float) -> float:
    """The smallest share tried for which ``make`` (what is left, falling) comes down to ``goal``, 1 % allowed.

    ``make`` is called with it last; where no share comes down to the goal, with `MOST`.
    """
    low, high, last = 0.0, MOST, None
    for _ in range(ROUNDS):
        last = (low + high) / 2
        left = make(last)
        if left > goal * (1 + CLOSE):
            low = last
        else:
            high = last
            if left >= goal * (1 - CLOSE):
                break
    if last != high:
        make(high)
    return high


def onnxsim(source: Path, target: Path, calibration: Data, left: Callable[[Path], float], goal: float) -> None:
    """Write the file pruned by onnxsim to ``target``; ``left`` tells what is left of the multiplications of a file.

    Raises:
        subprocess.CalledProcessError: the tool fails.
    """
    peer = peers.PEERS["onnxsim"]
    python = peers.environment(peer.name, peer.packages)
    samples = target.with_suffix(".npz")
    np.savez(samples, **{f"{k}:{n}": array for k, feed in enumerate(calibration.feeds()) for n, array in feed.items()})

    def make(share: float) -> float:
        arguments = [str(python), "-I", "-c", _WANDA, str(source), str(target), str(samples), str(share)]
        subprocess.run(arguments, check=True, capture_output=True, text=True)
        return left(target)

    bisect(make, goal)


def torch_pruning(name: str, source: Path, target: Path, left: Callable[[Path], float], goal: float) -> None:
    """Write the network ``name`` with the weights of ``source``, pruned by Torch-Pruning, to ``target``."""
    folder = cache_root().parent / "peers" / "torch-pruning"
    if not (folder / "torch_pruning").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, TORCH_PRUNING], check=True)
    sys.path.append(str(folder))
    import torch
    import torch_pruning as tp

    image = torch.zeros(2, 1, 28, 28)

    def make(share: float) -> float:
        net = network(name, source)
        head = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
        tp.pruner.MagnitudePruner(
            net, image, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=share, ignored_layers=[head]
        ).step()
        names = {"input_names": ["image"], "output_names": ["scores"]}
        axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
        torch.onnx.export(net, (image,), str(target), dynamo=False, opset_version=17, dynamic_axes=axes, **names)
        return left(target)

    bisect(make, goal)


NETWORKS = ("lenet300", "vgg", "fmnist_cnn")  # those that `network` can make


def network(name: str, source: Path):  # type: ignore[no-untyped-def]  # torch is optional
    """The network ``name`` in torch with the weights that its file has, BatchNormalization folded as there."""
    import torch

    from models import train_fmnist, train_plain

    net = {"lenet300": train_plain.lenet300, "vgg": train_plain.vgg, "fmnist_cnn": train_fmnist.FashionNet}[
        name
    ]().eval()
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, key, torch.nn.Identity())
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for layer, (weight, bias) in zip(layers, _weights(source), strict=True):
        assert layer.weight.shape == weight.shape, f"{name}: {tuple(layer.weight.shape)} is not {weight.shape}"
        layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
        layer.bias = torch.nn.Parameter(torch.from_numpy(bias))
    return net


def _weights(source: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of every Conv and Gemm of a file, in the order of the graph, BatchNormalization folded."""
    from onnxslim import model, pipeline
    from onnxslim.contract import Context
    from onnxslim.data import Data, input_specs
    from onnxslim.graph import attribute, constant, is_op

    loaded = model.load(source)
    for stage in pipeline.parse("simplify,fold"):
        stage.apply(loaded, Context(Data("none", 0, lambda k: {}, input_specs(loaded))))
    for node in loaded.graph:
        if is_op(node, "Conv", "Gemm"):
            weight, bias = (constant(node.inputs[k]) for k in (1, 2))
            assert weight is not None and bias is not None
            transposed = is_op(node, "Gemm") and not attribute(node, "transB", 0)
            yield np.ascontiguousarray(weight.T if transposed else weight).copy(), bias.copy()
