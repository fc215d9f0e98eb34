from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxslim.cli import cli
from onnxslim.prunable import facts

MODEL = Path(__file__).parents[1] / "models" / "fmnist_cnn.onnx"


def test_groups_and_what_stays_are_named() -> None:
    found = facts(str(MODEL), {})
    assert sum(row["units"] for row in found["groups"]) == 480
    for row in found["groups"]:
        assert 0 < row["parameters"] < 1 and 0 <= row["macs"] < 1
        assert row["weights"] and row["readers"]
    inner = next(row for row in found["groups"] if "blocks.2/conv1" in row["name"])
    # Two 3x3 convolutions between 128, 64 and 128 channels, of 0.44 M parameters in all.
    assert inner["parameters"] == pytest.approx(2 * 9 * 64 * 128 / 440_000, rel=0.05)
    assert any("graph output" in why or "input" in why or "kernel" in why for why in found["frozen"].values()) or (
        not found["frozen"]
    )


def test_on_the_command_line() -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(MODEL), "--prunable"], catch_exceptions=False).output
    assert "read by" in shown and "blocks.2/conv1" in shown
    as_json = CliRunner().invoke(cli, ["inspect", str(MODEL), "--prunable", "--json"], catch_exceptions=False).output
    assert 32 in [row["units"] for row in json.loads(as_json)["groups"]]
