"""Takes Silero's voice activity detector, with spoken words and noise to judge it on."""

from __future__ import annotations

import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.data import Sample, write_folder
from models.packages import take

SOUNDS = "usr/share/sounds/alsa"
CALIBRATION_CLIPS = ("Front_Left", "Side_Right")
EVALUATION_CLIPS = ("Front_Center", "Front_Right", "Rear_Center", "Rear_Left", "Rear_Right", "Side_Left")
RATE, CHUNK, CONTEXT = 16000, 512, 64
# Signal to noise in decibels; the last is hard.
CONDITIONS = (60.0, 20.0, 5.0)
# Chunks between these loudnesses (decibels below the loudest) are neither clearly speech nor clearly a pause.
SPEECH, PAUSE = -25.0, -45.0
EVERY = 3


def read_clip(name: str) -> NDArray[Any]:
    """Return one recording at 16 kHz, amplitude below 1."""
    from scipy.signal import resample_poly

    with wave.open(str(take("alsa-utils", f"{SOUNDS}/{name}.wav"))) as stream:
        samples = np.frombuffer(stream.readframes(stream.getnframes()), "<i2") / 32768
        return np.asarray(resample_poly(samples, RATE, stream.getframerate()))


def loudness(sound: NDArray[Any]) -> NDArray[Any]:
    """Return the level of each chunk in decibels."""
    chunks = sound.reshape(-1, CHUNK)
    return np.asarray(20 * np.log10(np.sqrt((chunks**2).mean(1)) + 1e-7))


def listen(session: ort.InferenceSession, name: str, condition: int) -> Iterator[Sample]:
    """Yield chunks of a noisy recording between pauses as the detector meets them, with context and state."""
    pause = np.zeros(RATE // 2)
    clean = np.concatenate([pause, read_clip(name), pause])
    clean = clean[: len(clean) // CHUNK * CHUNK]
    levels = loudness(clean)
    generator = np.random.default_rng([*name.encode(), condition])
    strength = np.sqrt((clean**2).mean()) * 10 ** (-CONDITIONS[condition] / 20)
    heard = (clean + strength * generator.standard_normal(len(clean))).astype(np.float32)
    state = np.zeros((2, 1, 128), np.float32)
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), heard])
    for k, level in enumerate(levels - levels.max()):
        feeds = {
            "input": padded[None, k * CHUNK : (k + 1) * CHUNK + CONTEXT],
            "state": state,
            "sr": np.array(RATE, np.int64),
        }
        if (level > SPEECH or level < PAUSE) and (k + condition) % EVERY == 0:
            yield feeds | {"labels": np.array([int(level > SPEECH)], np.int64)}
        state = session.run(["stateN"], feeds)[0]


def silero_vad(folder: Path) -> None:
    """Take Silero's detector as it is, with both its sampling rates behind an If."""
    source = take("silero-vad", "silero_vad/data/silero_vad.onnx")
    shutil.copyfile(source, folder / "model.onnx")
    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    for part, clips in (("calib", CALIBRATION_CLIPS), ("eval", EVALUATION_CLIPS)):
        samples = (chunk for name in clips for k in range(len(CONDITIONS)) for chunk in listen(session, name, k))
        write_folder(folder / part, samples)
