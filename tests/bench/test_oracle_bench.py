"""bench/oracle.py: what counts as a difference between masked and removed channels."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

# bench/ is no installed package: it is imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.oracle import Judged


@pytest.mark.parametrize(
    ("worst", "noise", "holds"),
    [(9e-5, 0.0, True), (2e-4, 0.0, False), (5e-3, 5e-3, True), (5e-3, 1e-3, False), (5e-3, 1e-5, False)],
)
def test_only_its_own_noise_excuses_a_model(worst: float, noise: float, holds: bool) -> None:
    assert Judged(1, 2, 3, worst, noise, Counter()).holds is holds
