"""Ctrl-C: one line, exit code 130, within two seconds, and no process that is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 2.0
BESIDE_OTHERS = 3.0  # more, where other tests run at the same time


def interrupted(
    command: list[str],
    ready: str,
    *,
    whole_group: bool = False,
    wait: float = 0.3,
    **variables: str,
) -> tuple[int, str, str, float]:
    """Exit code, output, what is on standard error, and seconds from Ctrl-C to the end.

    ``ready`` is what the command prints before it is interrupted.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    while ready and ready not in "".join(said):
        line = process.stdout.readline()
        assert line, process.communicate()
        said.append(line)
    time.sleep(wait)
    started = time.perf_counter()
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    try:
        more, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, "".join(said) + more, errors, time.perf_counter() - started


def assert_ended(found: tuple[int, str, str, float]) -> None:
    code, _, errors, seconds = found
    assert code == 130, errors
    assert seconds < SECONDS + BESIDE_OTHERS
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if not line.startswith("drawing ")]
    assert lines == ["interrupted"]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


# ---------------------------------------------------------------------- what it is hard about

START = "from dng_models.support.interrupt import end_at_interrupt\nend_at_interrupt()\n"
READY = "print('ready')\n"
HARD = {
    "plain Python": "import time\ntime.sleep(60)",
    "a loop of Python": "while True:\n    pass",
    "compiled code that holds no lock": (
        "import ctypes\nctypes.CDLL(None).pause()\nctypes.CDLL(None).sleep(60)\n"
        "while True:\n    ctypes.CDLL(None).sleep(60)"
    ),
    "a callback that swallows it": (
        "import time\nwhile True:\n    try:\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        pass"
    ),
    "a thread of a pool": (
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "for _ in ThreadPoolExecutor(2).map(time.sleep, [60, 60]):\n    pass"
    ),
    "cleaning that fails": (
        "import time\ntry:\n    time.sleep(60)\nfinally:\n    raise OSError('too late')"
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_ctrl_c_ends_it(name):
    found = interrupted(["-c", START + READY + HARD[name]], "ready")
    if name == "cleaning that fails":
        # An error of its own ends it before the second is over, and is not hidden.
        assert found[0] in (1, 130)
        return
    assert_ended(found)


def test_what_is_open_is_closed_first():
    code = "import tempfile, time\nwith tempfile.TemporaryDirectory() as folder:\n"
    code += "    print(folder)\n    print('ready')\n    time.sleep(60)"
    found = interrupted(["-c", START + code], "ready")
    assert_ended(found)
    folder = Path(found[1].splitlines()[0])
    assert folder.name.startswith("tmp") and not folder.exists()


def test_processes_that_it_started_end_with_it():
    code = "import subprocess, sys, time\n"
    code += "child = 'import subprocess, sys, time; print(subprocess.Popen([sys.executable, "
    code += '"-c", "import time; time.sleep(60)"]).pid, flush=True); time.sleep(60)\'\n'
    code += "p = subprocess.Popen([sys.executable, '-c', child], process_group=0, text=True, "
    code += "stdout=subprocess.PIPE)\n"
    code += "print(p.pid, p.stdout.readline().strip())\nprint('ready')\ntime.sleep(60)"
    found = interrupted(["-c", START + code], "ready")
    assert_ended(found)
    started = [int(number) for number in found[1].splitlines()[0].split()]
    assert len(started) == 2
    deadline = time.perf_counter() + 5.0
    while any(map(is_running, started)) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, started))


def test_what_is_done_stays_done():
    code = "import time\nclass Last:\n    def __del__(self, sleep=time.sleep):\n"
    code += "        print('ready')\n        sleep(1.5)\nlast = Last()"
    found = interrupted(["-c", START + code], "ready")
    assert found[0] == 0 and found[2] == ""


def test_other_errors_are_told_as_before():
    run = subprocess.run(
        [sys.executable, "-c", f"{START}raise ValueError('mine')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" in run.stderr and "ValueError: mine" in run.stderr


# ---------------------------------------------------------------------- the commands

SLOW_FIGURE = """
import runpy, sys, time
import figures.update_geometry as figure
from dng_math import DynamicNegativeGuidance, GaussianMixture, LogOddsTracker, NoiseSchedule, sample

def compute(quick, seed):
    mixture = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
    print("computing", flush=True)
    sample(mixture, NoiseSchedule.linear(), DynamicNegativeGuidance(1.0, LogOddsTracker()),
           n=50_000_000, forbidden=[1])

figure.compute = compute
sys.argv = ["figures", "update_geometry", "--out", {out!r}]
runpy.run_module("figures", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_ends_a_figure_in_compiled_code(tmp_path, whole_group):
    code = SLOW_FIGURE.format(out=str(tmp_path))
    assert_ended(interrupted(["-c", code], "computing", whole_group=whole_group, wait=1.0))


def test_ctrl_c_ends_the_imports_of_the_figures(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "figures", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # One that comes behind the first line that is not an import, and before seconds of others.
        next(line for line in process.stderr if "matplotlib" in line)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_ends_benchmarks_and_the_process_that_they_time(tmp_path, whole_group):
    command = ["-m", "benchmarks", "start", "--part", "first use", "--quick", "--out"]
    found = interrupted([*command, str(tmp_path)], "first use:", whole_group=whole_group, wait=2.0)
    assert_ended(found)
    assert list(tmp_path.iterdir()) == []
