"""The oracle of channel coupling on fetched models: channels removed from the file are channels masked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# bench/ and models/ are no installed packages: they are imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.oracle import judge, prepare
from models import zoo

# What a model has families of at least: silero_vad is one If, whose bodies are left alone.
FAMILIES = {"silero_vad": 0}


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*zoo.load_models()])
def test_removed_is_masked(name: str) -> None:
    if not zoo.find(name).path.is_file():
        pytest.skip(f"{name} is not fetched")
    judged = judge(*prepare(name), fast=True)
    assert judged.families >= FAMILIES.get(name, 5)
    assert judged.holds, (judged.worst, judged.noise)
