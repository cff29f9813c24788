"""Ctrl-C for a command line that must end at once: one line, exit code 130, no process left.

Python's own way, an exception in the main thread, is not enough where compiled code runs (it is
raised when that returns), where a library's callback swallows it, and at the end of the process,
which waits for the threads of every pool.  So it comes first, for everything that must be closed
and removed, and after a second the process ends whatever it is doing.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130
GRACE = 1.0  # seconds for what must be closed
POLL = 0.05


def end_at_interrupt(message: str = "interrupted") -> None:
    """From now on Ctrl-C (SIGINT) ends this process, and those that it started, with 130.

    For the first line of a ``__main__``, before what takes seconds to import; not for libraries.
    Only the main thread can call it.

    Parameters
    ----------
    message : str
        The line on standard error.
    """
    end = _Once(message)

    def on_interrupt(number: int, frame: object) -> NoReturn:
        # Once is enough, and nothing that goes on meanwhile is of interest.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.unraisablehook = lambda unraisable: None
        threading.excepthook = lambda arguments: None
        raise KeyboardInterrupt

    def on_error(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            end()
        otherwise(kind, error, traceback)

    def watch() -> None:
        # The signal is written to the pipe by C, also while the main thread runs compiled code.
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            pass
        time.sleep(GRACE)
        end()

    otherwise, sys.excepthook = sys.excepthook, on_error
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, on_interrupt)
    # Python gives signals their own effect, and so the exit code -2, while it takes itself down.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="ends at Ctrl-C", daemon=True).start()


class _Once:
    """The end of the process, which two threads may come to."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.lock = threading.Lock()

    def __call__(self) -> NoReturn:
        self.lock.acquire()  # never released: whoever comes second waits for the end
        try:
            kill_descendants()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()
            # Away from the line that a bar stands in.
            start = "\n" if sys.stderr.isatty() else ""
            os.write(2, f"{start}{self.message}\n".encode())
        finally:
            os._exit(INTERRUPTED)


def kill_descendants() -> None:
    """End the processes that this one started, and those that they did."""
    children = _children()
    found, ahead = [], [os.getpid()]
    while ahead:
        own = children.get(ahead.pop(), [])
        found += own
        ahead += own
    for process in found:
        # It may have ended by itself, or have become another user's.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _children() -> dict[int, list[int]]:
    """Which processes each process has started."""
    pairs: list[tuple[int, int]] = []
    try:
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                        fields = file.read().rpartition(")")[2].split()
                except OSError:  # it has ended meanwhile
                    continue
                pairs.append((int(fields[1]), int(name)))
    except FileNotFoundError:  # not Linux
        pairs = _listed_by_ps()
    children: dict[int, list[int]] = {}
    for parent, process in pairs:
        children.setdefault(parent, []).append(process)
    return children


def _listed_by_ps() -> list[tuple[int, int]]:
    try:
        command = ["ps", "-A", "-o", "ppid=,pid="]
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GRACE)
    except (OSError, subprocess.SubprocessError):
        return []
    rows: Any = (line.split() for line in run.stdout.splitlines())
    return [(int(parent), int(process)) for parent, process in rows]
