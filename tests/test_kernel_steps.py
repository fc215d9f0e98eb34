from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnxslim import kernel_steps


def _timer(step: int, noise: float = 0.0, seed: int = 0, rounds: int = 40) -> kernel_steps.Timer:
    """Kernels that work on ``step`` channels at a time; whole rounds are slowed down, and single passes."""

    def timer(widths: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        exact = np.ceil(np.array(widths) / step) ** 2
        loads = 1 + 5 * noise * rng.exponential(size=(rounds, 1))
        return np.asarray(exact * loads * (1 + noise * rng.exponential(size=(rounds, len(widths)))))

    return timer


@pytest.mark.parametrize("step", kernel_steps.STEPS)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_step_of_the_kernels_is_found(step: int, noise: float) -> None:
    assert kernel_steps.smallest(_timer(step, noise)) == step


@pytest.mark.parametrize("seed", range(5))
def test_heavy_noise_never_gives_a_step_that_is_too_fine(seed: int) -> None:
    assert kernel_steps.smallest(_timer(16, 0.3, seed)) in (16, 32, kernel_steps.FALLBACK)


@pytest.mark.parametrize("seed", range(5))
def test_times_that_do_not_depend_on_the_width_say_nothing(seed: int) -> None:
    def timer(widths: Sequence[int]) -> np.ndarray:
        return np.random.default_rng(seed).uniform(0.5, 1.5, (40, len(widths)))

    assert kernel_steps.smallest(timer) == kernel_steps.FALLBACK


def test_a_width_off_the_step_that_is_slower_than_the_whole_does_not_pay() -> None:
    def timer(widths: Sequence[int]) -> np.ndarray:
        return np.array([[np.ceil(w / 16) ** 2 * (1.0 if w % 16 == 0 else 1.2) for w in widths]] * 8)

    assert kernel_steps.smallest(timer) == 16


def test_this_machine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_steps.here.cache_clear()
    monkeypatch.setattr(kernel_steps, "SECONDS", 0.05)
    assert kernel_steps.here() in kernel_steps.STEPS

    def never(timer: kernel_steps.Timer) -> int:
        raise AssertionError("timed twice")

    monkeypatch.setattr(kernel_steps, "smallest", never)
    assert kernel_steps.here() in kernel_steps.STEPS
    kernel_steps.here.cache_clear()
