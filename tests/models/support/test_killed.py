"""Killed at any call that changes a file and started again: the same files, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="calls are counted by what /proc says of files"
)


def killed_everywhere(name: str, folder: Path, every: int) -> dict:
    """What :mod:`tests.helpers.killed_everywhere` found."""
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.helpers.killed_everywhere",
            name,
            folder,
            str(every),
        ],
        cwd=ROOT,
        # A process that has started threads, or a GPU, cannot go on as a fork.
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "training", "calibration", "images"])
def test_every_call(name, tmp_path):
    found = killed_everywhere(name, tmp_path, 1)
    assert found["wrong"] == {}
    assert found["tried"] == found["points"] > 10
