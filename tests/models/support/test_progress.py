"""What is said of long computations: how far they are, what is left, and that they compile."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dng_models.support import progress as module
from dng_models.support.progress import Progress, clock, is_shown, progress_bar, say, showing

ROOT = Path(__file__).resolve().parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, in its one element."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0:00"), (-1.0, "0:00"), (59.6, "1:00"), (754.0, "12:34"), (3723.0, "1:02:03")],
)
def test_a_duration_is_read_at_a_glance(seconds, said):
    assert clock(seconds) == said


def test_a_log_has_a_line_every_so_often_with_the_time_left(now, capsys):
    with Progress(100, "training", shown=True) as bar:
        for step in range(100):
            now[0] += 1.0
            if step == 50:
                bar.set_postfix(loss="0.5")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 10/100 steps, 0:10 gone, 1:30 left",
        "training: 40/100 steps, 0:40 gone, 1:00 left",
        "training: 70/100 steps, 1:10 gone, 0:30 left, loss 0.5",
        "training: 100/100 steps, 1:40 gone, loss 0.5",
    ]


def test_what_an_earlier_run_did_makes_nothing_faster(now):
    bar = Progress(100, "training", initial=80, shown=False)
    now[0] += 10.0
    assert "left" not in str(bar)
    bar.update(10)
    assert str(bar) == "training: 90/100 steps, 0:10 gone, 0:10 left"


def test_units_have_a_plural_and_no_total_is_needed():
    assert str(Progress(3, unit="batch")).startswith("0/3 batches, ")
    bar = Progress(unit="image")
    bar.update()
    assert str(bar) == "1 image, 0:00 gone"


def test_inside_of_something_else_only_what_is_left_is_said_in_a_log(now, capsys):
    with showing(True):
        assert list(progress_bar([3, 4], "chains", leave=False)) == [3, 4]
        assert capsys.readouterr().err == ""
        for _ in progress_bar([3, 4], "chains", unit="chain", leave=False):
            now[0] += 60.0
    assert capsys.readouterr().err == "chains: 1/2 chains, 1:00 gone, 1:00 left\n"


def test_nothing_is_said_unless_it_is_asked_for(now, capsys):
    def work() -> None:
        with Progress(2) as bar:
            now[0] += 60.0
            bar.update()

    work()
    with showing(True), showing(False):  # under --quiet
        assert not is_shown()
        work()
    assert capsys.readouterr().err == ""
    with showing(True):
        assert is_shown()
        work()
    assert capsys.readouterr().err == "1/2 steps, 1:00 gone, 1:00 left\n"
    assert not is_shown()


def test_what_breaks_off_has_no_last_line(capsys):
    with pytest.raises(KeyError), Progress(2, shown=True):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_is_drawn_again(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(4, "drawing", shown=True) as bar:
        bar.update(4)
        bar.set_description("drawn")
        bar.set_postfix(loss="0.1")
    assert "\rdrawn: 100%" in screen.getvalue() and "4/4" in screen.getvalue()
    assert "loss=0.1" in screen.getvalue()


def test_a_terminal_without_tqdm_has_the_lines_of_a_log(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(1, "drawing", shown=True) as bar:
        bar.update()
        say("a line", screen)
    assert screen.getvalue() == "a line\ndrawing: 1/1 step, 0:00 gone\n"


def test_nothing_heavy_is_imported():
    code = "import sys\nfrom dng_models.support import extras, interrupt, progress, threads\n"
    code += "print({'numpy', 'torch', 'numba', 'tqdm'} & sys.modules.keys() or 'light')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "light"


COMPILES = """
import time, warnings
from numba import njit, types
from numba.extending import overload
from dng_models.support import progress
progress.PATIENCE = {patience}

def slow():
    pass

@overload(slow)
def typed():
    time.sleep(0.3)
    return lambda: 1

function = njit(lambda: slow())
again = njit(lambda: slow() + 1)
with progress.saying_what_compiles({shown}):
    assert function() == 1
    assert again() == 2
    assert function() == 1
again = njit(lambda: slow() + 2)
assert again() == 3
"""


@pytest.mark.parametrize(
    ("patience", "shown", "times"),
    [
        (0.1, True, 1),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((60.0, True, 0), (0.1, False, 0))
        ),
    ],
)
def test_a_long_compilation_is_said_once(patience, shown, times):
    code = COMPILES.format(patience=patience, shown=shown)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"NUMBA_DISABLE_JIT": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stderr.splitlines() == [module.COMPILING] * times
