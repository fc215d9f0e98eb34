"""Scores for the models of the zoo: `function(outputs, sample) -> float`, higher is better, averaged over samples.

`outputs` holds the model's outputs and `sample` every array of the sample, the right answers in `labels`. The functions
that measure a correlation want one sample that holds the whole collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

BLANK = 0
TEXT_THRESHOLD = 0.3
LEAST_OVERLAP = 0.5
# The detector is trained on text areas shrunk by this share of area over perimeter; boxes are grown back by it.
UNCLIP = 1.6


def only(outputs: Arrays) -> Array:
    """Return the first output, the one that carries the answer."""
    return next(iter(outputs.values()))


def top1(outputs: Arrays, sample: Arrays) -> float:
    """Return the share of rows whose highest score is a right class.

    `labels` holds one class a row, or several padded with -1, any of which is right.
    """
    best = only(outputs).reshape(len(sample["labels"]), -1).argmax(1)
    right = np.asarray(sample["labels"]).reshape(len(best), -1)
    return float((right == best[:, None]).any(1).mean())


def ctc_decode(scores: Array) -> list[int]:
    """Return the class ids of the best path through `scores` (steps, classes), repeats and blanks removed."""
    path = scores.argmax(1)
    kept = np.concatenate(([True], path[1:] != path[:-1])) & (path != BLANK)
    return [int(step) for step in path[kept]]


def ocr_exact(outputs: Arrays, sample: Arrays) -> float:
    """Return 1 when the text line is read as `labels` (class ids) says, spaces ignored, else 0.

    The space is the last class of PP-OCR's recognizers.
    """
    scores = only(outputs)[0]
    space = scores.shape[1] - 1
    read = [step for step in ctc_decode(scores) if step != space]
    return float(read == [int(step) for step in np.ravel(sample["labels"]) if step not in (space, -1)])


def find_boxes(probability: Array) -> NDArray[np.float64]:
    """Return the upright boxes (left, top, right, bottom) around the connected areas of a text probability map."""
    from scipy import ndimage

    areas, _ = ndimage.label(probability > TEXT_THRESHOLD)
    found = []
    for rows, columns in ndimage.find_objects(areas):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height < 3 or width < 3:
            continue
        grow = UNCLIP * height * width / (2 * (height + width))
        found.append((columns.start - grow, rows.start - grow, columns.stop + grow, rows.stop + grow))
    return np.array(found, np.float64).reshape(-1, 4)


def overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the intersection over union of every box of `first` with every box of `second`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    union = sizes[0][:, None] + sizes[1][None, :] - shared
    return np.asarray(shared / np.maximum(union, 1e-9), np.float64)


def text_boxes_f1(outputs: Arrays, sample: Arrays) -> float:
    """Return the F1 score of the text boxes found against `labels`, boxes padded with rows of -1."""
    from scipy.optimize import linear_sum_assignment

    wanted = np.asarray(sample["labels"], np.float64).reshape(-1, 4)
    wanted = wanted[wanted[:, 0] >= 0]
    found = find_boxes(only(outputs)[0, 0])
    if not len(wanted) or not len(found):
        return float(len(wanted) == len(found))
    shared = overlaps(found, wanted)
    rows, columns = linear_sum_assignment(-shared)
    hits = int((shared[rows, columns] >= LEAST_OVERLAP).sum())
    return 2 * hits / (len(found) + len(wanted))


def embed(outputs: Arrays, sample: Arrays) -> NDArray[np.float64]:
    """Return one unit vector a text: the mean of its tokens' vectors, padding left out."""
    tokens = only(outputs).astype(np.float64)
    mask = np.asarray(sample["attention_mask"], np.float64)[:, :, None]
    mean = (tokens * mask).sum(1) / mask.sum(1)
    unit: NDArray[np.float64] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def similarity_pearson(outputs: Arrays, sample: Arrays) -> float:
    """Return Pearson's correlation of the documents' cosines with `labels`, above the diagonal of both."""
    vectors = embed(outputs, sample)
    upper = np.triu_indices(len(vectors), 1)
    gold = np.asarray(sample["labels"], np.float64).reshape(len(vectors), len(vectors))
    return float(np.corrcoef((vectors @ vectors.T)[upper], gold[upper])[0, 1])


def pairs_spearman(outputs: Arrays, sample: Arrays) -> float:
    """Return Spearman's rank correlation of the cosines of texts 2k and 2k+1 with `labels[k]`."""
    from scipy.stats import rankdata

    vectors = embed(outputs, sample)
    cosines = (vectors[0::2] * vectors[1::2]).sum(1)
    ranks = [rankdata(values) for values in (cosines, np.ravel(sample["labels"]))]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def speech_accuracy(outputs: Arrays, sample: Arrays) -> float:
    """Return the share of sound chunks whose speech probability is on the side of one half that `labels` says."""
    heard = only(outputs).reshape(-1) > 0.5
    return float((heard == (np.ravel(sample["labels"]) > 0.5)).mean())


def cosine(first: Array, second: Array) -> float:
    """Return the cosine between two arrays read as vectors; 1 when both are zero."""
    a, b = np.ravel(first).astype(np.float64), np.ravel(second).astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))
