"""Interleaved timing, a description of the machine, and tables and CSVs of the results.

Contenders take turns (A, B, C, A, B, C, ...), so that a machine that slows down slows all of them.
A ratio is the median over the rounds of the ratio within a round.  The values of every contender
are checked before it is timed (:func:`check_close`).
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

import dng_math
from dng_math._jit import available_threads
from dng_models.support import files
from dng_models.support.progress import Progress

BASELINE = "dng_math"
PACKAGES = ("numpy", "scipy", "numba", "scikit-learn", "torch", "triton", "jax", "diffusers")
# Seconds.  Idle threads of a runtime spin for a while, and would take a core from the next
# contender.
PAUSE = 0.05
LEAST_ROUNDS = 3  # of a comparison that has no time left


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes
    ----------
    repeats : int
        Rounds of every comparison.
    quick : bool
        Small sizes, to test the code.
    deadline : float
        When to be done, on the clock of ``time.monotonic``.  A comparison takes LEAST_ROUNDS rounds
        in any case, and no more that begin later.
    keep : callable
        Takes the rows of every comparison as soon as they are there.
    known : frozenset of tuple
        Comparisons that an earlier run has made, by what :meth:`is_known` is asked.
    """

    repeats: int = 7
    quick: bool = False
    deadline: float = math.inf
    keep: Callable[[Sequence[Any]], None] = lambda rows: None
    known: frozenset[tuple[str, ...]] = frozenset()

    def share(self, left: int) -> Settings:
        """The settings of the next of the comparisons that are left, with its part of the time."""
        now = time.monotonic()
        return replace(self, deadline=now + max(0.0, self.deadline - now) / left)

    def is_known(self, *what: str) -> bool:
        """Whether an earlier run has measured this."""
        return what in self.known


@dataclass(frozen=True)
class Goal:
    """A bound on a contender's time: at least a multiple of the baseline's, or at most seconds."""

    text: str
    least_ratio: float = 0.0
    most_seconds: float = np.inf

    def reached(self, ratio: float, seconds: float) -> bool:
        return ratio >= self.least_ratio and seconds <= self.most_seconds

    def measured(self, ratio: float, seconds: float) -> str:
        """The measured value as text, in the unit of the goal."""
        if self.most_seconds < np.inf:
            return f"{seconds:.3g} s"
        return f"{ratio:.3g}x faster" if self.least_ratio >= 1 else f"{1 / ratio:.3g}x the time"


def nothing() -> None:
    """No warm-up."""


def wall(run: Callable[[], object]) -> float:
    """Seconds of wall time that a call takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Contender:
    """A function to time, in at most ``rounds`` rounds after one ``warm_up`` (default: ``run``).

    One ``run`` does the work ``calls`` times.  Times are compared with those of the contender
    named ``baseline``.
    """

    name: str
    run: Callable[[], object]
    warm_up: Callable[[], object] | None = None
    rounds: int | None = None
    goal: Goal | None = None
    note: str = ""
    calls: int = 1
    baseline: str = BASELINE
    clock: Callable[[Callable[[], object]], float] = wall


@dataclass(frozen=True)
class Row:
    """Result of one contender: a line of the table and, with the machine, of the CSV."""

    benchmark: str
    contender: str
    n: int
    steps: int | None = None
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    memory_mib: float | None = None
    ratio_to_dng_math: float | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


def verdict(reached: bool, settings: Settings) -> str:
    """Whether a goal was reached, as text; with ``quick`` sizes it is not judged."""
    return "not judged" if settings.quick else "reached" if reached else "missed"


def skipped(benchmark: str, contender: str, n: int, steps: int | None, reason: object) -> Row:
    """Row of a contender that cannot run here."""
    return Row(benchmark, contender, n, steps, note=f"skipped: {reason}")


def first_words(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    said = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {said}"[:160]


def check_close(what: str, actual: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """Raise unless |actual - expected| <= tolerance max(1, |expected|) everywhere."""
    wanted = np.asarray(expected)
    error = np.max(np.abs(actual - wanted) / np.maximum(1.0, np.abs(wanted)))
    if not error <= tolerance:
        raise RuntimeError(f"{what} is off by {error:.3g}, more than {tolerance:g}: not timed")


def interleaved(
    contenders: Sequence[Contender], repeats: int, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Seconds per call in every round, by contender; see :class:`Settings` for the deadline."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    turns = [
        [each for each in contenders if each.rounds is None or turn < each.rounds]
        for turn in range(repeats)
    ]
    count = len(contenders) + sum(map(len, turns))
    with Progress(count, unit="run", leave=False) as progress:
        for contender in contenders:
            progress.set_description(f"{contender.name}, warm-up")
            (contender.warm_up or contender.run)()
            progress.update()
        for turn, own in enumerate(turns):
            if turn >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            for contender in own:
                progress.set_description(contender.name)
                elapsed = contender.clock(contender.run)
                seconds[contender.name].append(elapsed / contender.calls)
                progress.update()
    return seconds


@dataclass(frozen=True)
class Timing:
    """Quartiles of the seconds per call, and the median ratio to the baseline's."""

    q25: float
    median: float
    q75: float
    ratio: float


def measure(
    contenders: Sequence[Contender], repeats: int, deadline: float = math.inf
) -> dict[str, Timing]:
    """Time the contenders in turns; ratios are NaN if the baseline is not among them."""
    seconds = interleaved(contenders, repeats, deadline)
    timings = {}
    for contender in contenders:
        own = seconds[contender.name]
        # A contender with fewer rounds is compared with the baseline's first ones.
        pairs = zip(own, seconds.get(contender.baseline, []), strict=False)
        ratios = [mine / base for mine, base in pairs]
        ratio = float(np.median(ratios)) if ratios else np.nan
        q25, median, q75 = (float(q) for q in np.quantile(own, [0.25, 0.5, 0.75]))
        timings[contender.name] = Timing(q25, median, q75, ratio)
    return timings


def compare(
    benchmark: str,
    contenders: Sequence[Contender],
    settings: Settings,
    *,
    n: int,
    steps: int | None = None,
    per: int = 1,
) -> list[Row]:
    """Time the contenders and make their rows; seconds are divided by ``per``."""
    timings = measure(contenders, settings.repeats)
    rows = []
    for contender in contenders:
        found = timings[contender.name]
        q25, median, q75 = found.q25 / per, found.median / per, found.q75 / per
        row = Row(benchmark, contender.name, n, steps, median, q25, q75, note=contender.note)
        row = replace(row, ratio_to_dng_math=found.ratio)
        if (goal := contender.goal) is not None:
            row = replace(row, goal=goal.text, measured=goal.measured(found.ratio, median))
            row = replace(row, met=verdict(goal.reached(found.ratio, median), settings))
        rows.append(row)
    return rows


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()


def gpu() -> str:
    """Name of the GPU that torch would use; "none" without one or without torch."""
    try:
        cuda = import_module("torch").cuda
    except ImportError:
        return "none"
    return str(cuda.get_device_name()) if cuda.is_available() else "none"


def machine(**devices: str) -> dict[str, str]:
    """Hardware, package versions and date of a measurement."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return {
        "cpu": _cpu(),
        **devices,
        "cores": f"{available_threads()} of {os.cpu_count()}",
        "os": platform.platform(),
        "python": platform.python_version(),
        "dng_math": dng_math.__version__,
        **versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class AnyRow(Protocol):
    """A dataclass with one field per column; every table has at least these columns."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def benchmark(self) -> str: ...
    @property
    def contender(self) -> str: ...
    @property
    def goal(self) -> str: ...
    @property
    def measured(self) -> str: ...
    @property
    def met(self) -> str: ...


def write_csv(path: Path, rows: Sequence[AnyRow], where: dict[str, str]) -> None:
    """Write one line per contender, with the machine on every line; the write is atomic."""
    names = [field.name for field in fields(rows[0])]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*names, *where], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: _cell(value) for name, value in asdict(row).items()}
        writer.writerow(cells | where)
    files.write_text(path, text.getvalue())


AnyKind = TypeVar("AnyKind", bound=AnyRow)


def read_csv(path: Path, kind: type[AnyKind]) -> tuple[list[AnyKind], dict[str, str]]:
    """Read the rows that :func:`write_csv` wrote, and the machine from the first line.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not such a table; the message names the file.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        rows = [kind(**{name: _value(line[name], hints[name]) for name in names}) for line in lines]
        where = {name: value for name, value in lines[0].items() if name not in names}
    except (KeyError, IndexError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} must be a table that this benchmark wrote, with the columns {', '.join(names)}"
        ) from error
    return rows, where


def _value(cell: str, hint: Any) -> Any:
    """Parse a cell by its column's type; an empty number is None."""
    if hint is str:
        return cell
    if not cell:
        return None
    return int(cell) if int in (hint, *getattr(hint, "__args__", ())) else float(cell)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[AnyRow]) -> str:
    """The rows as plain text, one line per contender, without empty columns."""
    columns = []
    for field in fields(rows[0]):
        cells = [_cell(getattr(row, field.name)) for row in rows]
        if any(cells):
            width = max(map(len, [field.name, *cells]))
            columns.append([cell.ljust(width) for cell in [field.name, *cells]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
