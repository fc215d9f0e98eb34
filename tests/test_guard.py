"""`guard`: what ends the process from outside Python becomes a message and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxslim import guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no guard elsewhere")

START = "import os, signal, sys, time\nfrom onnxslim import guard\n"


def start(body: str, first: str = "") -> subprocess.Popen[str]:
    """A guarded process that does ``body``; its parent does ``first``."""
    code = f"{START}{first}\ndef work():\n    {body}\nsys.exit(guard.apart(work))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(body: str) -> tuple[int, str]:
    process = start(body)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("code", [0, 1, 2, 123])
def test_an_exit_code_is_passed_on(code: int) -> None:
    assert ended(f"return {code}") == (code, "")
    assert ended(f"sys.exit({code})") == (code, "")


@pytest.mark.parametrize("code", [guard.GIVEN, guard.OURS])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_says_what_was_at_work(number: signal.Signals, code: int) -> None:
    body = f"guard.doing('a.onnx', {code}); os.kill(os.getpid(), {int(number)})"
    returned, errors = ended(body)
    assert returned == code
    assert errors.startswith("onnxslim: a.onnx: native code crashed") and errors.count("\n") == 1


def test_a_kill_says_so() -> None:
    returned, errors = ended("guard.doing('a.onnx', 2); os.kill(os.getpid(), signal.SIGKILL)")
    assert returned == 128 + signal.SIGKILL
    assert errors.startswith("onnxslim: a.onnx: the process was killed")


def test_the_output_of_the_child_is_complete() -> None:
    process = start("print('x' * 100000); return 0")
    assert process.communicate(timeout=60)[0] == "x" * 100000 + "\n"


def _child(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def _gone(pid: int) -> bool:
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_with_its_parent(number: signal.Signals) -> None:
    process = start("print(os.getpid(), flush=True); time.sleep(60); return 0")
    child = _child(process)
    process.send_signal(number)
    process.wait(30)
    assert process.returncode in (-number, 128 + number)
    assert _gone(child)


def test_told_to_end_it_removes_temporary_files(tmp_path: Path) -> None:
    body = f"import tempfile; t = tempfile.TemporaryDirectory(dir={str(tmp_path)!r}); "
    process = start(body + "t.__enter__(); print(os.getpid(), flush=True); time.sleep(60); return 0")
    _child(process)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_what_is_ignored_stays_ignored() -> None:
    process = start(
        "print(os.getpid(), flush=True); time.sleep(1); return 7", first="signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    child = _child(process)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGHUP)
    assert process.wait(30) == 7


@pytest.mark.parametrize("again", [True, False])
def test_one_that_does_not_listen_is_ended(again: bool) -> None:
    process = start(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
        "print(os.getpid(), flush=True); time.sleep(60); return 0",
        first=f"guard._GRACE = {60 if again else 1}",
    )
    child = _child(process)
    process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert _gone(child)


def test_parts_are_guarded_only_where_the_whole_is() -> None:
    here = os.getpid()
    assert guard.also(lambda: int(os.getpid() == here)) == 1
    body = "here = os.getpid(); return guard.also(lambda: 5 if os.getpid() != here else 6)"
    assert ended(body) == (5, "")
    body = "return 3 if guard.also(lambda: os.kill(os.getpid(), signal.SIGSEGV)) == 2 else 4"
    assert ended(body)[0] == 3


@pytest.mark.parametrize(
    ("owner", "name", "what", "code"),
    [
        ("from onnxslim.passes.fold import Fold as owner", "apply", "the pass fold", guard.OURS),
        ("from onnxslim import model as owner", "load", "{model}", guard.GIVEN),
    ],
)
def test_the_command_line_names_what_crashed(
    tiny: Path, tmp_path: Path, owner: str, name: str, what: str, code: int
) -> None:
    body = f"import os\nfrom onnxslim import cli\n{owner}\nowner.{name} = lambda *_, **__: os.abort()\ncli.entry()"
    command = [sys.executable, "-c", body, str(tiny), str(tmp_path / "out.onnx"), "--no-bench"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(f"onnxslim: {what.format(model=tiny)}: native code crashed")
    assert not (tmp_path / "out.onnx").exists()
