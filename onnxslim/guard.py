"""An error message for what ends a process from outside Python.

ONNX Runtime crashes on some valid models, and the system ends what takes more memory than there is. Neither can be
caught, so the command line works in a child process and its parent says what became of it. Linux only, where a child
can be made to end with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shlex
import signal
import sys
import types
from collections.abc import Callable

from onnxslim.console import message

# Exit codes where the process ends while something that was given is at work, and while something of ours is.
GIVEN, OURS = 2, 123
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL} | {getattr(signal, "SIGBUS", signal.SIGSEGV)}
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP) if sys.platform == "linux" else ()
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_SIZE = 4096
_GRACE = 10  # seconds that a process has to end in good order

# Exit code and text of what is at work, shared by the two processes.
_board: mmap.mmap | None = None


def doing(text: str, code: int) -> None:
    """Note what is at work, and the exit code should the process end with it."""
    if _board is not None:
        _board[:] = f"{code} {text}".encode(errors="replace")[: _SIZE - 1].ljust(_SIZE, b"\0")


def apart(work: Callable[[], int]) -> int:
    """What ``work`` returns, in a child process; where that is ended by a signal, one message and the code noted last.

    To be called before anything starts threads, which a child does not have.
    """
    global _board
    if sys.platform != "linux":
        return work()
    _board = mmap.mmap(-1, _SIZE)
    doing(shlex.join(sys.argv[1:]), GIVEN)
    parent = os.getpid()
    heeded = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # unlike with nohup
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)  # until both can answer
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
        for number in heeded:
            signal.signal(number, _leave)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.exit(work())
    told: list[int] = []

    def end(number: int, _: types.FrameType | None) -> None:
        # Native code does not listen: the child has some time, and none when it is told again.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if told else number)
        told.append(number)
        signal.alarm(_GRACE)

    # A terminal sends an interrupt to both, and the child says so.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    before |= {number: signal.signal(number, end) for number in (*heeded, signal.SIGALRM)}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0 and told:
        return 128 + told[0]
    return code if code >= 0 else _ended(signal.Signals(-code))


def also(work: Callable[[], int]) -> int:
    """`apart` for one of many parts of what is guarded already, so that the others go on; else just ``work``."""
    return work() if _board is None else apart(work)


def was_told(code: int) -> bool:
    """Whether the exit code is that of a process that somebody told to end."""
    return code - 128 in (signal.SIGINT, *_PASSED_ON)


def _leave(number: int, _: types.FrameType | None) -> None:
    """End in good order, so that temporary files go."""
    raise SystemExit(128 + number)


def _ended(number: signal.Signals) -> int:
    assert _board is not None
    code, _, text = _board[:].rstrip(b"\0").decode(errors="replace").partition(" ")
    if number in _CRASHES:
        message(
            f"onnxslim: {text}: native code crashed ({signal.strsignal(number)}) and nothing was written; ONNX Runtime "
            "may do that on valid models, and another version of it may not"
        )
        return int(code)
    if number == signal.SIGKILL:
        message(f"onnxslim: {text}: the process was killed and nothing was written; was there memory enough?")
    return 128 + number
