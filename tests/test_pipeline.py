"""The textual pipeline, its completion, and the runner that undoes what fails."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxslim import model as model_io
from onnxslim import pipeline
from onnxslim.contract import Context, Effect, Missed, Outcome, Pass
from onnxslim.data import Data
from onnxslim.errors import CheckError, DataError, UsageError


@dataclasses.dataclass(frozen=True)
class Options(Pass):
    name: ClassVar[str] = "options"
    effect: ClassVar[Effect] = Effect.EXACT

    count: int = 3
    ratio: float = 0.5
    limit: float | None = None
    fast: bool = True
    word: str = "x"
    names: tuple[str, ...] = ("a",)
    sizes: tuple[int, ...] = ()
    mode: Literal["slow", "quick"] = "slow"
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        return Outcome()


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "find", lambda name: Options)


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)


@given(
    st.builds(
        Options,
        count=st.integers(),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        fast=st.booleans(),
        word=_TEXT.filter(lambda text: "\0" not in text),
        names=st.lists(_TEXT.filter(lambda text: "\0" not in text), max_size=3).map(tuple),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        mode=st.sampled_from(["slow", "quick"]),
        shares=st.dictionaries(
            _TEXT.filter(lambda text: "\0" not in text), st.floats(allow_nan=False, allow_infinity=False), max_size=3
        ),
    )
)
@example(Options(word="\\'\"(", shares={"'\"\\": 0.5}))
def test_text_of_a_pass_reads_back_as_the_same_pass(item: Options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "find", lambda name: Options)
        assert pipeline.parse(f"{item},{item}") == [item, item]


@pytest.mark.usefixtures("options")
def test_literals_have_the_type_of_the_option() -> None:
    (item,) = pipeline.parse(
        "options(ratio=1, limit=none, fast=false, word=conv, names=[a, 'b c'], sizes=4, mode=quick, "
        "shares={a: 1, 'b c': 0.5})"
    )
    assert item == Options(
        ratio=1.0,
        limit=None,
        fast=False,
        word="conv",
        names=("a", "b c"),
        sizes=(4,),
        mode="quick",
        shares={"a": 1.0, "b c": 0.5},
    )
    assert isinstance(item, Options)
    assert isinstance(item.ratio, float)


@pytest.mark.usefixtures("options")
@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "options,",
        "options(",
        "options)",
        "options(count=)",
        "options(3)",
        "options(*[1])",
        "options(**{})",
        "options(count=1, count=2)",
        "options(count=1)(count=2)",
        "options(count=1) + (1)",
        "options(count=1.5)",
        "options(count=true)",
        "options(ratio=high)",
        "options(ratio=1e999)",
        "options(fast=1)",
        "options(names=[1])",
        "options(mode=fastest)",
        "options(word=open('x'))",
        "options(word=__import__('os').getcwd())",
        "options(unknown=1)",
        "op tions",
        "options(word='a)",
        "options(word=\0)",
        "options(shares=[1])",
        "options(shares={a: b})",
        "options(shares={1: 0.5})",
        "options(shares={a: 1, a: 2})",
        "options(shares={{}: 1})",
        "options(shares={**{}})",
        "options(shares={a: 1e999})",
    ],
)
def test_malformed_texts_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        pipeline.parse(text)


@pytest.mark.usefixtures("options")
def test_a_misspelt_option_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'ratio'"):
        pipeline.parse("options(ration=0.5)")


def test_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown pass 'prunne'.*did you mean 'prune'"):
        pipeline.parse("prunne")


def _entries(monkeypatch: pytest.MonkeyPatch, *entries: importlib.metadata.EntryPoint) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    pipeline.registry.cache_clear()


@pytest.fixture
def clean_registry() -> Any:
    yield
    pipeline.registry.cache_clear()


def _entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, pipeline.GROUP)


@pytest.mark.usefixtures("clean_registry")
def test_two_packages_with_one_pass_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _entries(monkeypatch, _entry("prune", "a:Prune"), _entry("prune", "b:Prune"))
    with pytest.raises(UsageError, match=r"a:Prune and b:Prune"):
        pipeline.registry()


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("value", ["no_such_module:Pass", "onnxslim.contract:Nothing", "onnxslim.contract:Effect"])
def test_a_broken_plugin_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    _entries(monkeypatch, _entry("odd", value))
    with pytest.raises(UsageError, match="odd"):
        pipeline.find("odd")


def test_complete_inserts_what_is_wanted_once(passes: dict[str, Any]) -> None:
    names = [p.name for p in pipeline.complete(pipeline.parse("scale,scale(by=0.5)"))]
    assert names == ["keep", "scale", "scale"]


def test_complete_leaves_what_the_user_wrote(passes: dict[str, Any]) -> None:
    chosen = pipeline.parse("keep(level=2),scale")
    assert pipeline.complete(chosen) == chosen


def test_complete_refuses_a_pass_after_the_last(passes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="scale must come before last"):
        pipeline.complete(pipeline.parse("last,scale"))
    assert [p.name for p in pipeline.complete(pipeline.parse("scale,last"))] == ["keep", "scale", "last"]


def test_passes_that_want_each_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class One(Options):
        name: ClassVar[str] = "one"
        wants: ClassVar[tuple[str, ...]] = ("two",)

    class Two(Options):
        name: ClassVar[str] = "two"
        wants: ClassVar[tuple[str, ...]] = ("one",)

    monkeypatch.setattr(pipeline, "find", {"one": One, "two": Two}.__getitem__)
    assert [p.name for p in pipeline.complete([One()])] == ["two", "one"]


def test_complete_inserts_passes_with_the_options_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Options):
        name: ClassVar[str] = "wide"
        wants: ClassVar[tuple[str, ...]] = ("fuse(opset=0)",)

    found = pipeline.complete([Wide()])
    assert [str(p) for p in found] == ["simplify", "fold", "fuse(opset=0)", "wide"]
    assert [str(p) for p in pipeline.complete([*pipeline.parse("fuse(opset=17)"), Wide()])][2] == "fuse(opset=17)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prune", "simplify,fold,prune,fuse(opset=0)"),
        ("prune(lossless=true),prune", "simplify,fold,prune(lossless=true),prune,fuse(opset=0)"),
        ("prune,fp16", "simplify,fold,prune,fuse(opset=0),fp16"),
        ("prune,fuse,fp16", "simplify,fold,prune,fuse,fp16"),
        ("fuse,prune", "simplify,fold,fuse,prune"),
        ("prune,int8", "simplify,fold,prune,int8"),  # int8 fuses what it leaves in float
    ],
)
def test_complete_inserts_what_runs_behind_a_pass_once(text: str, expected: str) -> None:
    assert ",".join(str(p) for p in pipeline.complete(pipeline.parse(text))) == expected


def _context() -> Context:
    return Context(Data("nothing", 0, lambda k: {}, ()))


def _run(proto: onnx.ModelProto, text: str, check: Any = lambda *_: None) -> Any:
    model, errors = model_io.load(proto), []
    before = model_io.to_bytes(model)
    ctx = _context()
    result = pipeline.run(model, pipeline.parse(text), ctx, check, lambda *args: errors.append(args))
    assert model_io.to_bytes(model) == before, "the input model was changed"
    return (*result, ctx, errors)


def test_a_crash_is_undone_and_the_rest_runs(passes: dict[str, Any], proto: onnx.ModelProto) -> None:
    model, steps, ctx, errors = _run(proto, "keep,crash,keep")
    assert [step.error is None for step in steps] == [True, False, True]
    assert "ZeroDivisionError: on purpose" in (steps[1].error or "")
    assert [str(item) for _, item, _ in errors] == ["crash"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert any("crash was undone" in line for line in ctx.warnings)


def test_a_failed_check_is_undone(passes: dict[str, Any], proto: onnx.ModelProto) -> None:
    model, steps, _, errors = _run(proto, "lie,keep", lambda before, after, item: "no" if item.name == "lie" else None)
    assert steps[0].error == "no"
    assert steps[0].outcome.skipped[-1].reason == "undone: no"
    assert not errors
    assert model_io.to_bytes(model) == model_io.to_bytes(model_io.load(proto))


@pytest.mark.parametrize("kind", [UsageError, DataError])
def test_errors_of_the_user_are_not_swallowed(proto: onnx.ModelProto, kind: type[Exception]) -> None:
    def check(*_: Any) -> str | None:
        raise kind("yours")

    with pytest.raises(kind, match="yours"):
        pipeline.run(model_io.load(proto), [Options()], _context(), check, lambda *_: None)


def test_a_pass_that_finds_its_own_fault_is_undone(proto: onnx.ModelProto) -> None:
    class Honest(Options):
        def apply(self, model: ir.Model, ctx: Context) -> Outcome:
            raise CheckError("masked and pruned differ")

    crashes: list[Any] = []
    _, steps = pipeline.run(
        model_io.load(proto), [Honest()], _context(), lambda *_: None, lambda *args: crashes.append(args)
    )
    assert steps[0].error == "masked and pruned differ"
    assert not crashes


@dataclasses.dataclass(frozen=True)
class Loses(Options):
    """Loses what it may of an output, but no more than 0.2."""

    name: ClassVar[str] = "loses"
    effect: ClassVar[Effect] = Effect.LOSSY

    fidelity: float = 0.5

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        ctx.warnings.append(f"lost {1 - self.fidelity}")
        return Outcome({"fidelity": max(self.fidelity, 0.8)})


def _attempts(item: Pass, proto: onnx.ModelProto, check: Any) -> tuple[list[Pass], pipeline.Step, list[str]]:
    tried: list[Pass] = []

    def judged(before: ir.Model, after: ir.Model, item: Pass) -> str | None:
        tried.append(item)
        return check(item)

    ctx = _context()
    _, steps = pipeline.run(model_io.load(proto), [item], ctx, judged, lambda *_: None)
    return tried, steps[0], ctx.warnings


def test_what_overruns_the_budget_is_tried_more_carefully_from_what_it_lost(proto: onnx.ModelProto) -> None:
    tried, step, warnings = _attempts(Loses(), proto, lambda item: None if item.fidelity > 0.98 else Missed("too much"))
    assert [str(item) for item in tried] == ["loses", "loses(fidelity=0.95)", "loses(fidelity=0.9875)"]
    assert step.error is None
    assert step.item == tried[-1]
    assert [line.split(" overran")[0] for line in warnings[:2]] == ["loses", "loses(fidelity=0.95)"]
    assert warnings[2:] == [f"lost {1 - 0.9875}"], "what was said of the other attempts is no longer true"


def test_a_pass_that_no_care_helps_is_undone(proto: onnx.ModelProto) -> None:
    tried, step, warnings = _attempts(Loses(), proto, lambda item: Missed("too much"))
    assert len(tried) == pipeline.ATTEMPTS
    assert step.error == "too much"
    assert warnings[-1] == f"{tried[-1]} was undone: too much"


@pytest.mark.parametrize("item", [Options(), Loses(fidelity=1.0)], ids=["no option", "nothing lost"])
def test_what_cannot_be_more_careful_is_undone_at_once(proto: onnx.ModelProto, item: Pass) -> None:
    tried, step, _ = _attempts(item, proto, lambda item: Missed("too much"))
    assert tried == [item]
    assert step.error == "too much"


def test_a_broken_promise_is_not_tried_again(proto: onnx.ModelProto) -> None:
    tried, step, _ = _attempts(Loses(), proto, lambda item: "changes the outputs")
    assert len(tried) == 1
    assert step.error == "changes the outputs"


def test_strictest_is_the_weakest_promise(passes: dict[str, Any]) -> None:
    assert pipeline.strictest([]) is Effect.EXACT
    assert pipeline.strictest(pipeline.parse("keep")) is Effect.EXACT
    assert pipeline.strictest(pipeline.parse("lie,keep")) is Effect.ROUNDING
    assert pipeline.strictest(pipeline.parse("keep,scale,lie")) is Effect.LOSSY
