"""New processes, for what can only be measured in one: imports, first uses, peaks of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def said_by(code: str, **variables: str) -> str:
    """Run code in a new process until it says something; the line that it said.

    Parameters
    ----------
    code : str
        Of Python, with this project importable.
    **variables : str
        Of its environment, beside this process's.

    Raises
    ------
    RuntimeError
        If it ends with an error, or says nothing.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    # In a group of its own, which Ctrl-C does not reach: it would tell where it was interrupted.
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
        except KeyboardInterrupt:
            process.kill()
            raise
    if process.returncode != 0 or not said:
        raise RuntimeError(f"a new process failed with {process.returncode}, running {code}")
    return said
