"""What a pass is: its options, its promise, and what it may use while it runs.

A pass is a frozen dataclass. Its fields are its options (literals only), ``name`` is what the user types, its docstring
is what ``onnxslim passes NAME`` prints. The runner (`onnxslim.pipeline`) clones the model, calls ``apply`` on the
clone, checks the promise and throws the clone away when the promise is broken.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from onnxslim.data import Data
from onnxslim.errors import UsageError

T = TypeVar("T")


class Effect(enum.Enum):
    """What a pass promises about the outputs of the model.

    EXACT: the same outputs, bit for bit or within 1 ulp. ROUNDING: the same function, rounded in another order.
    LOSSY: another function, close to the old one; the user's budget, or the reported fidelity, says how close.
    """

    EXACT = "exact"
    ROUNDING = "rounding"
    LOSSY = "lossy"


# What a pass may cost the outputs is divided by this in each attempt that is more careful than the one before.
CAREFUL = 4.0


class Missed(str):
    """By how much a pass overran the user's budget."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """A place where a pass did nothing, and why. ``node`` is a node, tensor or group name."""

    node: str
    reason: str


@dataclasses.dataclass
class Outcome:
    """What a pass did: counts and figures by name, and what it left alone."""

    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: list[Skip] = dataclasses.field(default_factory=list)


class Progress(Protocol):
    """Receives the progress of long loops; the default shows nothing."""

    def track(self, items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
        """Yield ``items`` unchanged, showing how many of ``total`` have passed."""
        ...


class NoProgress:
    """Shows nothing."""

    def track(self, items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
        """Yield ``items`` unchanged."""
        yield from items


@dataclasses.dataclass
class Context:
    """Everything a pass may use besides the model.

    Attributes:
        calibration: the user's samples, or generated ones when ``synthetic``.
        synthetic: True when nobody gave calibration data; a pass that would be guessing then does what is safe only.
        target: execution provider the result is meant for: ``cpu``, ``cuda`` or ``openvino``.
        threads: intra-operator threads of every ONNX Runtime session (0: the runtime's choice).
        rng: the only source of randomness, seeded by the user.
        warnings: lines for the top of the report.
    """

    calibration: Data
    synthetic: bool = False
    target: str = "cpu"
    threads: int = 0
    seed: int = 0
    progress: Progress = dataclasses.field(default_factory=NoProgress)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def rng(self) -> np.random.Generator:
        """A fresh generator with the user's seed: a pass draws the same numbers whatever ran before it."""
        return np.random.default_rng(self.seed)


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """Base class of all passes; subclasses are frozen dataclasses too.

    Class attributes:
        name: what the user types.
        effect: the promise, see `Effect`.
        wants: passes, as the user writes them, that should have run before; the pipeline inserts them when missing.
        then: passes that should run next; the pipeline inserts them unless the user named them anywhere.
        does: names of passes whose work it does itself, so that no other pass needs them behind it.
        needs_data: True when the pass reads ``ctx.calibration``.
        last: True when no pass that changes weights may follow (quantization).
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    wants: ClassVar[Sequence[str]] = ()
    then: ClassVar[str] = ""
    does: ClassVar[Sequence[str]] = ()
    needs_data: ClassVar[bool] = False
    last: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        """Change ``model`` in place and say what was done. Must leave a valid model, also when it does nothing."""

    @property
    def retypes(self) -> bool:
        """True when inputs and outputs of the model may get another float type; what is fed to it is converted."""
        return False

    @property
    def allowed(self) -> float | None:
        """Noise of the worst output (see `onnxslim.noise`) that the pass may cost; None where it has no limit."""
        fidelity = getattr(self, "fidelity", None)
        return 1 - fidelity if fidelity else None

    def careful(self, outcome: Outcome) -> Pass | None:
        """This pass, but changing less: tried where ``outcome`` overran the user's budget. None where it cannot.

        Where it has the option ``fidelity``, which is 1 minus what may be lost, this allows a part of what was lost.
        """
        found = max(getattr(self, "fidelity", 1.0), outcome.stats.get("fidelity", 0.0))
        options = {"fidelity": round(1 - (1 - found) / CAREFUL, 6)}
        return dataclasses.replace(self, **options) if found < 1 else None

    def require(self, condition: bool, message: str) -> None:
        """Raise `UsageError` naming this pass unless ``condition`` holds; for checks of options in __post_init__."""
        if not condition:
            raise UsageError(f"{self.name}: {message}")

    def __str__(self) -> str:
        """The textual form: name and the options that differ from their defaults; `pipeline.parse` reads it back."""
        options = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                options.append(f"{field.name}={literal(value)}")
        return f"{self.name}({', '.join(options)})" if options else self.name


def literal(value: Any) -> str:
    """An option value as text, in the form that `pipeline.parse` reads."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)
