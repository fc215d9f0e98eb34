"""Static 8-bit quantization for integer kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxslim import equalize, integer, qdq, runtime
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.data import Data
from onnxslim.graph import is_op, opset
from onnxslim.opset import NEWEST, raise_opset
from onnxslim.passes.int8 import accuracy, dynamic, speed
from onnxslim.passes.int8.lowering import (
    clip_bounded,
    convolve_normalizations,
    protect_captured,
    protect_pools,
    spell_out_axes,
)
from onnxslim.passes.int8.prepare import Prepared, forget_ranks, observe_ranks, survey
from onnxslim.passes.int8.remainder import Remainder
from onnxslim.profiles import PROFILES, REFUSED, Profile
from onnxslim.restoring import parts
from onnxslim.saturation import saturates_here
from onnxslim.sharing import deduplicate_initializers
from onnxslim.units import NEVER, PRODUCTS, Kind, find_units, is_finite, name_all_nodes

# Share of an output's variance that integer kernels may take where nobody said what int8 may cost.
NOISY = 0.02


@dataclasses.dataclass(frozen=True)
class Int8(Pass):
    """Runs convolutions and matrix products on 8-bit integers, where that is faster and accurate enough.

    Activations are stored as u8 with one scale per tensor, weights as s8 with one scale per output channel, as
    Q/DQ pairs that ONNX Runtime's CPU provider turns into integer kernels. Ranges come from the calibration data: one
    pass fills a histogram per tensor, and of the whole range, two percentiles and the range of least squared error the
    one is taken that disturbs the products behind it least. Before that, channels are centred and equalized across
    layers where this leaves the function as it is, and biases absorb the mean error of their layer afterwards.

    Layers, and what lies between them, go back to float until the outputs of held-out samples keep the fidelity asked
    for, and a metric its budget (``--max-drop``), and wherever int8 is measured slower. What is in float is fused, as
    by ``fuse``, before the two are compared; where no layer is on integers, as by ``fuse(opset=0)``.

    LSTM layers, and MatMul and Gemm in the body of a Loop or Scan, have no static ranges: for the CPU they get those
    that their inputs have at every inference, as by ``dynamic_int8``, where that is faster.

    Without calibration data no layer is stored: static ranges would be guesses. For the same reason what is in the
    branch of an If stays in float where no sample takes the branch.

    Options:
        fidelity: share of the variance of each output that must survive, measured on held-out samples (on all where
            there are fewer than 44): 1 minus squared error over variance, less its standard error. Where one output
            holds numbers of several kinds, as the boxes and scores of a detector, each kind may lose four times as
            much; where it is chosen, as a label is, what it is chosen by is judged. 0 turns the check off.
        measure: time the candidates and keep in int8 only what is faster. Without it the result does not depend on
            the machine it was made on, and every layer that can be int8 is.
        equalize: centre and equalize channels across layers first.
        per_channel: one weight scale per output channel instead of one per weight.
        keep: names of layers (nodes) that stay in float.
        samples: how many calibration samples are used at most.
        target: what the file is for: cpu, cpu-arm, openvino, tensorrt; none takes the target of the run. Each wants its
            pairs elsewhere, from the same calibration. What is not installed here is not measured.
        portable: also right on x86 CPUs without VNNI, whose kernels add two products in 16 bits: layers whose sums do
            not fit, as seen on the calibration data, get weights that are kept so small that every sum fits. None:
            where the kernels of this machine add so. Without it the report warns of these layers.
    """

    name: ClassVar[str] = "int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    does: ClassVar[Sequence[str]] = ("fuse",)
    needs_data: ClassVar[bool] = True
    last: ClassVar[bool] = True

    fidelity: float = 0.99
    measure: bool = True
    equalize: bool = True
    per_channel: bool = True
    keep: tuple[str, ...] = ()
    samples: int = 128
    target: Literal["cpu", "cpu-arm", "openvino", "cuda", "tensorrt"] | None = None
    portable: bool | None = None

    def __post_init__(self) -> None:
        self.require(0 <= self.fidelity < 1, f"fidelity={self.fidelity} must be at least 0 and below 1")
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        outcome = self._quantize(model, ctx)
        if not outcome.stats["int8_layers"]:  # all of it is the remainder
            fused = Remainder(model, ctx.calibration, ctx).model
            model.graph = fused.graph
        return outcome

    def _quantize(self, model: ir.Model, ctx: Context) -> Outcome:
        layers = _layers(model)
        target = self.target or ctx.target
        blocked = self._blocked(ctx, target)
        if blocked is not None or not layers:
            return _nothing(layers, dict.fromkeys(layers, blocked or ""))
        draft = model.clone()
        name_all_nodes(draft)
        guessed = observe_ranks(draft, ctx.calibration, ctx)
        reason = raise_opset(draft, 13) or qdq.missing_kernel(opset(draft))
        if reason is not None:
            return _nothing(layers, dict.fromkeys(layers, reason))
        protect_pools(draft)
        protect_captured(draft)
        spell_out_axes(draft)
        convolve_normalizations(draft)
        clip_bounded(draft)
        name_all_nodes(draft)  # those that came with the operator set
        layers = _layers(draft)
        ctx.warnings += [f"int8: no layer is called {name!r} (keep)" for name in self.keep if name not in layers]
        fitting, held_out = parts(ctx.calibration.spread(self.samples))
        profile = PROFILES[target]
        timed = self.measure and _can_be_timed(profile, ctx)
        portable = saturates_here() if self.portable is None else self.portable
        plain = draft.clone()
        without = [n for n in find_units(draft)[1] if n not in self.keep] if profile.here else []
        ranged = dynamic.quantize(
            draft, without, held_out, ctx, fidelity=self.fidelity, measure=timed, portable=portable
        )
        exact = plain if ranged.names else None
        units, reasons = find_units(draft)
        reasons |= ranged.reasons | {n: "asked to stay in float" for n in self.keep if n in layers}
        products = {n: u for n, u in units.items() if u.kind is Kind.PRODUCT}
        infinite = [n for n, u in products.items() if not is_finite(u)]
        reasons |= dict.fromkeys(infinite, "its weight or bias is not finite")
        wanted = [n for n in products if n not in reasons]
        if not wanted and not ranged.names:
            return _nothing(layers, reasons)
        changed = equalize.equalize(draft, fitting.spread(32), ctx) if self.equalize and wanted and not infinite else {}
        ready = survey(draft, wanted, fitting, ctx, per_channel=self.per_channel, profile=profile, portable=portable)
        ready.guessed = frozenset(guessed)
        for name in (n for n in wanted if n not in ready.products):
            inside = units[name].node.graph is not draft.graph
            reasons[name] = "its input or result had no finite value" + (
                ": no sample takes the branch it is in" if inside else ""
            )
        remainder = Remainder(draft, held_out, ctx, NEWEST if profile.around else 0)
        figures: dict[str, Any] = {"fidelity": ranged.fidelity, "dynamic_speedup": ranged.speeds} if exact else {}
        ready, found = self._search(draft, ready, held_out, remainder, ctx, reasons, timed, exact)
        figures |= found
        chosen = [*ready.products, *ranged.names]
        if not chosen:
            return _nothing(layers, reasons, figures)
        qdq.insert(draft, ready.plan(ready.choose(ready.products)))
        remainder.fuse(draft)
        deduplicate_initializers(draft)  # a weight that several layers read has been stored for each of them
        forget_ranks(draft, set(guessed))
        figures |= self._saturation(ready, ctx)
        total = sum(ready.macs.get(n, 0) for n in layers)
        stats: dict[str, Any] = {
            "layers": len(layers),
            "int8_layers": len(chosen),
            "dynamic": ranged.names,
            "int8_macs_fraction": round(sum(ready.macs.get(n, 0) for n in chosen) / max(total, 1), 4),
            "ranges": ready.methods,
            "restored": [n for n in wanted if n not in chosen],
        }
        if profile.here:
            proof = integer.prove(draft, ctx.calibration.feed(ctx.calibration[0]), threads=ctx.threads)
            blocked_layers = {x.name: f"stays in float: {x.reason}" for x in proof.layers if not x.kernel}
            reasons.update({n: reason for n, reason in blocked_layers.items() if n in chosen})
            stats |= {"integer_macs_fraction": round(proof.fraction, 4), "integer_kernels": proof.kernels}
            wide = [n for n in figures["saturating"] if n not in figures["narrowed"]]
            stats["kernel_noise"] = self._kernel_noise(draft, held_out, wide, ctx)
        model.graph = draft.graph
        model.ir_version = draft.ir_version
        return Outcome(stats | changed | figures, _skips(reasons))

    def _saturation(self, ready: Prepared, ctx: Context) -> dict[str, Any]:
        """What CPUs without VNNI would make of the products; a warning where that is something else."""
        saturating = [n for n in ready.saturating if n in ready.products]
        if saturating and not ready.narrow:
            ctx.warnings.append(
                f"int8: on x86 CPUs without VNNI the sums of {len(saturating)} layers would saturate (first: "
                f"{saturating[0]}); int8(portable=true) is right there too"
            )
        return {"saturating": saturating, "narrowed": [n for n in ready.narrow if n in ready.products]}

    def _kernel_noise(self, model: ir.Model, held_out: Data, wide: Sequence[str], ctx: Context) -> float:
        """Noise that integer kernels add to what the file says; a warning where it is more than all of int8 may cost.

        Fidelity was judged in exact arithmetic. ``wide`` are layers whose sums may saturate: not those that were
        narrowed.
        """
        lost = accuracy.kernel_noise(model, held_out, ctx)
        if lost > (1 - self.fidelity if self.fidelity else NOISY):
            why = (
                f", where the sums of {len(wide)} layers saturate; int8(portable=true) keeps them small"
                if wide and saturates_here()
                else ""
            )
            ctx.warnings.append(
                f"int8: fidelity does not tell what the integer kernels of this machine do: they take {lost:.1%} of an "
                f"output's variance beyond what the file says{why}"
            )
        return round(lost, 5)

    def _blocked(self, ctx: Context, target: str) -> str | None:
        """Why nothing can be done at all."""
        if ctx.synthetic:
            return "no calibration data: static ranges would be guesses"
        return REFUSED.get(target)

    def _search(
        self,
        model: ir.Model,
        ready: Prepared,
        held_out: Data,
        remainder: Remainder,
        ctx: Context,
        reasons: dict[str, str],
        timed: bool,
        exact: ir.Model | None,
    ) -> tuple[Prepared, dict[str, Any]]:
        """What stays on integers; adds the other products to ``reasons``. ``exact``: see `accuracy.restore`."""
        if not ready.products:
            return ready, {}
        ready, found, lost = accuracy.restore(model, ready, held_out, ctx, self.fidelity, exact)
        reasons.update(found)
        if not ready.products:
            return ready, {}
        figures: dict[str, Any] = {"fidelity": round(1 - lost, 5)}
        if timed:
            feeds = list(held_out.spread(4).feeds())
            fast = speed.search(model, ready, feeds, remainder, ctx)
            ready = dataclasses.replace(ready, products=fast.products)
            reasons.update(fast.reasons)
            figures["speedup"] = {name: round(value, 3) for name, value in fast.speeds.items()}
        return ready, figures


def _can_be_timed(profile: Profile, ctx: Context) -> bool:
    """Whether the execution provider of ``profile`` runs here; a warning where it does not."""
    if profile.here or (profile.ep != "cpu" and profile.ep in runtime.PROVIDERS and runtime.available(profile.ep)):
        return True
    ctx.warnings.append(f"int8: {profile.name} does not run here: whether it is faster was not measured")
    return False


def _layers(model: ir.Model) -> list[str]:
    """Names of the nodes that multiply matrices, in subgraphs too."""
    return [n.name or n.op_type for n in model.graph.all_nodes() if is_op(n, *PRODUCTS, *NEVER)]


def _nothing(layers: list[str], reasons: dict[str, str], figures: dict[str, Any] | None = None) -> Outcome:
    stats: dict[str, Any] = {"layers": len(layers), "int8_layers": 0, "int8_macs_fraction": 0.0, "restored": []}
    return Outcome(stats | (figures or {}), _skips(reasons))


def _skips(reasons: dict[str, str]) -> list[Skip]:
    return [Skip(name, reason) for name, reason in reasons.items()]
