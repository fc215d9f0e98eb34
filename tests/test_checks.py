"""What judging a pass leaves behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxslim
from onnxslim import pipeline, runtime
from onnxslim.contract import Context, Effect, Outcome, Pass

Maker = Callable[..., dict[str, np.ndarray]]


def test_no_session_waits_while_a_pass_works(
    tiny: Path, samples: Maker, passes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load(*args: Any, **options: Any) -> runtime.Runner:
        runner = runtime.load(*args[1:], **options)
        sessions.append(weakref.ref(runner.session))
        return runner

    class Count(Pass):
        name: ClassVar[str] = "count"
        effect: ClassVar[Effect] = Effect.LOSSY

        def apply(self, model: ir.Model, ctx: Context) -> Outcome:
            gc.collect()
            alive.append(sum(session() is not None for session in sessions))
            return Outcome({"counted": 1})

    monkeypatch.setattr(runtime, "load_lean", load)
    chosen = [*pipeline.parse("keep,lie(by=1.00001)"), Count(), Count()]
    result = onnxslim.optimize(tiny, chosen, calibration=samples(), bench=False)
    assert result.exit_code == 0
    assert alive == [0, 0]
    assert len(sessions) == 5  # the original and the result of each pass: the last one is measured as it is
