"""What a removal means to the outputs: the same, wherever the model is cut, as in the model with it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxslim import coupling, frontier, runtime
from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.passes.prune import measure

sys.path.insert(0, str(Path(__file__).parents[2]))
from coupled_graphs import CASES, Case

NAMES = ("residual", "squeeze_excite", "attention", "grouped_queries", "shared_weight", "lstm_input", "dense_block")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda case: case.name)
def test_errors_are_those_of_the_whole_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(case.build())
    samples = data_io.synthetic(model, 6, seed=0)
    ctx = Context(calibration=samples, threads=1)
    coupled = coupling.analyze(model, samples.feed(samples[0]), threads=1)
    fit, held_out = samples.split(0.4)
    measured = measure.factors(coupled, coupled.families, fit, held_out, ctx)
    removals = [f.atoms[: len(f.atoms) // 2] for f in coupled.families] + [np.zeros(0, np.int64)]
    removals.append(np.concatenate(removals))
    runner = runtime.load(coupled.model, threads=1)
    whole = [runtime.run(runner, feed) for feed in held_out.feeds()]

    def without(atoms: np.ndarray) -> float:
        gone = coupled.removed(atoms)
        trial = coupled.model.clone()
        coupling.mask(trial, coupled.sites, gone)
        for site, factor in measured.items():
            if factor.layer is not None and gone(site.labels).any():
                measure.compensate(trial, factor, gone(site.labels))
        runner = runtime.load(trial, threads=1)
        got = [runtime.run(runner, feed) for feed in held_out.feeds()]
        return float(np.mean([measure.output_error(a, b) for a, b in zip(whole, got, strict=True)]))

    wanted = [without(atoms) for atoms in removals]
    assert max(wanted) > 1e-4
    for limit in (frontier.LIMIT, 0):
        monkeypatch.setattr(frontier, "LIMIT", limit)
        found = measure.sensitivity(coupled, measured, removals, held_out, ctx)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-9)
