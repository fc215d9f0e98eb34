"""Trains the plain networks that bench/prune.py prunes: LeNet-300-100 and a VGG-style CNN on Fashion-MNIST.

    python models/train_plain.py lenet300|vgg [--epochs N] [--threads N]

It writes `model.onnx`, `calib.npz` and `eval.npz` into the folder of that name in the model cache (see models/zoo.py),
in one to five minutes on two cores. It needs torch and onnx: `pip install "onnxslim[zoo]"`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fashion import load_images
from models.packages import cache_root

CALIBRATION_IMAGES = 512


def lenet300() -> nn.Module:
    """784-300-100-10, 0.27 M parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def vgg() -> nn.Module:
    """Convolutions of 32, 64, 128 and 128 channels, three poolings, two fully connected layers; 15 M MACs."""
    layers: list[nn.Module] = []
    width = 1
    for out, pooled in ((32, True), (64, True), (128, False), (128, True)):
        layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, epochs: int, peak: float) -> nn.Module:
    """Train in place; returns the model."""
    images, labels = (torch.from_numpy(part) for part in load_images("train"))
    test_images, test_labels = (torch.from_numpy(part) for part in load_images("t10k"))
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.25)
    for epoch in range(epochs):
        began = time.perf_counter()
        model.train()
        for part in torch.randperm(len(images))[: len(images) // 256 * 256].split(256):
            loss = functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            scores = torch.cat([model(part) for part in test_images.split(500)])
        score = (scores.argmax(1) == test_labels).double().mean().item()
        print(f"epoch {epoch + 1}: test {score:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def main() -> None:
    """Train, export, and write the data files."""
    parser = argparse.ArgumentParser(description="Train a plain network on Fashion-MNIST and write its files.")
    parser.add_argument("net", choices=["lenet300", "vgg"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    small = options.net == "lenet300"
    model = train(lenet300() if small else vgg(), options.epochs or (15 if small else 5), 0.1).eval()
    folder = cache_root() / options.net
    folder.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),
        str(folder / "model.onnx"),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
    )
    images, _ = load_images("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION_IMAGES, replace=False)
    np.savez_compressed(folder / "calib.npz", image=images[np.sort(chosen)])
    images, labels = load_images("t10k")
    np.savez_compressed(folder / "eval.npz", image=images, labels=labels)


if __name__ == "__main__":
    main()
