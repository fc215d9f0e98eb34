"""Builds PP-OCRv4's text detector and recognizer, with rendered text whose place and wording are known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from models.data import Sample, write_folder
from models.packages import take

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
INKS = (((20, 20, 20), (250, 250, 250)), ((240, 240, 235), (40, 60, 90)), ((120, 20, 20), (235, 225, 200)))
READER_HEIGHT = 48
LEAST_WIDTH = 320
READER_CALIBRATION, READER_EVALUATION = 80, 300
FINDER_CALIBRATION, FINDER_EVALUATION = 24, 60
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def write_word(generator: np.random.Generator) -> str:
    """Return a pronounceable made-up word: a reader cannot fall back on what it knows of a language."""
    syllables = generator.integers(1, 4)
    letters = [f"{generator.choice(list(CONSONANTS))}{generator.choice(list(VOWELS))}" for _ in range(syllables)]
    word = "".join(letters) + str(generator.choice(["", "n", "r", "s", "t", "ll", "ck"]))
    style = generator.random()
    return word.upper() if style < 0.2 else word.capitalize() if style < 0.5 else word


def write_number(generator: np.random.Generator) -> str:
    """Return a price, a date, a code or a plain number."""
    a, b, c = (int(value) for value in generator.integers((100, 1, 1), (99999, 12, 28), endpoint=True))
    forms = (
        f"${a / 100:.2f}",
        f"{2000 + a % 30}-{b:02}-{c:02}",
        f"No.{a}",
        f"{a}",
        f"{b}:{c:02}",
        f"{c}%",
        f"(0{b}) {a}",
    )
    return forms[generator.integers(len(forms))]


def write_line(generator: np.random.Generator, least: int = 1, most: int = 4) -> str:
    """Return a line of words and numbers."""
    words = [
        write_number(generator) if generator.random() < 0.25 else write_word(generator)
        for _ in range(generator.integers(least, most, endpoint=True))
    ]
    return " ".join(words)


def draw_line(text: str, size: int, generator: np.random.Generator) -> Image.Image:
    """Return the text in a random font and ink, cut out with a narrow margin."""
    name = FONTS[generator.integers(len(FONTS))]
    font = ImageFont.truetype(str(take("fonts-dejavu-core", f"usr/share/fonts/truetype/dejavu/{name}.ttf")), size)
    ink, paper = INKS[generator.integers(len(INKS))]
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    margin = max(2, size // 6)
    image = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), paper)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, ink, font)
    return image


def spoil(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return the image blurred, or noisy, or made small and large again."""
    kind = generator.integers(3)
    if kind == 0:
        return image.filter(ImageFilter.GaussianBlur(image.height / generator.uniform(24, 36)))
    if kind == 1:
        small = image.resize((max(1, image.width * 14 // image.height), 14), Image.Resampling.BILINEAR)
        return small.resize(image.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)
    noisy = pixels + generator.normal(0, generator.uniform(30, 60), pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def load_charset(model: onnx.ModelProto) -> dict[str, int]:
    """Return the class id of each character: 0 is the blank, the space comes last."""
    (text,) = (entry.value for entry in model.metadata_props if entry.key == "character")
    letters = [*text.splitlines(), " "]
    return {letter: number + 1 for number, letter in enumerate(letters)}


def read_sample(number: int, charset: dict[str, int], seed: int) -> Sample:
    """Return one line for the recognizer with its class ids; two in five are spoiled."""
    generator = np.random.default_rng([seed, number])
    text = write_line(generator)
    image = draw_line(text, int(generator.integers(24, 44)), generator)
    if generator.random() < 0.4:
        image = spoil(image, generator)
    width = max(8, round(image.width * READER_HEIGHT / image.height))
    image = image.resize((width, READER_HEIGHT), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1
    # The recognizer was trained on lines padded with zeros to a least width.
    x: NDArray[Any] = np.zeros((1, 3, READER_HEIGHT, max(LEAST_WIDTH, width)), np.float32)
    x[0, :, :, :width] = pixels
    return {"x": x, "labels": np.array([[charset[letter] for letter in text]], np.int64)}


def ppocrv4_rec(folder: Path) -> None:
    """Take PP-OCRv4's recognizer, and render lines of known text."""
    source = take("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx")
    shutil.copyfile(source, folder / "model.onnx")
    charset = load_charset(onnx.load(source))
    write_folder(folder / "calib", (read_sample(k, charset, 1) for k in range(READER_CALIBRATION)))
    write_folder(folder / "eval", (read_sample(k, charset, 2) for k in range(READER_EVALUATION)))


def page_sample(number: int, seed: int) -> Sample:
    """Return one page for the detector, 320 to 640 pixels a side, with the boxes of its lines; a third is spoiled."""
    generator = np.random.default_rng([seed, number])
    width, height = (int(side) * 32 for side in generator.integers(10, 20, 2, endpoint=True))
    slope = np.linspace(0, float(generator.uniform(-40, 40)), width)[None, :, None]
    paper = generator.integers(120, 250, 3)[None, None, :]
    page = Image.fromarray(np.clip(paper + np.broadcast_to(slope, (height, width, 1)), 0, 255).astype(np.uint8))
    boxes: list[list[int]] = []
    top = int(generator.integers(8, 30))
    while True:
        line = draw_line(write_line(generator, 1, 3), int(generator.integers(14, 32)), generator)
        if top + line.height + 8 > height:
            break
        if line.width + 16 <= width:
            left = int(generator.integers(8, width - line.width - 7))
            page.paste(line, (left, top))
            boxes.append([left, top, left + line.width, top + line.height])
        top += line.height + int(generator.integers(14, 50))
    if generator.random() < 1 / 3:
        pixels = np.asarray(page.filter(ImageFilter.GaussianBlur(1)), np.float32)
        page = Image.fromarray(np.clip(pixels + generator.normal(0, 15, pixels.shape), 0, 255).astype(np.uint8))
    colours = np.asarray(page, np.float32)[:, :, ::-1] / 255
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((colours - mean) / deviation).transpose(2, 0, 1)[None]
    return {"x": np.ascontiguousarray(x, np.float32), "labels": np.array([boxes], np.int64).reshape(1, -1, 4)}


def ppocrv4_det(folder: Path) -> None:
    """Take PP-OCRv4's detector, and render pages with lines in known places."""
    source = take("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx")
    shutil.copyfile(source, folder / "model.onnx")
    write_folder(folder / "calib", (page_sample(k, 1) for k in range(FINDER_CALIBRATION)))
    write_folder(folder / "eval", (page_sample(k, 2) for k in range(FINDER_EVALUATION)))
