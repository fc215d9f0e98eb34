"""Trains the committed demo: a small residual CNN on Fashion-MNIST, with its calibration and evaluation data.

    python models/train_fmnist.py [--epochs N] [--threads N]

It writes `fmnist_cnn.onnx`, `fmnist_calib.npz` and `fmnist_eval.npz` beside itself, in about ten minutes on two cores.
It needs torch and onnx: `pip install "onnxslim[zoo]"`.
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

HERE = Path(__file__).resolve().parent
CALIBRATION_IMAGES = 256
EVALUATION_IMAGES = 2500


class ResidualBlock(nn.Module):
    """Adds two 3x3 convolutions to the input, which a 1x1 convolution reshapes where width or stride asks it."""

    def __init__(self, width_in: int, width_inner: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_inner)
        self.conv2 = nn.Conv2d(width_inner, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activated sum of both branches."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class FashionNet(nn.Module):
    """Classifies 28x28 grey images, pixels in [0, 1), with 0.44 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(32, 64, 64, stride=2), ResidualBlock(64, 128, 128, stride=2), ResidualBlock(128, 64, 128)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the ten class scores."""
        scores: torch.Tensor = self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return scores


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the batch shifted by up to two pixels, half of it mirrored."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
    return functional.pad(images, (2, 2, 2, 2))[:, :, dy : dy + 28, dx : dx + 28]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose highest score is their label's."""
    model.eval()
    with torch.inference_mode():
        scores = torch.cat([model(part) for part in images.split(500)])
    return (scores.argmax(1) == labels).double().mean().item()


def train(epochs: int, seed: int = 0) -> FashionNet:
    """Return the network after `epochs` passes over the training images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(part) for part in load_images("train"))
    test_images, test_labels = (torch.from_numpy(part) for part in load_images("t10k"))
    model = FashionNet()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, pct_start=0.25)
    for epoch in range(epochs):
        began = time.perf_counter()
        model.train()
        for part in torch.randperm(len(images), generator=generator)[: len(images) // 256 * 256].split(256):
            batch = augment(images[part], generator).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(batch), labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(model, test_images, test_labels)
        print(f"epoch {epoch + 1}: test {score:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def export(model: FashionNet, path: Path) -> None:
    """Write the model with a free batch dimension and every BatchNormalization still in the graph."""
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),
        str(path),
        dynamo=False,
        opset_version=17,
        # PRESERVE on a model in eval mode keeps BatchNormalization in its inference form, unfused.
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
    )


def main() -> None:
    """Train, export, and write the data files."""
    parser = argparse.ArgumentParser(description="Train the Fashion-MNIST demo and write its files.")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, _ = load_images("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION_IMAGES, replace=False)
    np.savez_compressed(HERE / "fmnist_calib.npz", image=images[np.sort(chosen)])
    images, labels = load_images("t10k")
    np.savez_compressed(HERE / "fmnist_eval.npz", image=images[:EVALUATION_IMAGES], labels=labels[:EVALUATION_IMAGES])
    export(train(options.epochs), HERE / "fmnist_cnn.onnx")


if __name__ == "__main__":
    main()
