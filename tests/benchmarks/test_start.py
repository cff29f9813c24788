"""The benchmark of imports and first uses: every process is timed from its start, and none lies."""

from __future__ import annotations

import sys

import pytest

from benchmarks import fresh, start
from benchmarks.harness import Settings

QUICK = Settings(repeats=1, quick=True)


@pytest.fixture
def processes(monkeypatch):
    """The code of every process that would be started."""
    codes = []

    def said_by(code, **variables):
        codes.append(code)
        return "returned\n"

    monkeypatch.setattr(fresh, "said_by", said_by)
    return codes


def test_every_import_is_timed_beside_python_alone(processes):
    rows = start.imports(QUICK)
    names = [row.contender for row in rows]
    assert names[0] == start.PYTHON and set(start.IMPORTS) <= set(names)
    for row in rows:
        if row.median_s is None:
            assert row.note.startswith("skipped: ")
        else:
            assert row.beyond_python_s == pytest.approx(row.median_s - rows[0].median_s)
    assert {code.partition("\n")[0] for code in processes if "\nimport os" in code} >= {
        "import dng_math",
        "from dng_math import sample",
    }


def test_a_package_that_is_missing_is_named_with_the_cure(processes, monkeypatch):
    find = start.find_spec
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "torch" else find(name))
    notes = {row.contender: row.note for row in start.imports(QUICK)}
    assert notes["import torch"].startswith("skipped: torch is not installed: pip install")
    notes = {row.contender: row.note for row in start.first_use(QUICK)}
    assert notes["first dng_step on the CPU"].startswith("skipped: torch is not installed")


def test_the_first_sample_is_before_the_later_ones_and_has_an_empty_cache(monkeypatch, tmp_path):
    caches = []

    def said_by(code, **variables):
        folder = variables.get("NUMBA_CACHE_DIR")
        if folder is not None:
            path = type(tmp_path)(folder)
            caches.append([each.name for each in path.iterdir()])
            (path / "compiled").touch()
        return "returned\n"

    monkeypatch.setattr(fresh, "said_by", said_by)
    rows = start.first_use(Settings(repeats=4))
    # Three rounds with an empty cache, and four behind them without.
    assert caches.count([]) == start.SLOW_ROUNDS and caches.count(["compiled"]) == 4
    assert caches[0] == []
    names = {row.contender: row for row in rows}
    assert names["first sample of a mixture, ever"].goal == "at most 20 s"


LIGHT = [line for line, packages in start.IMPORTS.items() if not packages]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(start.SAMPLE, marks=pytest.mark.slow),
        pytest.param(start.STEP, marks=pytest.mark.slow),
        *LIGHT,
    ],
)
def test_what_is_timed_runs(code):
    assert fresh.said_by(code + start.RETURNED) == "returned\n"


def test_a_process_that_fails_has_no_time():
    with pytest.raises(RuntimeError, match="a new process failed with 1"):
        fresh.said_by("import sys\nprint('said', flush=True)\nsys.exit(1)")
    with pytest.raises(RuntimeError, match="a new process failed with 0"):
        fresh.said_by("pass")
    assert fresh.said_by("import sys\nprint(sys.executable)").strip() == sys.executable
