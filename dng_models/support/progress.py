"""Progress and remaining time of a long computation: a bar in a terminal, lines elsewhere.

Figures, benchmarks and experiments use it.  Where standard error is a terminal and tqdm is
installed, it shows tqdm's bar.  In a log, where a bar would be one endless line, it prints a line
every half minute.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

FIRST_LINE, NEXT_LINES = 10.0, 30.0  # seconds from the start, and from one line to the next
ENOUGH = 1.0  # seconds: what takes longer is not tried at a larger size
PATIENCE = 1.0  # seconds that a compilation may take without a message
COMPILING = "compiling dng_math, once on this machine: about 20 seconds"

_T = TypeVar("_T")

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Set whether progress is shown by default in this block; outside of it, it is not.

    Command lines, which know ``--quiet``, put it around code that does not.
    """
    before = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(before)


def is_shown() -> bool:
    """Whether progress is shown by default here, as :func:`showing` has set it."""
    return _shown.get()


def clock(seconds: float) -> str:
    """A duration as ``0:05``, ``12:30`` or ``1:02:03``."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Progress of a computation: a context manager with the part of tqdm's interface used here.

    Parameters
    ----------
    total : int, optional
        Number of units; without it no remaining time is shown.
    desc : str, optional
        What is being done.
    unit : str
        What is counted, in the singular.
    initial : int
        Units that an earlier run has done already.
    shown : bool, optional
        Whether to show it; default as :func:`showing` has set it, else no.
    leave : bool
        Whether the finished bar stays in the terminal, or gets its own line in a log; False for
        progress inside other progress.
    """

    def __init__(
        self,
        total: int | None = None,
        desc: str | None = None,
        *,
        unit: str = "step",
        initial: int = 0,
        shown: bool | None = None,
        leave: bool = True,
    ) -> None:
        self.total, self.desc, self.unit = total, desc or "", unit
        self.n = self.initial = initial
        self.leave = leave
        self._postfix = ""
        self._started = time.monotonic()
        self._due, self._said = self._started + FIRST_LINE, -1
        self._bar: Any = None
        self._open = _shown.get() if shown is None else shown
        if self._open and sys.stderr.isatty():
            self._bar = _tqdm(
                total=total, desc=desc, unit=unit, initial=initial, leave=leave, dynamic_ncols=True
            )

    def update(self, n: int = 1) -> None:
        """Add n finished units."""
        self.n += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._open and time.monotonic() >= self._due and (self.leave or self.n != self.total):
            self._say()

    def set_description(self, desc: str) -> None:
        """Change what is shown as being done."""
        self.desc = desc
        if self._bar is not None:
            self._bar.set_description(desc)

    def set_postfix(self, **values: str) -> None:
        """Set the values that are shown after the times."""
        self._postfix = ", ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix(**values)

    def close(self) -> None:
        """End the bar, or print the last line, whether all units are done or not."""
        if self._bar is not None:
            self._bar.close()
        elif self._open and self.leave and self.n != self._said:
            self._say()
        self._open = False

    def over(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items, one unit each, and close after the last."""
        with self:
            for item in items:
                yield item
                self.update()

    def _say(self) -> None:
        self._due, self._said = time.monotonic() + NEXT_LINES, self.n
        print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """A log line: ``training base: 300/6000 steps, 0:27 gone, 8:33 left, loss 0.1``."""
        gone = time.monotonic() - self._started
        count = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
        units = self.unit if (self.total or self.n) == 1 else _plural(self.unit)
        parts = [f"{count} {units}", f"{clock(gone)} gone"]
        done = self.n - self.initial
        if self.total is not None and 0 < done and self.n < self.total:
            parts.append(f"{clock(gone * (self.total - self.n) / done)} left")
        if self._postfix:
            parts.append(self._postfix)
        return f"{self.desc}: {', '.join(parts)}" if self.desc else ", ".join(parts)

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; after an exception no last line is printed to a log."""
        if kind is not None and self._bar is None:
            self._open = False
        self.close()


def progress_bar(
    items: Iterable[_T],
    desc: str | None = None,
    *,
    total: int | None = None,
    unit: str = "step",
    shown: bool | None = None,
    leave: bool = True,
) -> Iterator[_T]:
    """Yield the items and show progress, one unit for each item.

    ``total`` is by default the length of ``items``, if it has one; the other parameters are those
    of :class:`Progress`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    return Progress(total, desc, unit=unit, shown=shown, leave=leave).over(items)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a whole line, above the bars of a terminal if there are any."""
    file = sys.stdout if file is None else file
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and sys.stderr.isatty():
        tqdm.tqdm.write(line, file=file)
    else:
        print(line, file=file, flush=True)


def seconds_of(work: Callable[[], object], enough: float = 0.5) -> float:
    """Time a call, in seconds: the median of several calls after the first.

    The call is repeated until ``enough`` seconds have passed, at least twice; if the first call
    alone takes longer than that, its time is returned.
    """
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < enough:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
        if taken[0] > enough:
            return taken[0]
    return statistics.median(taken[1:])


def seconds_at(size: int, seconds: Callable[[int], float]) -> float:
    """Estimate the seconds that work of a given size takes, by trying smaller sizes.

    Sizes are tried from 2 on, each four times the one before, until one takes more than a second
    or is the size itself.  From the last one the time is extrapolated in proportion to the size.

    Parameters
    ----------
    size : int
        At least 1.
    seconds : callable
        ``seconds(size)``: the time at a size, for example measured with :func:`seconds_of`.

    Returns
    -------
    float
        Seconds.
    """
    tried = min(size, 2)
    while True:
        taken = seconds(tried)
        if tried == size or taken > ENOUGH:
            return taken * size / tried
        tried = min(4 * tried, size)


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith(("ch", "s", "x")) else f"{unit}s"


def _tqdm(**options: Any) -> Any:
    """A tqdm bar; None where tqdm is not installed, so that lines are printed instead."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(**options)


# ---------------------------------------------------------------------- compilation


@contextmanager
def saying_what_compiles(shown: bool = True) -> Iterator[None]:
    """Print a message when Numba compiles in this block, as on the first use on a machine.

    The message comes once, on standard error, when a compilation takes more than a second.
    Loading from Numba's cache on the disk prints nothing.
    """
    if not shown:
        yield
        return
    from numba.core import event

    timers: list[threading.Timer] = []
    depth = 0

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: object) -> None:
            nonlocal depth
            depth += 1  # a function compiles those that it calls
            if depth == 1 and not any(timer.finished.is_set() for timer in timers):
                timers.append(threading.Timer(PATIENCE, say, (COMPILING, sys.stderr)))
                timers[-1].daemon = True
                timers[-1].start()

        def on_end(self, event: object) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0 and timers and timers[-1].is_alive():
                timers.pop().cancel()

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
        for timer in timers:
            timer.cancel()
