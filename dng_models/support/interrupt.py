"""Ctrl-C for a command line that must end at once: one line, exit code 130, no process left.

Python's KeyboardInterrupt in the main thread is not enough: compiled code delays it, a library's
callback may swallow it, and at exit Python waits for the threads of every pool.  So the exception
is raised first, which lets ``finally`` blocks clean up, and a second later the process is ended
whatever it is doing.
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
GRACE = 1.0  # seconds for closing and cleaning up


def end_at_interrupt(message: str = "interrupted") -> None:
    """Make Ctrl-C (SIGINT) end this process with status 130, and kill those that it started.

    Call it first in a ``__main__``, before slow imports; libraries should not call it.

    Parameters
    ----------
    message : str
        The line that is printed on standard error.

    Raises
    ------
    ValueError
        If it is not called from the main thread.
    """
    end = _Once(message)

    def on_interrupt(number: int, frame: object) -> NoReturn:
        # A second Ctrl-C must not disturb the clean-up, and errors during it must not be printed.
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
        # The C handler writes to the pipe even while the main thread runs compiled code.
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            pass
        time.sleep(GRACE)
        end()

    otherwise, sys.excepthook = sys.excepthook, on_error
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, on_interrupt)
    # While it shuts down, Python restores SIGINT's default effect, which would exit with -2.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="ends at Ctrl-C", daemon=True).start()


class _Once:
    """Ends the process; two threads may call it, and only the first one acts."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.lock = threading.Lock()

    def __call__(self) -> NoReturn:
        self.lock.acquire()  # never released: the second thread waits here until the end
        try:
            kill_descendants()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # the reader has gone or it is closed
                    stream.flush()
            # A progress bar may occupy the current line.
            start = "\n" if sys.stderr.isatty() else ""
            os.write(2, f"{start}{self.message}\n".encode())
        finally:
            os._exit(INTERRUPTED)


def kill_descendants() -> None:
    """Kill all processes that this one started, directly or through others."""
    children = _children()
    found, ahead = [], [os.getpid()]
    while ahead:
        own = children.get(ahead.pop(), [])
        found += own
        ahead += own
    for process in found:
        # The process may have ended by itself, or its id now belongs to another user.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _children() -> dict[int, list[int]]:
    """Ids of the child processes of every process, by its id."""
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
