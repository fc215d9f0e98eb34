"""Makes labelled photographs for ImageNet classifiers out of Debian's stamps for Tux Paint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.packages import catalogue, take

STAMPS = "usr/share/tuxpaint/stamps"
CALIBRATION_STAMPS = 25
IMAGES_PER_STAMP = 4
PAPER = ((255, 255, 255), (128, 128, 128), (200, 215, 230), (90, 110, 80), (225, 205, 170))


def labelled_stamps() -> list[tuple[str, list[int]]]:
    """Return each stamp's path below the stamps folder, with the ImageNet class ids that are right for it."""
    text = (Path(__file__).resolve().parent / "stamps_imagenet_labels.txt").read_text()
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, [int(label) for label in labels.split(",")]) for name, labels in rows]


def photographs() -> list[Image.Image]:
    """Return the background photographs, small enough to crop quickly."""
    names = sorted(catalogue()["package"]["mate-backgrounds"]["sha256"])
    images = [Image.open(take("mate-backgrounds", name)).convert("RGB") for name in names]
    return [image.resize((640, 480), Image.Resampling.LANCZOS) for image in images]


def backdrop(size: int, photograph: Image.Image | None, generator: np.random.Generator) -> Image.Image:
    """Return a square of plain paper, or a random crop of a photograph."""
    if photograph is None:
        return Image.new("RGB", (size, size), PAPER[generator.integers(len(PAPER))])
    side = int(generator.integers(300, 480))
    left, top = int(generator.integers(640 - side + 1)), int(generator.integers(480 - side + 1))
    return photograph.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))


def paste(stamp: Image.Image, scene: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return the scene with the stamp somewhere on it, seven to ten tenths as large, mirrored half of the time."""
    stamp = stamp.crop(stamp.getbbox())
    scale = scene.width * generator.uniform(0.7, 1.0) / max(stamp.size)
    stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size], Image.Resampling.LANCZOS)
    if generator.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    place = [int(generator.integers(scene.width - side + 1)) for side in stamp.size]
    scene.paste(stamp, (place[0], place[1]), stamp)
    return scene


def stamp_images(
    size: int, normalize: Callable[[NDArray[Any]], NDArray[Any]], seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return calibration images, evaluation images of other stamps, and the latter's labels (rows padded with -1).

    Images are (N, 3, size, size), RGB; of the four of a stamp two lie on plain paper and two on photographs.
    """
    rows = labelled_stamps()
    width = max(len(labels) for _, labels in rows)
    scenes = photographs()
    order = np.random.default_rng(seed).permutation(len(rows))
    images: list[NDArray[Any]] = []
    answers = []
    for place in order:
        name, labels = rows[place]
        with Image.open(take("tuxpaint-stamps-default", f"{STAMPS}/{name}.png")) as opened:
            stamp = opened.convert("RGBA")
        for number in range(IMAGES_PER_STAMP):
            # One generator an image: adding a stamp changes no other's images.
            generator = np.random.default_rng([seed, int(place), number])
            photograph = scenes[generator.integers(len(scenes))] if number % 2 else None
            image = paste(stamp, backdrop(size, photograph, generator), generator)
            images.append(normalize(np.asarray(image, np.float32)).transpose(2, 0, 1))
            answers.append(labels + [-1] * (width - len(labels)))
    cut = CALIBRATION_STAMPS * IMAGES_PER_STAMP
    whole = np.stack(images).astype(np.float32)
    return whole[:cut], whole[cut:], np.array(answers[cut:], np.int64)
